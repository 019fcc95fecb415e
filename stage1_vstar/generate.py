"""Sample, grade and store what is missing: one engine, one pass, grading and writing beside it."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from common.config import SamplingParams
from common.engine import RolloutEngine, request_seed
from common.errors import UserError
from common.grading import UNJUDGED, Grade, GraderPool, Outcome
from common.rollout import Completion, Prompt, SampleRequest
from common.store import SampleStore, stored_text
from stage1_vstar.progress import SamplingProgress
from stage1_vstar.writer import FragmentWriter

GRADER_TRIAL = 64
"""A grader that can judge none of this many completions is broken."""

Address = tuple[str, int]
"""A sample's prompt id and index."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The samples still to be drawn: prompts, and for each which of its samples, shape (P, N)."""

    prompts: Sequence[Prompt]
    samples_PN: NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.samples_PN.sum())

    def incomplete(self) -> "Missing":
        """The prompts that lack a sample."""
        return self._at(np.flatnonzero(self.samples_PN.any(axis=1)))

    def of(self, prompt_ids: Collection[str]) -> "Missing":
        """These prompts alone."""
        return self._at(
            np.array(
                [place for place, prompt in enumerate(self.prompts) if prompt.id in prompt_ids], dtype=np.intp
            )
        )

    def _at(self, places: NDArray[np.intp]) -> "Missing":
        return Missing([self.prompts[place] for place in places], self.samples_PN[places])

    def requests(self, seed: int) -> Iterator[SampleRequest]:
        """Each prompt's samples together, so that they share its prefix in the engine. The key is its address."""
        for prompt, samples_N in zip(self.prompts, self.samples_PN, strict=True):
            for index in np.flatnonzero(samples_N).tolist():
                yield SampleRequest(
                    key=(prompt.id, index),
                    prompt_token_ids=tuple(prompt.token_ids),
                    seed=request_seed(seed, prompt.id, index),
                )


def generate_samples(
    missing: Missing,
    engine: RolloutEngine,
    pool: GraderPool,
    store: SampleStore,
    sampling: SamplingParams,
    seed: int,
    console: Console,
    *,
    grader_proven: bool = False,
) -> None:
    """Draw the missing samples from the reference policy, grade them and append them to the store.

    A grader that can judge nothing at all is refused; one that is `grader_proven` may have met just the prompts whose
    completions it cannot judge.
    """
    places = {prompt.id: place for place, prompt in enumerate(missing.prompts)}
    running: dict[Address, dict[str, Any]] = {}
    check = GraderCheck(nothing_judged_before=not store.fragments(), proven=grader_proven)
    with FragmentWriter(store.append) as writer, SamplingProgress(missing.samples_PN, console) as progress:
        collect = partial(write_graded, running.pop, writer, check)
        try:
            for completion in engine.generate(missing.requests(seed), sampling):
                address = completion.key
                assert isinstance(address, tuple)
                place = places[address[0]]
                prompt = missing.prompts[place]
                running[address] = ungraded_row(prompt, address[1], completion)
                pool.submit(
                    address,
                    prompt=prompt.text,
                    completion=completion.text,
                    answer=prompt.answer,
                    truncated=completion.truncated,
                )
                collect(pool.ready())
                progress.add(place, len(completion.token_ids))
            check.all_there = True
            collect(pool.drain())
        finally:  # interrupted: what is graded by now is kept
            collect(pool.ready())
    for reason, count in check.unjudged.most_common(3):
        console.print(f"{count:,} completions could not be judged, reward 0: {reason}")


def write_graded(
    row_of: Callable[[Any], dict[str, Any]],
    writer: FragmentWriter,
    check: "GraderCheck",
    graded: Sequence[tuple[Any, Grade]],
) -> None:
    """Hand graded samples, `row_of` their keys, to the writer. Raises UserError if the grader can judge none."""
    for key, grade in graded:
        check.count(grade)
        writer.add(row_of(key) | grade.columns())
    if check.broken and not writer.written:
        writer.discard()
        raise UserError(check.complaint())


class GraderCheck:
    """Finds out whether the grader can judge anything at all.

    Where it has judged samples before, a few hard ones that were left over say nothing about it.
    """

    def __init__(self, *, nothing_judged_before: bool, proven: bool = False) -> None:
        self.unjudged: Counter[str] = Counter()
        self.all_there = False
        self._few_are_enough = nothing_judged_before
        self._proven = proven
        self._trials = 0

    def count(self, grade: Grade) -> None:
        self._trials += grade.outcome is not Outcome.TRUNCATED
        if grade.outcome in UNJUDGED:
            self.unjudged[f"{grade.outcome.value}: {grade.reason}"] += 1

    @property
    def broken(self) -> bool:
        enough = self._trials >= GRADER_TRIAL or (self.all_there and self._few_are_enough)
        return enough and not self._proven and self.unjudged.total() == self._trials > 0

    def complaint(self) -> str:
        return (
            f"the grader could judge none of the first {self._trials} completions ({next(iter(self.unjudged))}); "
            "nothing was kept of them. Correct grader.name, or give it more time or memory"
        )


def ungraded_row(prompt: Prompt, index: int, completion: Completion) -> dict[str, Any]:
    """A row of samples/*.parquet that lacks its grade."""
    text, raw = stored_text(completion.text)
    return {
        "prompt_id": prompt.id,
        "sample_index": index,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "prompt_token_hash": prompt.token_hash,
        "completion": text,
        "completion_raw": raw,
        "completion_tokens": len(completion.token_ids),
    }
