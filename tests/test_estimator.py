"""V̂* and its standard error against 60-digit arithmetic, at both ends of β1 and everywhere between."""

import math
from collections.abc import Sequence
from itertools import pairwise

import mpmath
import numpy as np
import pytest

from stage1_vstar.estimator import Estimate, estimate_vstar

BETAS = [1e-6, 1e-4, 0.0014, 0.03, 0.5, 1.0, 7.0, 1e3, 1e6]
PROMPTS: dict[str, list[float]] = {
    "one sample, wrong": [0.0],
    "one sample, far from 0": [-1e6],
    "none correct": [0.0] * 8,
    "all correct": [1.0] * 8,
    "some correct": [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    "two samples": [1.0, 0.0],
    "negative": [-0.5, -3.25, -1e3, -0.5],
    "large": [1e6, 999_999.5, 1e6 - 2.0, 12.0],
    "of both signs": [-7.5, 0.1, 1e-9, 42.0, 3.0, -1e6],
    "close together": [1.0, 1.0 + 1e-12, 1.0 - 1e-12],
    "many": [float(index % 17) / 16 for index in range(1000)],
}


def estimate(prompts: Sequence[list[float]], beta1: float) -> Estimate:
    return estimate_vstar(
        np.array([reward for rewards in prompts for reward in rewards]),
        np.array([len(rewards) for rewards in prompts]),
        beta1,
    )


def exact(rewards: list[float], beta1: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """Algorithm 1's V̂* and the delta method's standard error of it, straight from their definitions."""
    with mpmath.workdps(60):
        weights = [mpmath.exp(mpmath.mpf(reward) / mpmath.mpf(beta1)) for reward in rewards]
        mean = mpmath.fsum(weights) / len(rewards)
        vstar = mpmath.mpf(beta1) * mpmath.log(mean)
        if len(rewards) == 1:
            return vstar, mpmath.nan
        variance = mpmath.fsum((weight - mean) ** 2 for weight in weights) / (len(rewards) - 1)
        return vstar, mpmath.mpf(beta1) * mpmath.sqrt(variance / len(rewards)) / mean


@pytest.mark.parametrize("beta1", BETAS)
def test_vstar_equals_the_definition_in_sixty_digits(beta1: float) -> None:
    estimates = estimate(list(PROMPTS.values()), beta1).vstar_P
    for (name, rewards), found in zip(PROMPTS.items(), estimates, strict=True):
        expected = exact(rewards, beta1)[0]
        scale = max(map(abs, rewards)) or 1.0
        assert abs(found - expected) <= 4e-15 * scale, name


@pytest.mark.parametrize("beta1", BETAS)
def test_the_standard_error_equals_the_delta_method_in_sixty_digits(beta1: float) -> None:
    estimates = estimate(list(PROMPTS.values()), beta1).se_P
    for (name, rewards), found in zip(PROMPTS.items(), estimates, strict=True):
        expected = exact(rewards, beta1)[1]
        if len(rewards) == 1:
            assert math.isnan(found), name
        else:
            # Differences of rewards carry the rounding of the rewards themselves.
            rounding = 1e-15 * max(map(abs, rewards))
            assert abs(found - expected) <= 1e-12 * expected + rounding, name


def test_beta1_of_zero_is_exactly_the_best_reward() -> None:
    found = estimate(list(PROMPTS.values()), 0.0)
    assert found.vstar_P.tolist() == [max(rewards) for rewards in PROMPTS.values()]
    assert np.isnan(found.se_P).all()


def test_beta1_of_zero_is_pass_at_n_for_rewards_of_zero_and_one() -> None:
    prompts = [[0.0, 0.0, 1.0], [0.0, 0.0], [1.0]]
    assert estimate(prompts, 0.0).vstar_P.tolist() == [1.0, 0.0, 1.0]


def test_infinite_beta1_is_exactly_the_mean_reward() -> None:
    prompts = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [5.0], [-2.0, 2.0], [1e6, 1e6 + 2.0]]
    assert estimate(prompts, math.inf).vstar_P.tolist() == [1 / 3, 0.25, 5.0, 0.0, 1e6 + 1.0]


def test_at_infinite_beta1_the_standard_error_is_that_of_the_mean() -> None:
    found = estimate([[1.0, 0.0, 0.0, 0.0], [3.0]], math.inf).se_P
    assert found[0] == pytest.approx(math.sqrt(0.1875 * 4 / 3 / 4), rel=1e-15)
    assert math.isnan(found[1])


@pytest.mark.parametrize("beta1", [5e-324, 1e-300, 1e-12, 1e12, 1e300, 1.7e308])
def test_extreme_beta1_neither_overflows_nor_leaves_the_range_from_mean_to_best(beta1: float) -> None:
    prompts = [[0.0, 1.0, 1.0, 0.0, 0.0], [-1e3, 1e3], [3.0]]
    found = estimate(prompts, beta1).vstar_P
    limit = estimate(prompts, 0.0 if beta1 < 1 else math.inf).vstar_P
    np.testing.assert_allclose(found, limit, rtol=1e-12, atol=1e-6)


def test_vstar_falls_from_the_best_reward_to_the_mean_as_beta1_grows() -> None:
    prompts = [rewards for rewards in PROMPTS.values() if len(set(rewards)) > 1 and max(rewards) < 100]
    estimates = [estimate(prompts, beta1).vstar_P for beta1 in [0.0, *BETAS, math.inf]]
    for smaller, larger in pairwise(estimates):
        assert (larger <= smaller + 1e-9).all()
    assert (estimates[0] > estimates[-1]).all()


def test_a_prompts_estimate_does_not_depend_on_its_neighbours() -> None:
    prompts = list(PROMPTS.values())
    together = estimate(prompts, 0.5)
    alone = [estimate([rewards], 0.5) for rewards in prompts]
    assert together.vstar_P.tolist() == [each.vstar_P[0] for each in alone]
    np.testing.assert_array_equal(together.se_P, [each.se_P[0] for each in alone])


def test_the_standard_error_is_the_spread_that_repeated_sampling_shows() -> None:
    rng = np.random.default_rng(0)
    repeats, samples, beta1 = 4000, 64, 0.5
    rewards = (rng.random((repeats, samples)) < 0.3).astype(float)
    found = estimate(rewards.tolist(), beta1)
    assert found.se_P.mean() == pytest.approx(found.vstar_P.std(ddof=1), rel=0.05)
