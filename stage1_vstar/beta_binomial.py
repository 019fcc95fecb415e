"""Empirical Bayes for rewards of 0 and 1: pass rates follow a Beta(a, b) that is fitted to all prompts together.

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _Q quadrature node, _G group: a
distinct pair (successes, trials); a run has few of them.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.value import Counts, Floats, Ragged

PARAMETER_RANGE = (1e-3, 1e5)
"""Search range of a and b: below it pass rates are 0 or 1, above it all prompts have the same."""

NODES = 601
GROUPS = 1000
"""Groups integrated at a time; a run whose prompts differ in their number of samples may have many."""

REACH = 100.0
"""Range of the quadrature, in standard deviations of logit p; its nodes are densest in the middle."""


@dataclass(frozen=True, slots=True)
class BetaPrior:
    """The distribution of pass rates over prompts: Beta(a, b)."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        return self.a / (self.a + self.b)

    def quantiles(self, many: int) -> Floats:
        """`count` pass rates that represent the distribution with equal weights."""
        from scipy.special import betaincinv

        rates_Q: Floats = betaincinv(self.a, self.b, (np.arange(many) + 0.5) / many)
        return rates_Q


def fit_prior(successes_G: Counts, trials_G: Counts, weights_G: Counts) -> BetaPrior:
    """The maximum-likelihood prior of the counts: Σ w [ln B(a + k, b + n − k) − ln B(a, b)] at its maximum.

    `weights_G` is the number of prompts with `successes_G` correct of `trials_G` samples. Raises UserError unless some
    prompt has two samples: single samples show how often prompts are solved, not how much they differ.
    """
    from scipy.optimize import minimize
    from scipy.special import betaln, psi

    if not (trials_G > 1).any():
        raise UserError(
            "the beta_binomial estimator needs prompts with at least 2 samples to learn how much prompts differ; "
            f"the most that one has here is {trials_G.max(initial=0)}. Draw more, or use the plugin estimator"
        )
    failures_G, prompts = trials_G - successes_G, weights_G.sum()

    def loss(logarithms: Floats) -> tuple[float, Floats]:
        a, b = np.exp(logarithms)
        likelihood = weights_G @ (betaln(a + successes_G, b + failures_G) - betaln(a, b))
        common_G = psi(a + b) - psi(a + b + trials_G)
        slope_a = weights_G @ (psi(a + successes_G) - psi(a) + common_G)
        slope_b = weights_G @ (psi(b + failures_G) - psi(b) + common_G)
        return -likelihood / prompts, -np.array([a * slope_a, b * slope_b]) / prompts

    bounds = [tuple(math.log(end) for end in PARAMETER_RANGE)] * 2
    rate = float(weights_G @ successes_G + 1) / float(weights_G @ trials_G + 2)
    start = np.log([2 * rate, 2 * (1 - rate)])
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}
    found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    a, b = np.exp(found.x)
    return BetaPrior(a=float(a), b=float(b))


def fit_prior_to_rewards(rewards_S: Floats, counts_P: Counts) -> BetaPrior:
    """`fit_prior` for rewards of 0 and 1; `counts_P` of them belong to each prompt, in order."""
    successes_P = Ragged(counts_P).sum(rewards_S).astype(np.int64)
    groups_G2, weights_G = np.unique(np.stack([successes_P, counts_P], axis=1), axis=0, return_counts=True)
    return fit_prior(groups_G2[:, 0], groups_G2[:, 1], weights_G)


