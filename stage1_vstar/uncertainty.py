"""How far V̂* may be from V*: intervals, and the plug-in's bias. See docs/uncertainty.md.

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _K number of successes.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from common.value import Counts, Floats, Ragged, reward_range


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An interval for V* of each prompt."""

    low_P: Floats
    high_P: Floats


def two_valued_vstar(
    pass_rate: ArrayLike, beta1: float, low: ArrayLike = 0.0, high: ArrayLike = 1.0
) -> Floats:
    """V* where the reward is `high` with probability p and else `low`: low + β1 ln(1 + p (exp((high − low)/β1) − 1)).

    It grows with p, so an interval of p is one of V*. `beta1` = 0 gives `high` for p > 0, inf the mean; both exactly.
    """
    p, bottom, top = np.broadcast_arrays(
        np.asarray(pass_rate, np.float64), np.asarray(low, np.float64), np.asarray(high, np.float64)
    )
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        range_in_beta1 = (top - bottom) / beta1
        small = np.log1p(p * np.expm1(np.minimum(range_in_beta1, 500.0)))
        large = np.logaddexp(np.log1p(-p), np.log(p) + range_in_beta1)
        inside = bottom + beta1 * np.where(range_in_beta1 < 500, small, large)
        limit = np.where(p > 0, top, bottom) if beta1 < 1 else bottom + p * (top - bottom)
    return np.where(np.isfinite(range_in_beta1) & (range_in_beta1 > 0), inside, limit)


def interval(
    rewards_S: Floats,
    counts_P: Counts,
    beta1: float,
    *,
    level: float = 0.95,
    limits: tuple[float, float] | None = None,
) -> Interval:
    """An interval that holds V* of a prompt with probability `level`, for each prompt; arguments as `estimate_vstar`.

    If all rewards of a prompt are at the ends of the range of rewards, as 0/1 rewards are, it gets the interval of
    `binomial_interval` mapped to V*; otherwise that of `_bounded_interval`. `limits` is the range, by default
    `reward_range` of these rewards. Pass it if you read a file in parts and rewards lie outside 0 to 1, so that all
    parts use the same range.

    At β1 = 0, V* is the best reward that the policy can give at all. It is at least the best seen, and no number of
    samples shows that nothing better is possible: the interval is [best seen, greatest possible], a point for a
    solved prompt.
    """
    bottom, top = limits or reward_range(rewards_S)
    samples = Ragged(counts_P)
    if beta1 == 0:
        best_P = samples.max(rewards_S)
        return Interval(low_P=best_P, high_P=np.full(len(best_P), top))
    at_top_S = rewards_S == top
    successes_P = samples.sum(at_top_S.astype(np.int64))
    low_P, high_P = binomial_interval(successes_P, counts_P, level)
    low_P, high_P = (two_valued_vstar(rate_P, beta1, bottom, top) for rate_P in (low_P, high_P))
    graded_P = samples.any(~at_top_S & (rewards_S != bottom))
    if graded_P.any():
        graded_S = samples.repeat(graded_P)
        low_P[graded_P], high_P[graded_P] = _bounded_interval(
            rewards_S[graded_S], counts_P[graded_P], beta1, level, bottom, top
        )
    return Interval(low_P=low_P, high_P=high_P)


