"""Sample, grade and store missing samples: one engine and one pass; grading and writing run in parallel."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.config import SamplingParams
from common.engines import RolloutEngine
from common.errors import UserError
from common.grading import Grade, GraderPool
from common.grading.judge import JudgeUsage
from common.rollout import Completion, Prompt
from common.sampling.grader_check import GraderCheck
from common.sampling.missing import Address, Missing
from common.sampling.progress import SamplingProgress
from common.sampling.writer import FragmentWriter
from common.store import SampleStore, stored_text
from common.terminal.console import Terminal


def generate_samples(
    missing: Missing,
    engine: RolloutEngine,
    pool: GraderPool,
    store: SampleStore,
    sampling: SamplingParams,
    seed: int,
    console: Terminal,
    *,
    grader_proven: bool = False,
    keep_token_ids: bool = False,
    prompts: str = "prompts",
) -> None:
    """Draw the missing samples from the reference policy, grade them and append them to the store.

    A grader that can judge none of the first completions is refused, unless it is `grader_proven`: then only prompts
    that it cannot judge may be left. `prompts` is what messages call the prompts.
    """
    places = {prompt.id: place for place, prompt in enumerate(missing.prompts)}
    running: dict[Address, dict[str, Any]] = {}
    check = GraderCheck(nothing_judged_before=not store.fragments(), proven=grader_proven)
    with (
        FragmentWriter(appending(store, pool)) as writer,
        SamplingProgress(missing.samples_PN, console, prompts) as progress,
    ):
        collect = partial(write_graded, running.pop, writer, check)
        try:
            for completion in engine.generate(missing.requests(seed), sampling):
                address = completion.key
                assert isinstance(address, tuple)
                place = places[address[0]]
                prompt = missing.prompts[place]
                running[address] = ungraded_row(prompt, address[1], completion, keep_token_ids)
                pool.submit(
                    address,
                    prompt=prompt.text,
                    completion=completion.text,
                    answer=prompt.answer,
                    truncated=completion.truncated,
                    token_ids=completion.token_ids,
                )
                collect(pool.ready())
                progress.add(place, len(completion.token_ids) - len(prompt.prefix))
            check.all_there = True
            collect(pool.drain())
        finally:  # interrupted: completions that are graded by now are kept
            collect(pool.ready())
    for reason, count in check.unjudged.most_common(3):
        console.print(f"{count:,} completions could not be judged, reward 0: {reason}")
    for line in pool.usage_lines():
        console.print(line)


def appending(store: SampleStore, pool: GraderPool) -> Callable[[list[dict[str, Any]]], Path]:
    """Appends rows to the store, with the judge's usage since the last ones."""
    counted = JudgeUsage()

    def append(rows: list[dict[str, Any]]) -> Path:
        nonlocal counted
        used, counted = pool.judge_usage - counted, pool.judge_usage
        return store.append(rows, used.columns() if used.replies else {})

    return append


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


def ungraded_row(
    prompt: Prompt, index: int, completion: Completion, keep_token_ids: bool = False
) -> dict[str, Any]:
    """A row of samples/*.parquet, without its grade."""
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
        "completion_ids": list(completion.token_ids) if keep_token_ids else None,
    }
