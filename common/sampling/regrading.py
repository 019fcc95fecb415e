"""Grades stored completions that another grader has judged, or that the run's own has not judged yet."""

from collections.abc import Iterator
from functools import partial

import polars as pl

from common.errors import UserError
from common.grading import GraderConfig, GraderPool, Outcome, row_needs
from common.grading.conventions import Needs
from common.grading.reference import Reference, reference_of
from common.sampling.generate import write_graded
from common.sampling.grader_check import GraderCheck
from common.sampling.writer import FragmentWriter
from common.store import JUDGED, SampleStore, original_text
from common.terminal.console import Terminal


def grade_missing(
    store: SampleStore,
    grader: GraderConfig,
    notices: Terminal,
    *,
    prompts: pl.DataFrame | None = None,
) -> None:
    """Grade the samples that this grader has not judged, one fragment at a time; with `prompts` only theirs."""
    check = GraderCheck(nothing_judged_before=not store.grade_fragments())
    needs = row_needs(grader)
    with GraderPool(grader) as pool, FragmentWriter(store.add_grades) as writer:
        collect = partial(write_graded, lambda judged: dict(zip(JUDGED, judged, strict=True)), writer, check)
        try:
            for number, frame in enumerate(store.ungraded(prompts)):
                reference = reference_of(frame["answer"][0])
                refuse_unstored(needs, reference, grader, with_tokens=not frame["completion_ids"].has_nulls())
                if number == 0:
                    for line in what_is_missing(needs, reference, grader):
                        notices.print(line)
                    pool.try_out(frame["prompt"][0], frame["answer"][0])
                for row in frame.iter_rows(named=True):
                    pool.submit(
                        tuple(row[name] for name in JUDGED),
                        prompt=row["prompt"],
                        completion=original_text(row["completion"], row["completion_raw"]),
                        answer=row["answer"],
                        truncated=row["outcome"] == Outcome.TRUNCATED,
                        token_ids=row["completion_ids"],
                    )
                    collect(pool.ready())
            check.all_there = True
            collect(pool.drain())
        finally:
            collect(pool.ready())
        for line in pool.usage_lines():
            notices.print(line)


def refuse_unstored(needs: Needs, reference: Reference, grader: GraderConfig, *, with_tokens: bool) -> None:
    """Raise UserError if a reward function reads something that samples do not hold."""
    missing = [f"the column {name}" for name in needs.columns if name not in reference.columns]
    if needs.token_ids and not with_tokens:
        missing.insert(0, "completion_ids")
    if missing:
        raise UserError(
            f"grader.name = {grader.title} reads {missing[0]}, which these samples do not hold: `regrade` cannot "
            "call it; draw the samples under another --run"
        )


def what_is_missing(needs: Needs, reference: Reference, grader: GraderConfig) -> Iterator[str]:
    """A warning for each thing that a reward function may read and that the samples do not hold as the file does."""
    absent = [name for name in needs.optional_columns if name not in reference.columns]
    if absent or (needs.all_columns and grader.columns != [] and not reference.columns):
        yield (
            f"warning: these samples hold no {', '.join(absent) or 'columns of the data set'}, and grader.name = "
            f"{grader.title} is called without; if it reads them, draw the samples under another --run"
        )
    if needs.as_in_file and reference == reference_of(reference.answer) and _is_number(reference.answer):
        yield (
            f"warning: these samples hold answers as texts: grader.name = {grader.title} gets "
            f"{reference.answer!r}, also where the data set's file has a number; if that makes a difference, draw the "
            "samples under another --run"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
