"""The fitted prior is the one that made the data, the posterior's V* the integral's, the dropped share the count's."""

import math

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.comparisons import drop_probability
from common.errors import UserError
from stage1_vstar.beta_binomial import (
    GROUPS,
    PARAMETER_RANGE,
    BetaPrior,
    dropped_share,
    fit_prior,
    posterior_vstar,
)
from stage1_vstar.estimator import estimate
from stage1_vstar.uncertainty import two_valued_vstar

Counts = NDArray[np.int64]


def fitted(successes_P: Counts, trials_P: Counts) -> BetaPrior:
    pairs, weights = np.unique(np.column_stack([successes_P, trials_P]), axis=0, return_counts=True)
    return fit_prior(pairs[:, 0], pairs[:, 1], weights)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.3), (1.0, 1.0), (8.0, 1.0), (0.2, 3.0), (20.0, 30.0)])
def test_the_fit_recovers_the_prior_that_made_the_data(a: float, b: float) -> None:
    rng = np.random.default_rng(0)
    trials_P = rng.choice([4, 8, 16], 50_000)
    found = fitted(rng.binomial(trials_P, rng.beta(a, b, 50_000)), trials_P)
    assert (found.a, found.b) == pytest.approx((a, b), rel=0.08)
    assert found.mean == pytest.approx(a / (a + b), rel=0.01)


def test_no_other_prior_makes_the_data_likelier() -> None:
    successes_G, trials_G, weights_G = np.array([0, 1, 2, 3]), np.full(4, 3), np.array([10, 5, 4, 9])
    found = fit_prior(successes_G, trials_G, weights_G)

    def likelihood(a: float, b: float) -> float:
        logarithms = [
            mpmath.log(mpmath.beta(a + int(k), b + int(n - k)) / mpmath.beta(a, b))
            for k, n in zip(successes_G, trials_G, strict=True)
        ]
        return float(sum(int(weight) * each for weight, each in zip(weights_G, logarithms, strict=True)))

    best = likelihood(found.a, found.b)
    for a, b in [(1.02, 1.0), (0.98, 1.0), (1.0, 1.02), (1.0, 0.98), (1.02, 1.02)]:
        assert likelihood(found.a * a, found.b * b) < best


def test_a_group_counts_as_often_as_it_weighs() -> None:
    apart = fit_prior(np.array([0, 0, 2, 3]), np.full(4, 4), np.array([3, 4, 2, 5]))
    together = fit_prior(np.array([0, 2, 3]), np.full(3, 4), np.array([7, 2, 5]))
    assert (apart.a, apart.b) == pytest.approx((together.a, together.b), rel=1e-5)


@pytest.mark.parametrize(
    ("successes", "mean"), [([0, 0, 0], 0.0), ([8, 8, 8], 1.0), ([4, 4, 4], 0.5), ([0, 0, 8], 1 / 3)]
)
def test_prompts_that_are_all_alike_or_all_or_nothing_have_a_prior_within_bounds(
    successes: list[int], mean: float
) -> None:
    found = fitted(np.array(successes), np.full(3, 8))
    assert found.mean == pytest.approx(mean, abs=0.02)
    assert PARAMETER_RANGE[0] * 0.999 <= found.a <= PARAMETER_RANGE[1] * 1.001
    assert PARAMETER_RANGE[0] * 0.999 <= found.b <= PARAMETER_RANGE[1] * 1.001


def test_one_sample_a_prompt_cannot_say_how_much_prompts_differ() -> None:
    with pytest.raises(UserError, match="at least 2 samples"):
        fit_prior(np.array([0, 1]), np.array([1, 1]), np.array([5, 5]))


@pytest.mark.parametrize("beta1", [0.125, 0.5, 1.0, 3.0, 1e3])
@pytest.mark.parametrize(("a", "b"), [(0.05, 8.0), (0.3, 0.3), (5.0, 3.3), (90.0, 12.0)])
def test_the_posteriors_mean_and_spread_of_v_star_are_the_integrals(a: float, b: float, beta1: float) -> None:
    from scipy.special import roots_jacobi

    found = posterior_vstar(np.array([0, 3, 8]), np.full(3, 8), beta1, BetaPrior(a, b))
    for place, successes in enumerate([0, 3, 8]):
        # Gauss's rule for the weight p^(a − 1) (1 − p)^(b − 1)
        nodes, weights = roots_jacobi(400, b + 7 - successes, a + successes - 1)
        vstar = two_valued_vstar((1 + nodes) / 2, beta1)
        mean = weights @ vstar / weights.sum()
        square = weights @ (vstar - mean) ** 2 / weights.sum()
        assert found[0][place] == pytest.approx(mean, abs=1e-9)
        assert found[1][place] == pytest.approx(math.sqrt(square), abs=1e-9)


