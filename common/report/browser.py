"""The completions of the prompts that the page shows.

Only these prompts' samples are kept while the files are read, and only the beginning of a text, so that neither a
million samples nor a long text fills the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from common.grading import Outcome
from common.grading.reference import reference_of
from common.provenance import Allowance, Provenance, read_provenance
from common.report.stage1 import Stage1
from common.report.text import CHARACTERS_SHOWN, Excerpt
from common.runs import RunPaths
from common.store import SampleStore, sample_files

SAMPLES_SHOWN = 16
"""Samples shown of a prompt: those with the highest and those with the lowest rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion and its grade."""

    index: int
    completion: Excerpt
    had_surrogates: bool
    tokens: int
    outcome: str
    extracted: str | None
    reward: float
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A prompt and some of its samples."""

    prompt_id: str
    prompt: Excerpt
    answer: Excerpt
    num_samples: int
    solved: int
    vstar: float
    keep: bool
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Prompts that are shown for one reason."""

    title: str
    reason: str
    entries: Sequence[Entry]


def browse(paths: RunPaths, stage1: Stage1) -> list[Group]:
    """The groups with at least one prompt. Raises UserError if the samples cannot be read."""
    prompt_ids = {name for _, rows in stage1.chosen for name in rows["prompt_id"]}
    samples = read_samples(paths.samples, stage1.provenance, prompt_ids)
    return [
        Group(
            title=reason.title,
            reason=reason.words,
            entries=[_entry(row, samples.get(row["prompt_id"], [])) for row in rows.iter_rows(named=True)],
        )
        for reason, rows in stage1.chosen
        if rows.height
    ]


def read_samples(folder: Path, provenance: Provenance, prompt_ids: set[str]) -> dict[str, list[Sample]]:
    """The samples of these prompts under the grader of `provenance`, by prompt; {} if there are no samples."""
    if not (files := sample_files(folder)):
        return {}
    found = read_provenance(files[0])
    # The rest of the samples' identity does not matter for looking at them.
    ours = replace(found, identity={**found.identity, "grader": provenance.identity["grader"]})
    store = SampleStore(folder, ours, Allowance(list(ours.identity)))
    text = pl.col("completion")
    frame = store.samples_of(
        prompt_ids,
        [
            pl.col(
                "prompt_id", "sample_index", "completion_tokens", "outcome", "extracted", "reward", "reason"
            ),
            text.str.head(CHARACTERS_SHOWN),
            text.str.len_chars().alias("characters"),
            pl.col("completion_raw").is_not_null().alias("had_surrogates"),
        ],
    )
    return {
        str(name): [_sample(row) for row in some.iter_rows(named=True)]
        for (name,), some in frame.sort("sample_index").group_by("prompt_id")
    }


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        index=row["sample_index"],
        completion=Excerpt(row["completion"], row["characters"]),
        had_surrogates=row["had_surrogates"],
        tokens=row["completion_tokens"],
        outcome=row["outcome"],
        extracted=row["extracted"],
        reward=row["reward"],
        reason=row["reason"],
    )


def _entry(row: dict[str, Any], samples: Sequence[Sample]) -> Entry:
    counted = [sample for sample in samples if sample.index < row["num_samples"]]
    if len(counted) > SAMPLES_SHOWN:
        by_reward = sorted(counted, key=lambda sample: sample.reward)
        half = SAMPLES_SHOWN // 2
        counted = sorted(by_reward[:half] + by_reward[-half:], key=lambda sample: sample.index)
    return Entry(
        prompt_id=row["prompt_id"],
        prompt=Excerpt.of(row["prompt"]),
        answer=Excerpt.of(reference_of(row["answer"]).answer),
        num_samples=row["num_samples"],
        solved=row["outcomes"].count(Outcome.CORRECT),
        vstar=row["vstar"],
        keep=row["keep"],
        samples=counted,
    )
