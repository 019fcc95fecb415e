"""Baselines for stage 1's intervals and shares: textbook intervals, and the truth if p is known.

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _B bootstrap resample.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from common.value import Counts, Floats, estimate_vstar
from stage1_vstar.uncertainty import Interval

CHUNK = 4_000_000
"""Number of resampled rewards that the bootstrap holds at a time."""


def delta_interval(rewards_S: Floats, counts_P: Counts, beta1: float, *, level: float = 0.95) -> Interval:
    """V̂* ± z · standard error, the textbook's interval; nan if there is no standard error.

    Where all samples agree this one has no width.
    """
    found = estimate_vstar(rewards_S, counts_P, beta1)
    reach_P = NormalDist().inv_cdf((1 + level) / 2) * found.se_P
    return Interval(low_P=found.vstar_P - reach_P, high_P=found.vstar_P + reach_P)


def bootstrap_interval(
    rewards_S: Floats,
    counts_P: Counts,
    beta1: float,
    *,
    level: float = 0.95,
    resamples: int = 999,
    seed: int = 0,
) -> Interval:
    """Quantiles of V̂* over resamples of each prompt's rewards (Efron's percentile bootstrap).

    Where all samples agree this one has no width. Prompts are taken in
    chunks of at most CHUNK resampled rewards.
    """
    rng = np.random.default_rng(seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends_P = np.cumsum(counts_P)
    bounds = np.empty((2, len(counts_P)))
    first = 0
    while first < len(counts_P):
        offset = ends_P[first] - counts_P[first]
        last = max(first + 1, int(np.searchsorted(ends_P, offset + CHUNK // resamples, side="right")))
        counts = counts_P[first:last]
        starts_S = np.repeat(np.cumsum(counts) - counts, counts) + offset
        drawn_BS = starts_S + (rng.random((resamples, len(starts_S))) * np.repeat(counts, counts)).astype(
            np.int64
        )
        found = estimate_vstar(rewards_S[drawn_BS.ravel()], np.tile(counts, resamples), beta1)
        bounds[:, first:last] = np.quantile(found.vstar_P.reshape(resamples, -1), tails, axis=0)
        first = last
    return Interval(low_P=bounds[0], high_P=bounds[1])


def drop_probability(pass_rate: ArrayLike, num_samples: int) -> Floats:
    """P(all N samples wrong | p) = (1 − p)^N: how often the pass@N filter drops a prompt of this pass rate."""
    dropped_P: Floats = (1.0 - np.asarray(pass_rate, np.float64)) ** num_samples
    return dropped_P
