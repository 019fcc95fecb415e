"""Sample, grade and store what is missing: one engine, one pass, grading in other processes meanwhile."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from common.config import SamplingParams
from common.engine import RolloutEngine, request_seed
from common.errors import UserError
from common.grading import UNJUDGED, Grade, GraderPool, Outcome
from common.rollout import Completion, Prompt, SampleRequest
from common.schema import SampleStore
from stage1_vstar.progress import SamplingProgress

FRAGMENT_SAMPLES = 4096
FRAGMENT_SECONDS = 60.0
"""A killed job loses at most one fragment: what was graded since the last one."""
GRADER_TRIAL = 64
"""A grader that can judge none of this many completions is broken."""

Address = tuple[str, int]
"""A sample's prompt id and index."""


def missing_samples(prompts: Sequence[Prompt], num_samples: int, present: set[Address]) -> list[Address]:
    """The samples still to be drawn, each prompt's together so that they share its prefix in the engine."""
    addresses = ((prompt.id, index) for prompt in prompts for index in range(num_samples))
    return [address for address in addresses if address not in present]


def generate_samples(
    missing: Sequence[Address],
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    pool: GraderPool,
    store: SampleStore,
    sampling: SamplingParams,
    seed: int,
    console: Console,
) -> None:
    """Draw the missing samples from the reference policy, grade them and append them to the store."""
    by_id = {prompt.id: prompt for prompt in prompts}
    running: dict[Address, Completion] = {}
    pending: list[dict[str, Any]] = []
    written = False
    written_at = time.monotonic()

    def requests() -> Iterator[SampleRequest]:
        for prompt_id, index in missing:
            yield SampleRequest(
                key=(prompt_id, index),
                prompt_token_ids=by_id[prompt_id].token_ids,
                seed=request_seed(seed, prompt_id, index),
            )

    unjudged: Counter[str] = Counter()
    trials = 0

    def collect(graded: Sequence[tuple[Any, Grade]]) -> None:
        nonlocal trials
        for address, grade in graded:
            pending.append(sample_row(by_id[address[0]], address[1], running.pop(address), grade))
            if grade.outcome is not Outcome.TRUNCATED:
                trials += 1
            if grade.outcome in UNJUDGED:
                unjudged[f"{grade.outcome.value}: {grade.reason}"] += 1

    def refuse_broken_grader() -> None:
        if not written and unjudged.total() == trials > 0:
            pending.clear()
            raise UserError(
                f"the grader could judge none of the first {trials} completions ({next(iter(unjudged))}); "
                "nothing was kept of them. Correct grader.name, or give it more time or memory"
            )

    def write(at_least: int) -> None:
        nonlocal written, written_at
        if pending and (len(pending) >= at_least or time.monotonic() - written_at > FRAGMENT_SECONDS):
            store.append(pending)
            pending.clear()
            written = True
            written_at = time.monotonic()

    with SamplingProgress((prompt_id for prompt_id, _ in missing), console) as progress:
        try:
            for completion in engine.generate(requests(), sampling):
                address = completion.key
                assert isinstance(address, tuple)
                prompt = by_id[address[0]]
                running[address] = completion
                pool.submit(
                    address,
                    prompt=prompt.text,
                    completion=completion.text,
                    answer=prompt.answer,
                    truncated=completion.truncated,
                )
                collect(pool.ready())
                if trials >= GRADER_TRIAL:
                    refuse_broken_grader()
                write(FRAGMENT_SAMPLES)
                progress.add(prompt.id, len(completion.token_ids))
            collect(pool.drain())
            refuse_broken_grader()
        finally:
            write(1)
    for reason, count in unjudged.most_common(3):
        console.print(f"{count:,} completions could not be judged, reward 0: {reason}")


def sample_row(prompt: Prompt, index: int, completion: Completion, grade: Grade) -> dict[str, Any]:
    """A row of samples/*.parquet."""
    return {
        "prompt_id": prompt.id,
        "sample_index": index,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "completion": completion.text,
        "completion_tokens": len(completion.token_ids),
        "outcome": grade.outcome.value,
        "extracted": grade.extracted,
        "reward": grade.reward,
        "reason": grade.reason,
    }