def posterior_vstar(
    successes_G: Counts, trials_G: Counts, beta1: float, prior: BetaPrior
) -> tuple[Floats, Floats]:
    """Mean and standard deviation of V*(p) = β1 ln(1 + p (exp(1/β1) − 1)) with p ~ Beta(a + k, b + n − k).

    The mean of V*, not V* at the mean of p: it has the smallest mean squared error of all estimates if the prior is
    right. An infinite `beta1` gives the mean of p. Raises UserError for `beta1` = 0, where V* is 1 for every p > 0:
    the posterior, which never rules out such a p, would say 1 for every prompt.
    """
    if beta1 == 0:
        raise UserError(
            "the beta_binomial estimator says nothing at β1 = 0: a prompt without a correct sample may still have a "
            "pass rate above 0, so each V* would be 1; use the plugin estimator (pass@N), or a β1 above 0"
        )
    a_G: Floats = prior.a + successes_G.astype(np.float64)
    b_G: Floats = prior.b + (trials_G - successes_G).astype(np.float64)
    if np.isinf(beta1):
        mean_G = a_G / (a_G + b_G)
        return mean_G, np.sqrt(mean_G * (1 - mean_G) / (a_G + b_G + 1))
    parts = [
        _integrate(a_G[start : start + GROUPS], b_G[start : start + GROUPS], beta1)
        for start in range(0, len(a_G), GROUPS)
    ]
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([sd for _, sd in parts])


def _integrate(a_G: Floats, b_G: Floats, beta1: float) -> tuple[Floats, Floats]:
    """Mean and standard deviation of V*(p) with p ~ Beta(a, b)."""
    from scipy.special import polygamma

    # Over t = logit p everything is smooth, whatever β1, a and b: V* = β1 [softplus(t + 1/β1) − softplus(t)].
    spread_G = np.sqrt(polygamma(1, a_G) + polygamma(1, b_G))
    core_G = np.minimum(spread_G, 1.0)
    x_GQ = np.arcsinh(REACH * spread_G / core_G)[:, None] * np.linspace(-1, 1, NODES)
    t_GQ = np.log(a_G / b_G)[:, None] + core_G[:, None] * np.sinh(x_GQ)
    log_density_GQ = a_G[:, None] * t_GQ - (a_G + b_G)[:, None] * np.logaddexp(0, t_GQ)
    weights_GQ = np.exp(log_density_GQ - log_density_GQ.max(axis=1, keepdims=True)) * np.cosh(x_GQ)
    weights_GQ /= weights_GQ.sum(axis=1, keepdims=True)
    vstar_GQ = _vstar_of_logit(t_GQ, beta1)
    mean_G = (weights_GQ * vstar_GQ).sum(axis=1).clip(0.0, 1.0)
    return mean_G, np.sqrt((weights_GQ * (vstar_GQ - mean_G[:, None]) ** 2).sum(axis=1))


def _vstar_of_logit(t_GQ: Floats, beta1: float) -> Floats:
    if beta1 > 1:  # the difference of two nearly equal logarithms, computed as one
        inside_GQ: Floats = np.log1p(math.expm1(1 / beta1) / (1 + np.exp(np.minimum(-t_GQ, 700.0))))
        return beta1 * inside_GQ
    scale = max(beta1, 1e-300)  # below it 1/β1 overflows; V* is 1 to the last digit long before
    vstar_GQ: Floats = scale * (np.logaddexp(0, t_GQ + 1 / scale) - np.logaddexp(0, t_GQ))
    return vstar_GQ.clip(0.0, 1.0)


def dropped_share(prior: BetaPrior, num_samples: int, *, solvable_from: float = 0.0) -> float:
    """Share of the prompts with a pass rate ≥ `solvable_from` that the pass@N = 0 filter drops: E[(1 − p)^N | p ≥ q].

    It is B(a, b + N) / B(a, b) · I_{1−q}(b + N, a) / I_{1−q}(b, a), with I the regularised incomplete beta function;
    NaN if the prior has no such prompts.
    """
    from scipy.special import betainc, betaln

    a, b, upper = prior.a, prior.b, 1.0 - solvable_from
    there_are = float(betainc(b, a, upper))
    if not there_are:
        return math.nan
    kept = betainc(b + num_samples, a, upper) / there_are
    return float(np.exp(betaln(a, b + num_samples) - betaln(a, b)) * kept)