def test_the_limits_in_beta1_are_the_posteriors_mean_and_refusal() -> None:
    successes_G, trials_G, prior = np.array([0, 2, 4]), np.full(3, 4), BetaPrior(0.5, 1.5)
    mean_G, sd_G = posterior_vstar(successes_G, trials_G, math.inf, prior)
    assert mean_G.tolist() == pytest.approx([0.5 / 6, 2.5 / 6, 4.5 / 6])
    near = posterior_vstar(successes_G, trials_G, 1e7, prior)
    np.testing.assert_allclose(near, [mean_G, sd_G], rtol=1e-6)
    assert posterior_vstar(successes_G, trials_G, 1e-6, prior)[0][1:] == pytest.approx([1, 1], abs=1e-4)
    with pytest.raises(UserError, match="β1 = 0"):
        posterior_vstar(successes_G, trials_G, 0.0, prior)


@pytest.mark.parametrize("beta1", [5e-324, 1e-12, 0.01, 1.0, 1e12, 1e300])
def test_the_posteriors_v_star_lies_between_zero_and_one_and_grows_with_successes(beta1: float) -> None:
    for prior in (BetaPrior(1e-3, 1e-3), BetaPrior(0.3, 2.0), BetaPrior(1e5, 1e5)):
        mean_G, sd_G = posterior_vstar(np.arange(9), np.full(9, 8), beta1, prior)
        assert ((mean_G >= 0) & (mean_G <= 1)).all()
        assert (np.diff(mean_G) >= -1e-12).all()
        assert (np.isfinite(sd_G) & (sd_G >= 0)).all()


def test_the_mean_of_v_star_is_below_v_star_of_the_mean_and_closer_to_the_truth() -> None:
    rng = np.random.default_rng(1)
    prior, beta1 = BetaPrior(0.3, 2.0), 0.125
    rate_P = rng.beta(prior.a, prior.b, 20_000)
    successes_P = rng.binomial(8, rate_P)
    mean_G, sd_G = posterior_vstar(np.arange(9), np.full(9, 8), beta1, prior)
    mean_P, sd_P = mean_G[successes_P], sd_G[successes_P]
    at_mean_P = two_valued_vstar((prior.a + successes_P) / (prior.a + prior.b + 8), beta1)
    truth_P = two_valued_vstar(rate_P, beta1)
    assert (mean_P < at_mean_P).all()
    error, other = mean_P - truth_P, at_mean_P - truth_P
    assert (error**2).mean() < 0.8 * (other**2).mean()
    assert abs(error.mean()) < 0.01 < abs(other.mean())
    assert (error**2).mean() == pytest.approx((sd_P**2).mean(), rel=0.03)


@pytest.mark.parametrize("solvable_from", [0.0, 0.05, 0.3])
def test_the_dropped_share_is_that_of_simulated_prompts(solvable_from: float) -> None:
    prior = BetaPrior(0.3, 0.9)
    rate_P = np.random.default_rng(2).beta(prior.a, prior.b, 1_000_000)
    expected = drop_probability(rate_P[rate_P >= solvable_from], 8).mean()
    found = dropped_share(prior, 8, solvable_from=solvable_from)
    assert found == pytest.approx(expected, rel=0.01)


def test_under_a_uniform_prior_one_in_n_plus_one_is_dropped() -> None:
    assert dropped_share(BetaPrior(1.0, 1.0), 8) == pytest.approx(1 / 9, rel=1e-13)


def test_a_batch_given_the_runs_prior_has_the_runs_estimates() -> None:
    rng = np.random.default_rng(3)
    counts_P = rng.integers(1, 12, 500)
    rewards_S = (rng.random(counts_P.sum()) < np.repeat(rng.random(500), counts_P)).astype(float)
    starts_P = np.cumsum(counts_P) - counts_P
    prior = fitted(np.add.reduceat(rewards_S, starts_P).astype(np.int64), counts_P)
    whole = estimate(rewards_S, counts_P, 0.5, estimator="beta_binomial")
    first = estimate(rewards_S[: starts_P[100]], counts_P[:100], 0.5, estimator="beta_binomial", prior=prior)
    np.testing.assert_allclose(first.vstar_P, whole.vstar_P[:100], rtol=1e-5)
    np.testing.assert_allclose(first.se_P, whole.se_P[:100], rtol=1e-5)


def test_many_groups_have_the_estimates_that_each_has_alone() -> None:
    successes_G, trials_G = np.divmod(np.arange(GROUPS + 300), 50)
    trials_G += successes_G
    together = posterior_vstar(successes_G, trials_G, 0.5, BetaPrior(0.5, 2.0))
    for place in (0, GROUPS - 1, GROUPS, GROUPS + 299):
        here = slice(place, place + 1)
        alone = posterior_vstar(successes_G[here], trials_G[here], 0.5, BetaPrior(0.5, 2.0))
        assert (alone[0][0], alone[1][0]) == pytest.approx(
            (together[0][place], together[1][place]), rel=1e-12
        )
