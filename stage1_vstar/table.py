"""Make the rows of vstar.parquet from samples, and change the V̂* or the keep flags of existing rows."""

import numpy as np
import polars as pl

from common.grading import Outcome
from stage1_vstar.beta_binomial import BetaPrior
from stage1_vstar.estimator import estimate

UNSOLVED = "pass@N = 0"
"""The name of the rule that drops prompts without any correct sample, from which training learns nothing."""


def vstar_rows(
    prompts: pl.DataFrame, grades: pl.DataFrame, *, num_samples: int, beta1: float, drop_unsolved: bool
) -> pl.DataFrame:
    """The rows of vstar.parquet: the prompts (`prompt_table`) that have samples, with V̂* from their samples' grades.

    Only each prompt's first `num_samples` samples count, so that a run that once drew more can be read with fewer.
    """
    correct = pl.col("outcome") == Outcome.CORRECT.value
    samples = (
        grades.filter(pl.col("sample_index") < num_samples)
        .sort("sample_index", maintain_order=True)
        .group_by("prompt_id", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int32).alias("num_samples"),
            pl.col("reward").alias("rewards"),
            pl.col("outcome").alias("outcomes"),
            pl.col("completion_tokens"),
            correct.mean().alias("pass_rate"),
            correct.any().alias("pass_at_n"),
        )
    )
    rows = prompts.join(samples, on="prompt_id", how="inner", maintain_order="left")
    unsolved = pl.when(~pl.col("pass_at_n") & drop_unsolved).then(pl.lit(UNSOLVED))
    return with_vstar(with_dropped(rows, unsolved), beta1)


def with_vstar(
    rows: pl.DataFrame, beta1: float, *, estimator: str = "plugin", prior: BetaPrior | None = None
) -> pl.DataFrame:
    """The same rows with V̂* under another β1 or by another estimator: arithmetic on the rewards kept in the file."""
    rewards_S = rows["rewards"].explode().to_numpy()
    counts_P = rows["rewards"].list.len().to_numpy().astype(np.int64)
    estimated = estimate(rewards_S, counts_P, beta1, estimator=estimator, prior=prior)
    return rows.with_columns(
        pl.lit(beta1, dtype=pl.Float64).alias("beta1"),
        pl.Series("vstar", estimated.vstar_P),
        pl.Series("vstar_se", estimated.se_P).fill_nan(None),
    )


def with_dropped(rows: pl.DataFrame, dropped_by: pl.Expr) -> pl.DataFrame:
    """The same rows, each with the name of the rule that drops it; stage 2 trains on the rows that no rule drops."""
    return rows.with_columns(dropped_by.alias("dropped_by")).with_columns(keep=pl.col("dropped_by").is_null())


def success_groups(rows: pl.DataFrame) -> pl.DataFrame:
    """The number of prompts for each (successes, trials), for rewards of 0 and 1; the input of `fit_prior`."""
    successes = pl.col("rewards").list.sum().cast(pl.Int64).alias("successes")
    trials = pl.col("rewards").list.len().cast(pl.Int64).alias("trials")
    groups = rows.group_by(successes, trials).agg(pl.len().cast(pl.Int64).alias("prompts"))
    return groups.sort("successes", "trials")
