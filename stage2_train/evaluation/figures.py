"""Figures of one model on one benchmark, and the comparison of two models on the same prompts.

Shapes: _P prompt.
"""

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.evaluations import Comparison
from common.grading import Outcome

RESAMPLES = 2000
PERMUTATIONS = 9999
CORRECT = Outcome.CORRECT.value


def drawn_figures(rows: pl.DataFrame, *, seed: int) -> dict[str, object]:
    """The figures that need no model, from one row per prompt (results.py has the columns)."""
    found: dict[str, object] = {"prompts": rows.height}
    sampled = samples_per_prompt(rows)
    if rows["greedy_outcome"].null_count() == 0:
        greedy_P = (rows["greedy_outcome"] == CORRECT).cast(pl.Float64).to_numpy()
        found["greedy_accuracy"] = float(greedy_P.mean())
        found["greedy_accuracy_interval_95"] = bootstrap_interval(greedy_P, seed=seed)
    if sampled:
        solved_P = solved(rows)
        rates_P = solved_P / sampled
        found |= {
            "samples_per_prompt": sampled,
            "pass_at_1": float(rates_P.mean()),
            "pass_at_1_interval_95": bootstrap_interval(rates_P, seed=seed),
            "pass_at_k": {str(k): pass_at_k(solved_P, sampled, k) for k in _powers_of_two(sampled)},
        }
    outcomes, rewards, tokens = (
        rows[many].explode() if sampled else rows[one]
        for many, one in (
            ("outcomes", "greedy_outcome"),
            ("rewards", "greedy_reward"),
            ("completion_tokens", "greedy_tokens"),
        )
    )
    counts = dict(outcomes.value_counts().iter_rows())
    return found | {
        "reward_mean": float(rewards.mean()),  # type: ignore[arg-type]
        "completion_tokens_mean": float(tokens.mean()),  # type: ignore[arg-type]
        "truncated": counts.get(Outcome.TRUNCATED.value, 0) / len(outcomes),
        "outcomes": {each.value: counts[each.value] for each in Outcome if each.value in counts},
    }


def samples_per_prompt(rows: pl.DataFrame) -> int:
    """How many sampled completions each prompt has."""
    return int(max(rows["outcomes"].list.len().to_list()))


def solved(rows: pl.DataFrame) -> NDArray[np.int64]:
    """How many of each prompt's sampled completions are correct."""
    return rows["outcomes"].list.eval(pl.element() == CORRECT).list.sum().cast(pl.Int64).to_numpy()


def accuracy_by_prompt(rows: pl.DataFrame) -> NDArray[np.float64]:
    """The share of each prompt's sampled completions that are correct; without samples, of its greedy one."""
    if (samples := samples_per_prompt(rows)) > 0:
        return solved(rows) / samples
    return (rows["greedy_outcome"] == CORRECT).cast(pl.Float64).to_numpy()


def compare(benchmark: str, first: pl.DataFrame, second: pl.DataFrame, *, seed: int) -> Comparison | None:
    """Compare two models on the prompts that both answered; None if there are none.

    The interval is by a paired bootstrap over prompts, the p-value by a sign-flip permutation test (both of scipy).
    """
    names = (first["model"][0], second["model"][0])
    both = first.select("prompt_id").join(second.select("prompt_id"), on="prompt_id", maintain_order="left")
    if both.is_empty():
        return None
    ours, theirs = (
        accuracy_by_prompt(both.join(rows, on="prompt_id", maintain_order="left")) for rows in (first, second)
    )
    differences_P = theirs - ours
    return Comparison(
        benchmark=benchmark,
        first=names[0],
        second=names[1],
        prompts=both.height,
        difference=float(differences_P.mean()),
        interval_95=bootstrap_interval(differences_P, seed=seed),
        p_value=sign_flip_p_value(differences_P, seed=seed),
    )


def pass_at_k(solved_P: NDArray[np.int64], samples: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is correct: 1 − C(n − c, k)/C(n, k), mean over prompts.

    `solved_P` counts each prompt's correct samples among `samples` (n). (Chen et al. 2021, arXiv:2107.03374, Eq. 1.)
    """
    total = math.comb(samples, k)
    return float(np.mean([1 - math.comb(samples - int(solved), k) / total for solved in solved_P]))


def bootstrap_interval(values_P: NDArray[np.float64], *, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, resampling prompts; a single prompt cannot be resampled."""
    from scipy.stats import bootstrap

    if len(values_P) == 1:
        return float(values_P[0]), float(values_P[0])
    random = np.random.default_rng(seed)
    low, high = bootstrap(
        (values_P,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=random
    ).confidence_interval
    return float(low), float(high)


def sign_flip_p_value(differences_P: NDArray[np.float64], *, seed: int) -> float:
    """The two-sided p-value of the mean difference of paired values under random signs; 1 if all are equal."""
    from scipy.stats import permutation_test

    if not differences_P.any():
        return 1.0
    found = permutation_test(
        (differences_P,),
        np.mean,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        batch=100,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _powers_of_two(most: int) -> Sequence[int]:
    return [2**power for power in range(most.bit_length())]
