"""V̂* and its standard error against 60-digit arithmetic, at both ends of β1 and everywhere between."""

import math
from collections.abc import Sequence
from itertools import pairwise

import mpmath
import numpy as np
import pytest

from common.errors import UserError
from common.value import Estimate, Ragged, estimate_vstar
from common.vstar_file import ESTIMATORS
from stage1_vstar.estimator import estimate as estimate_by

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


def jackknife(prompts: Sequence[list[float]], beta1: float) -> Estimate:
    return estimate_by(
        np.array([reward for rewards in prompts for reward in rewards]),
        np.array([len(rewards) for rewards in prompts]),
        beta1,
        estimator="jackknife",
    )


@pytest.mark.parametrize("beta1", BETAS)
def test_the_jackknife_equals_its_definition_in_sixty_digits(beta1: float) -> None:
    found = jackknife(list(PROMPTS.values()), beta1)
    for place, (name, rewards) in enumerate(PROMPTS.items()):
        samples, plugin = len(rewards), exact(rewards, beta1)[0]
        if samples == 1:
            assert found.vstar_P[place] == rewards[0]
            assert math.isnan(found.se_P[place])
            continue
        # Equal rewards leave equal estimates behind.
        without = {reward: exact(left_out(rewards, reward), beta1)[0] for reward in set(rewards)}
        with mpmath.workdps(60):
            mean = mpmath.fsum(without[reward] for reward in rewards) / samples
            corrected = samples * plugin - (samples - 1) * mean
            squares = mpmath.fsum((without[reward] - mean) ** 2 for reward in rewards)
            error = mpmath.sqrt(squares * (samples - 1) / samples)
        scale = max(map(abs, rewards)) or 1.0
        expected = min(corrected, max(rewards))
        assert abs(found.vstar_P[place] - expected) <= 2e-15 * samples * scale, name
        assert abs(found.se_P[place] - error) <= 1e-12 * error + 2e-15 * samples * scale, name


def left_out(rewards: list[float], reward: float) -> list[float]:
    place = rewards.index(reward)
    return rewards[:place] + rewards[place + 1 :]


def test_the_jackknife_of_a_mean_is_the_mean_and_of_the_best_reward_the_best() -> None:
    prompts = list(PROMPTS.values())
    for beta1 in (0.0, math.inf):
        found, plugin = jackknife(prompts, beta1), estimate(prompts, beta1)
        assert found.vstar_P.tolist() == plugin.vstar_P.tolist()
        np.testing.assert_array_equal(found.se_P, plugin.se_P)


def test_the_jackknife_of_one_success_in_two_by_hand() -> None:
    # 2 V̂* − mean(0, 1) = 2 β1 ln((1 + e^{1/β1})/2) − 1/2, for β1 = 1
    found = jackknife([[1.0, 0.0]], 1.0)
    assert found.vstar_P[0] == pytest.approx(2 * math.log((1 + math.e) / 2) - 0.5, rel=1e-14)
    assert found.se_P[0] == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("beta1", [5e-324, 1e-3, 0.125, 1.0, 1e300])
def test_the_jackknife_lies_between_the_plug_in_and_the_best_reward(beta1: float) -> None:
    rng = np.random.default_rng(5)
    counts_P = rng.integers(1, 20, 300)
    for rewards_S in (rng.normal(size=counts_P.sum()), (rng.random(counts_P.sum()) < 0.2).astype(float)):
        found = estimate_by(rewards_S, counts_P, beta1, estimator="jackknife").vstar_P
        best_P = np.maximum.reduceat(rewards_S, np.cumsum(counts_P) - counts_P)
        assert (found >= estimate_vstar(rewards_S, counts_P, beta1).vstar_P).all()
        assert (found <= best_P).all()


def test_with_many_samples_all_estimators_agree() -> None:
    rng = np.random.default_rng(6)
    rate_P = rng.uniform(0.1, 0.9, 50)
    rewards_S = (rng.random((50, 20_000)) < rate_P[:, None]).astype(float).ravel()
    found = [estimate_by(rewards_S, np.full(50, 20_000), 0.5, estimator=name) for name in ESTIMATORS]
    for other in found[1:]:
        np.testing.assert_allclose(other.vstar_P, found[0].vstar_P, atol=5e-4)
        np.testing.assert_allclose(other.se_P, found[0].se_P, rtol=0.02)


def test_at_few_samples_the_other_estimators_are_less_biased_than_the_plug_in() -> None:
    rng = np.random.default_rng(7)
    rate_P = rng.random(20_000)
    rewards_S = (rng.random((20_000, 8)) < rate_P[:, None]).astype(float).ravel()
    truth_P = 0.5 * np.log1p(rate_P * math.expm1(2))
    plugin, *others = (
        abs((estimate_by(rewards_S, np.full(20_000, 8), 0.5, estimator=name).vstar_P - truth_P).mean())
        for name in ESTIMATORS
    )
    assert max(others) < plugin / 3


def test_the_default_estimator_is_the_papers() -> None:
    rewards_S, counts_P = np.array([0.0, 1.0, 0.3]), np.array([2, 1])
    assert estimate_by(rewards_S, counts_P, 0.5).vstar_P.tolist() == (
        estimate_vstar(rewards_S, counts_P, 0.5).vstar_P.tolist()
    )


@pytest.mark.parametrize(
    ("estimator", "rewards", "beta1", "words"),
    [
        ("bayes", [0.0, 1.0], 0.5, "no estimator bayes; choose one of plugin, jackknife, beta_binomial"),
        ("beta_binomial", [0.0, 0.5], 0.5, "rewards of 0 and 1, found 0.5"),
        ("beta_binomial", [0.0, 1.0], 0.0, "says nothing at β1 = 0"),
    ],
)
def test_what_an_estimator_is_not_for_is_refused(
    estimator: str, rewards: list[float], beta1: float, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        estimate_by(np.array(rewards), np.array([2]), beta1, estimator=estimator)


def test_figures_of_ragged_samples_are_those_of_each_prompt_alone() -> None:
    parts = [np.array([0.25]), np.array([1.0, -2.0, 4.0]), np.array([0.5, 0.5])]
    ragged, values_S = Ragged(np.array([1, 3, 2])), np.concatenate(parts)
    assert ragged.starts_P.tolist() == [0, 1, 4]
    assert ragged.sum(values_S).tolist() == [part.sum() for part in parts]
    assert ragged.mean(values_S).tolist() == [part.mean() for part in parts]
    assert ragged.max(values_S).tolist() == [part.max() for part in parts]
    assert ragged.any(values_S < 0).tolist() == [False, True, False]
    assert ragged.repeat(np.array([7, 8, 9])).tolist() == [7, 8, 8, 8, 9, 9]
