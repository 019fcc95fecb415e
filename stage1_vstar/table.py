"""From samples to the rows of vstar.parquet, and from such rows to rows with another β1 or other keep flags."""

from collections.abc import Iterable

import numpy as np
import polars as pl

from common.grading import Outcome
from common.rollout import Prompt
from stage1_vstar.estimator import estimate_vstar


def prompt_table(prompts: Iterable[Prompt]) -> pl.DataFrame:
    """The columns of vstar.parquet that are known before any sample is drawn, a row a prompt."""
    names = ("prompt_id", "prompt", "answer", "prompt_token_hash")
    rows = [(prompt.id, prompt.text, prompt.answer, prompt.token_hash) for prompt in prompts]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


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
