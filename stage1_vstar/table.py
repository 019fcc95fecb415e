"""From samples to the rows of vstar.parquet, and from such rows to rows with another β1 or other keep flags."""

import numpy as np
import polars as pl

from common.grading import Outcome
from stage1_vstar.estimator import estimate_vstar


def vstar_rows(samples: pl.DataFrame, *, num_samples: int, beta1: float, drop_unsolved: bool) -> pl.DataFrame:
    """One row a prompt from one row a sample, in order of first appearance in `samples`.

    Only each prompt's first `num_samples` samples count, so that a run that once drew more can be read with fewer.
    """
    rows = (
        samples.filter(pl.col("sample_index") < num_samples)
        .sort("sample_index", maintain_order=True)
        .group_by("prompt_id", maintain_order=True)
        .agg(
            pl.col("prompt").first(),
            pl.col("answer").first(),
            pl.len().cast(pl.Int32).alias("num_samples"),
            pl.col("reward").alias("rewards"),
            pl.col("outcome").alias("outcomes"),
            pl.col("completion_tokens"),
            (pl.col("outcome") == Outcome.CORRECT.value).mean().alias("pass_rate"),
            (pl.col("outcome") == Outcome.CORRECT.value).any().alias("pass_at_n"),
        )
    )
    return with_beta1(with_keep(rows, pl.col("pass_at_n") if drop_unsolved else pl.lit(True)), beta1)


def with_beta1(rows: pl.DataFrame, beta1: float) -> pl.DataFrame:
    """The same rows with V̂* under another β1: arithmetic on the rewards kept in the file."""
    estimate = estimate_vstar(
        rows["rewards"].explode().to_numpy(), rows["rewards"].list.len().to_numpy().astype(np.int64), beta1
    )
    return rows.with_columns(
        pl.lit(beta1, dtype=pl.Float64).alias("beta1"),
        pl.Series("vstar", estimate.vstar_P),
        pl.Series("vstar_se", estimate.se_P).fill_nan(None),
    )


def with_keep(rows: pl.DataFrame, keep: pl.Expr) -> pl.DataFrame:
    """The same rows, each marked whether stage 2 trains on it."""
    return rows.with_columns(keep.alias("keep"))
