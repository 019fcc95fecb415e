"""Values and advantages of next steps (Liu et al., 2024, arXiv:2412.18279, Eq. 3.7): arithmetic on tables of states.

    Â(s, a_i) = Q(s, a_i) − (1/M) Σ_j Q(s, a_j)          over all M completions of the state s

Q of a step that ends the solution is its reward. Of any other step it is the critic's value of the state that the step
leads to, or the mean reward of the completions that go through it.

Shapes: _S state, _A action (all states' actions, one after the other).
"""

import numpy as np
import polars as pl
import pyarrow as pa

from common.segments.config import Values
from common.segments.files import standard_error
from common.value import Floats, Ragged

ONE_STEP = "one next step"
"""The name of the rule that drops states whose completions all begin alike: their only advantage is 0."""
ADVANTAGE_ERROR = "advantage_error"
"""An extra column that rules may use: the largest standard error of a state's advantages."""
ROUNDING = 1e-9
"""By so much a gap may be below the smallest one: 0.6 − 0.5 is a little less than 0.1."""


def gap_rule(min_gap: float) -> str:
    """The name of the rule that drops states whose advantages differ by less."""
    return f"gap < {min_gap:.12g}"


def is_below(min_gap: float) -> pl.Expr:
    """Whether a state's advantages differ by less, but for rounding."""
    return pl.col("gap") < min_gap - ROUNDING


def dropped_by(min_gap: float) -> pl.Expr:
    """The name of the first rule that drops a state; missing if none does."""
    return pl.coalesce(
        pl.when(pl.col("values").list.len() < 2).then(pl.lit(ONE_STEP)),
        pl.when(is_below(min_gap)).then(pl.lit(gap_rule(min_gap))),
    )


def with_advantages(rows: pl.DataFrame, values_from: Values) -> pl.DataFrame:
    """The rows with values, their standard errors, advantages and gap. Each state has an action.

    `critic_values` has to be there if the values are from the critic; its entry for a step that ends is not read.
    """
    actions = Ragged(rows["action_values"].list.len().to_numpy().astype(np.int64))
    monte_carlo_A, counts_A, samples_A, ends_A = (
        rows[name].explode().to_numpy()
        for name in ("action_values", "action_counts", "action_samples", "action_ends")
    )
    values_A = monte_carlo_A
    if values_from == "critic":
        critic_A = rows["critic_values"].explode().to_numpy().astype(np.float64)
        values_A = np.where(ends_A, monte_carlo_A, critic_A)
    errors_A = [
        0.0 if ends else standard_error(value * count, count)
        for value, count, ends in zip(monte_carlo_A, samples_A, ends_A, strict=True)
    ]
    mean_S = actions.sum(counts_A * values_A) / actions.sum(counts_A)
    advantages_A = values_A - actions.repeat(mean_S)
    return rows.with_columns(
        pl.lit(values_from).alias("values_from"),
        lists("values", values_A, actions),
        lists("standard_errors", np.array(errors_A), actions),
        lists("advantages", advantages_A, actions),
        pl.Series("gap", actions.max(advantages_A) + actions.max(-advantages_A)),
    )


def with_advantage_error(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with ADVANTAGE_ERROR: Â_i = Q_i − Σ_j w_j Q_j, and the errors of different Q are independent."""
    actions = Ragged(rows["standard_errors"].list.len().to_numpy().astype(np.int64))
    variance_A = rows["standard_errors"].explode().to_numpy() ** 2
    counts_A = rows["action_counts"].explode().to_numpy()
    share_A = counts_A / actions.repeat(actions.sum(counts_A))
    mean_S = actions.sum(share_A**2 * variance_A)
    variances_A = (1 - 2 * share_A) * variance_A + actions.repeat(mean_S)
    return rows.with_columns(pl.Series(ADVANTAGE_ERROR, np.sqrt(actions.max(variances_A))))


def lists(name: str, values_A: Floats, actions: Ragged) -> pl.Series:
    """A column with one list per state; nan becomes a missing value."""
    ends_S = np.cumsum(actions.counts_P)
    offsets = pa.array(np.concatenate([[0], ends_S]), pa.int64())
    return pl.Series(name, pa.LargeListArray.from_arrays(offsets, pa.array(values_A, from_pandas=True)))
