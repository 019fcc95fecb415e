"""V̂*(x) = β1 ln (1/N) Σ exp(r_i/β1): Algorithm 1, line 4. Pure numpy, for ragged lists of rewards.

The paper's estimator is the default. Two others are less biased; docs/uncertainty.md compares them.

Shapes: _P prompt, _S sample (all prompts' samples, one after the other), _R prompt with at least two samples.
"""

import numpy as np

from common.errors import UserError
from common.value import Counts, Estimate, Floats, Ragged, estimate_vstar
from common.vstar_file import known_estimator
from stage1_vstar.beta_binomial import BetaPrior, fit_prior, posterior_vstar


def estimate(
    rewards_S: Floats,
    counts_P: Counts,
    beta1: float,
    *,
    estimator: str = "plugin",
    prior: BetaPrior | None = None,
) -> Estimate:
    """Estimate V* of each prompt by one of ESTIMATORS; the arguments are those of `estimate_vstar`.

    `prior` is for beta_binomial: the distribution of pass rates over all prompts of the run, if these are only some of
    them. Without it, it is fitted to these. Raises UserError for an unknown name, and for rewards that the estimator
    cannot use.
    """
    assert prior is None or estimator == "beta_binomial", f"{estimator} knows no prior"
    if known_estimator(estimator) == "plugin":
        return estimate_vstar(rewards_S, counts_P, beta1)
    if estimator == "jackknife":
        return _jackknife(rewards_S, counts_P, beta1)
    return _beta_binomial(rewards_S, counts_P, beta1, prior)


def _jackknife(rewards_S: Floats, counts_P: Counts, beta1: float) -> Estimate:
    """N V̂* − (N − 1) · mean of the V̂* that leave one sample out (Quenouille), with Tukey's standard error.

    It removes the plug-in's bias of order 1/N. It is never below the plug-in, since the logarithm is concave. With few
    samples and a small β1 it could exceed the best reward, and is clipped there. It equals the plug-in for a single
    sample, which leaves nothing out; for β1 = inf, since the jackknife of a mean is the mean; and for β1 = 0, where it
    is clipped to the best reward.
    """
    plugin = estimate_vstar(rewards_S, counts_P, beta1)
    several_P = counts_P > 1
    if beta1 == 0 or np.isinf(beta1) or not several_P.any():
        return plugin
    rewards_S, counts_R = rewards_S[np.repeat(several_P, counts_P)], counts_P[several_P]
    samples = Ragged(counts_R)
    best_R = samples.max(rewards_S)
    gaps_S = rewards_S - samples.repeat(best_R)
    with np.errstate(over="ignore"):
        excess_S = np.expm1(gaps_S / beta1)
    others_S = samples.repeat(samples.sum(excess_S)) - excess_S
    # Without the best sample the next best dominates the sum: these terms are recomputed, the others subtracted.
    leaders = np.flatnonzero(gaps_S == 0)
    leader_R = leaders[np.searchsorted(leaders, samples.starts_P)]
    others_S[leader_R] = 0.0
    left_out_S = beta1 * np.log1p(others_S / samples.repeat(counts_R - 1.0))
    left_out_S[leader_R] = estimate_vstar(np.delete(gaps_S, leader_R), counts_R - 1, beta1).vstar_P

    whole_R = plugin.vstar_P[several_P]
    mean_R = samples.mean(left_out_S)
    squares_R = samples.sum((left_out_S - samples.repeat(mean_R)) ** 2)
    corrected_R = whole_R + (counts_R - 1) * (whole_R - best_R - mean_R)
    vstar_P, se_P = plugin.vstar_P.copy(), plugin.se_P.copy()
    vstar_P[several_P] = np.clip(corrected_R, whole_R, best_R)
    se_P[several_P] = np.sqrt(squares_R * (counts_R - 1.0) / counts_R)
    return Estimate(vstar_P=vstar_P, se_P=se_P)


def _beta_binomial(rewards_S: Floats, counts_P: Counts, beta1: float, prior: BetaPrior | None) -> Estimate:
    """The posterior mean and standard deviation of V*, see `posterior_vstar`; strictly between 0 and 1."""
    graded_S = rewards_S[(rewards_S != 0) & (rewards_S != 1)]
    if len(graded_S):
        raise UserError(
            f"the beta_binomial estimator needs rewards of 0 and 1, found {graded_S[0]:g}; "
            "use the plugin or the jackknife estimator"
        )
    successes_P = Ragged(counts_P).sum(rewards_S).astype(np.int64)
    base = int(counts_P.max()) + 1
    pairs_G, group_P, weights_G = np.unique(
        counts_P * base + successes_P, return_inverse=True, return_counts=True
    )
    trials_G, successes_G = np.divmod(pairs_G, base)
    if prior is None:
        prior = fit_prior(successes_G, trials_G, weights_G)
    mean_G, sd_G = posterior_vstar(successes_G, trials_G, beta1, prior)
    return Estimate(vstar_P=mean_G[group_P], se_P=sd_G[group_P])
