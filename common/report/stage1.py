"""Gathers the page's data from vstar.parquet, part by part: a few numbers of most prompts, everything of some."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from common.grading import UNJUDGED, Outcome
from common.provenance import Provenance, read_provenance
from common.report.sweep_files import SamplesDigest
from common.vstar_file import scan_vstar

PROMPTS_SHOWN = 5
"""Prompts per group."""

NUMBERS = ["num_samples", "pass_rate", "pass_at_n", "beta1", "vstar", "vstar_se", "keep", "dropped_by"]
"""The columns that are kept of every prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """A reason to look at a prompt: which prompts qualify, and in which order; ties are broken by prompt id."""

    title: str
    words: str
    qualifies: pl.Expr
    order: Sequence[pl.Expr]

    def first(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The first PROMPTS_SHOWN rows."""
        return rows.filter(self.qualifies).sort(*self.order, "prompt_id").head(PROMPTS_SHOWN)


def _count(*outcomes: Outcome) -> pl.Expr:
    named = pl.element().is_in([outcome.value for outcome in outcomes])
    return pl.col("outcomes").list.eval(named).list.sum().cast(pl.Int64)


_unjudged, _unread = _count(*UNJUDGED), _count(Outcome.UNPARSED, Outcome.GOLD_UNPARSED)

REASONS = (
    Reason(
        title="Most disputed",
        words="pass rate nearest to one half",
        qualifies=(pl.col("pass_rate") > 0) & (pl.col("pass_rate") < 1),
        order=[(pl.col("pass_rate") - 0.5).abs()],
    ),
    Reason(title="Worst", words="lowest V̂*", qualifies=pl.lit(True), order=[pl.col("vstar")]),
    Reason(title="Best", words="highest V̂*", qualifies=pl.lit(True), order=[-pl.col("vstar")]),
    Reason(
        title="Grader problems",
        words="most completions that the grader failed on, then those in which it found no answer",
        qualifies=_unjudged + _unread > 0,
        order=[-_unjudged, -_unread],
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1:
    """A run's vstar.parquet, summed up."""

    provenance: Provenance
    prompts: pl.DataFrame
    """NUMBERS of every prompt."""
    outcomes: pl.DataFrame
    """outcome, samples, tokens (their sum): the most frequent first."""
    chosen: Sequence[tuple[Reason, pl.DataFrame]]
    """Whole rows."""
    samples_digest: str


def read_stage1(path: Path) -> Stage1:
    """Sum up a vstar.parquet of any size. Raises UserError if it breaks the contract."""
    numbers, counts = [], []
    chosen = [(reason, pl.DataFrame()) for reason in REASONS]
    digest = SamplesDigest()
    for rows in scan_vstar(path):
        digest.add(rows)
        numbers.append(rows.select(NUMBERS))
        counts.append(_outcome_counts(rows))
        chosen = [
            (reason, reason.first(pl.concat([*([some] if some.width else []), rows])))
            for reason, some in chosen
        ]
    return Stage1(
        provenance=read_provenance(path),
        prompts=pl.concat(numbers),
        outcomes=pl.concat(counts)
        .group_by("outcome")
        .sum()
        .sort("samples", "outcome", descending=[True, False]),
        chosen=chosen,
        samples_digest=digest.hexdigest(),
    )


def _outcome_counts(rows: pl.DataFrame) -> pl.DataFrame:
    samples = rows.select(pl.col("outcomes").alias("outcome"), "completion_tokens").explode(
        "outcome", "completion_tokens"
    )
    return samples.group_by("outcome").agg(
        pl.len().cast(pl.Int64).alias("samples"),
        pl.col("completion_tokens").cast(pl.Int64).sum().alias("tokens"),
    )
