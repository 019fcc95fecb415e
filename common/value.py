"""V̂*(x) = β1 ln (1/N) Σ exp(r_i/β1): Algorithm 1, line 4. Pure numpy, for ragged lists of rewards.

Shapes: _P prompt, _S sample (all prompts' samples, one after the other).
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
T = TypeVar("T", bound=np.generic)


class Ragged:
    """The layout of prompts' samples in one array: `counts_P` of each prompt, at least 1, prompt after prompt."""

    def __init__(self, counts_P: Counts) -> None:
        self.counts_P = counts_P
        self.starts_P = np.cumsum(counts_P) - counts_P

    def sum(self, values_S: NDArray[T]) -> NDArray[T]:
        """Each prompt's sum."""
        return np.add.reduceat(values_S, self.starts_P)

    def mean(self, values_S: Floats) -> Floats:
        """Each prompt's mean."""
        return self.sum(values_S) / self.counts_P

    def max(self, values_S: NDArray[T]) -> NDArray[T]:
        """Each prompt's maximum."""
        return np.maximum.reduceat(values_S, self.starts_P)

    def any(self, values_S: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether any of a prompt's values is true."""
        return np.logical_or.reduceat(values_S, self.starts_P)

    def repeat(self, values_P: NDArray[T]) -> NDArray[T]:
        """Each prompt's value, repeated for each of its samples."""
        return np.repeat(values_P, self.counts_P)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """V̂* of each prompt, and its standard error (nan if it has none)."""

    vstar_P: Floats
    se_P: Floats


def estimate_vstar(rewards_S: Floats, counts_P: Counts, beta1: float) -> Estimate:
    """Estimate V* of each prompt from the rewards of its samples.

    `counts_P` is the number of `rewards_S` that belong to each prompt, in order; at least 1 each. Rewards are any
    finite numbers. `beta1` lies in [0, inf]: 0 gives the best reward (pass@N for 0/1 rewards) and inf the mean, both
    exactly (the paper's Appendix D). In between, the best reward is taken out of the sum first, so that a small β1
    does not overflow, and the rest is computed with expm1 and log1p, so that a large β1 does not cancel digits.

    The standard error is the delta method's, β1 · sd(w) / (mean(w) √N) with w = exp(r/β1). It is nan for N = 1 and for
    β1 = 0, where the method does not apply.
    """
    samples = Ragged(counts_P)
    best_P = samples.max(rewards_S)

    def standard_error(values_S: Floats, mean_P: Floats) -> Floats:
        squares_P = samples.sum((values_S - samples.repeat(mean_P)) ** 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(counts_P > 1, np.sqrt(squares_P / (counts_P - 1.0) / counts_P), np.nan)

    if beta1 == 0:
        return Estimate(vstar_P=best_P, se_P=np.full(len(best_P), np.nan))
    if np.isinf(beta1):
        mean_P = samples.mean(rewards_S)
        return Estimate(vstar_P=mean_P, se_P=standard_error(rewards_S, mean_P))
    with np.errstate(over="ignore"):
        excess_S = np.expm1((rewards_S - samples.repeat(best_P)) / beta1)
    excess_P = samples.mean(excess_S)
    return Estimate(
        vstar_P=best_P + beta1 * np.log1p(excess_P),
        se_P=beta1 * standard_error(excess_S, excess_P) / (1.0 + excess_P),
    )


def reward_range(rewards_S: Floats) -> tuple[float, float]:
    """The assumed range of rewards: from 0 or the least of these to 1 or the greatest."""
    return min(0.0, float(rewards_S.min())), max(1.0, float(rewards_S.max()))