def binomial_interval(successes_P: Counts, trials_P: Counts, level: float) -> tuple[Floats, Floats]:
    """Wilson's interval of p, with the exact bound where all samples but one agree.

    Wilson's lower bound for a single success is too high: for p just below it, coverage is 83 %. The bound used there
    is the p at which `level` of all prompts have no success, as Brown, Cai and DasGupta (2001) do with Poisson's
    distribution; likewise for a single failure.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate_P = successes_P / trials_P
    centre_P = rate_P + z * z / (2 * trials_P)
    half_P = z * np.sqrt(rate_P * (1 - rate_P) / trials_P + (z / (2 * trials_P)) ** 2)
    low_P, high_P = ((centre_P + side * half_P) / (1 + z * z / trials_P) for side in (-1, 1))
    rare_P = -np.expm1(np.log(level) / trials_P)
    low_P = np.where(successes_P == 1, np.minimum(low_P, rare_P), low_P)
    high_P = np.where(successes_P == trials_P - 1, np.maximum(high_P, 1 - rare_P), high_P)
    return np.where(successes_P == 0, 0.0, low_P), np.where(successes_P == trials_P, 1.0, high_P)


def _bounded_interval(
    rewards_S: Floats, counts_P: Counts, beta1: float, level: float, bottom: float, top: float
) -> tuple[Floats, Floats]:
    """Quantiles of V* under the Bayesian bootstrap, in closed form, with half a sample added at the far end.

    The Bayesian bootstrap (Rubin, 1981) weights a prompt's samples by a Dirichlet(1, …, 1). Alone it never goes beyond
    the observed rewards: eight equal rewards would give an interval of width 0. So the upper bound adds a weight of ½
    at the greatest possible reward, and the lower bound one at the least. The quantile of the weighted mean of
    exp(r/β1) is taken from the Beta distribution with the same mean and variance.
    """
    from scipy.special import betaincinv

    samples = Ragged(counts_P)
    best_P = samples.max(rewards_S)

    def bound(top_P: Floats, half_at_top: float, quantile: float) -> Floats:
        share_S = _share(rewards_S, samples.repeat(top_P), beta1, bottom)
        weight_P = counts_P + 0.5
        mean_P = (samples.sum(share_S) + half_at_top) / weight_P
        square_P = (samples.sum(share_S**2) + half_at_top) / weight_P
        with np.errstate(divide="ignore", invalid="ignore"):
            precision_P = mean_P * (1 - mean_P) * (weight_P + 1) / (square_P - mean_P**2) - 1
            rate_P = betaincinv(mean_P * precision_P, (1 - mean_P) * precision_P, quantile)
        rate_P = np.where(top_P > bottom, rate_P, 0.0)
        return two_valued_vstar(rate_P, beta1, bottom, top_P)

    tail = (1 - level) / 2
    return bound(best_P, 0.0, tail), bound(np.full(len(best_P), top), 0.5, 1 - tail)


def _share(rewards_S: Floats, top_S: Floats, beta1: float, bottom: float) -> Floats:
    """exp(r/β1) as a share of the way from the least to the greatest: 0 at `bottom`, 1 at `top_S`."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if np.isinf(beta1):
            share_S = (rewards_S - bottom) / (top_S - bottom)
        else:
            length_S = np.expm1((bottom - top_S) / beta1)
            share_S = 1 - np.expm1((rewards_S - top_S) / beta1) / length_S
    return np.where(top_S > bottom, share_S, 0.0)


LOWEST_RATE = 1e-100
"""SciPy's binomial distribution overflows at rates of 1e-308, which a prior has if nothing is ever solved."""


def plugin_bias(pass_rate: ArrayLike, num_samples: int, beta1: float) -> Floats:
    """E[V̂*] − V* of the plug-in for 0/1 rewards of pass rate p and N samples, exactly: a sum over the binomial.

    Never positive, by Jensen's inequality; 0 for β1 = inf, and −(1 − p)^N, the chance of missing pass@N, for β1 = 0.
    """
    from scipy.stats import binom

    rate_P = np.asarray(pass_rate, np.float64)
    rate_P = np.where(rate_P < LOWEST_RATE, 0.0, rate_P)
    successes_K = np.arange(num_samples + 1)
    truth_P = two_valued_vstar(rate_P, beta1)
    errors_PK = two_valued_vstar(successes_K / num_samples, beta1) - truth_P[..., None]
    bias_P: Floats = (binom.pmf(successes_K, num_samples, rate_P[..., None]) * errors_PK).sum(axis=-1)
    return bias_P


def approximate_bias(se_P: Floats, beta1: float) -> Floats:
    """The plug-in's bias for any rewards, to the order of 1/N: −se² / (2 β1), with the delta method's standard error.

    From ln(1 + x) ≈ x − x²/2 with x = mean(w)/E[w] − 1 and w = exp(r/β1): E[V̂*] − V* ≈ −β1 Var(w) / (2 N E[w]²).
    For β1 = 0 there is no such order (nan).
    """
    return -(se_P**2) / (2 * beta1) if beta1 > 0 else np.full(len(se_P), np.nan)
