"""Intervals of V* cover it, the plug-in's bias is the enumeration's, and what the filter drops is counted right."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.comparisons import CHUNK, bootstrap_interval, delta_interval, drop_probability
from common.value import estimate_vstar, reward_range
from stage1_vstar.uncertainty import (
    Interval,
    approximate_bias,
    binomial_interval,
    interval,
    plugin_bias,
    two_valued_vstar,
)

Floats = NDArray[np.float64]

RATES = np.linspace(0.05, 0.95, 19)
BETAS = [0.0, 5e-324, 1e-6, 1e-3, 0.125, 0.5, 1.0, 7.0, 1e6, 1e300, math.inf]


def drawn(rate_P: Floats, trials: int, seed: int) -> tuple[Floats, NDArray[np.int64]]:
    """Rewards of 0 and 1, and how many each prompt has."""
    draws = np.random.default_rng(seed).random((len(rate_P), trials))
    return (draws < rate_P[:, None]).astype(float).ravel(), np.full(len(rate_P), trials)


def coverage(found: Interval, truth: Floats) -> float:
    # V* of an interval's end and V* of the same p differ in the last digit.
    return float(((found.low_P <= truth + 1e-12) & (truth - 1e-12 <= found.high_P)).mean())


@pytest.mark.parametrize("beta1", [0.125, 0.5, 2.0, math.inf])
@pytest.mark.parametrize("trials", [8, 32])
def test_intervals_cover_v_star_93_to_97_percent_of_the_time(trials: int, beta1: float) -> None:
    rate_P = np.random.default_rng(trials).choice(RATES, 2000)
    found = interval(*drawn(rate_P, trials, seed=1), beta1)
    assert 0.93 <= coverage(found, two_valued_vstar(rate_P, beta1)) <= 0.97


def test_at_32_samples_each_p_that_allows_it_is_covered_93_to_97_percent_of_the_time() -> None:
    low_K, high_K = binomial_interval(np.arange(33), np.full(33, 32), 0.95)
    outside = [rate for rate in RATES if not 0.93 <= exact_coverage(low_K, high_K, rate) <= 0.97]
    assert outside == pytest.approx([0.05, 0.95])
    # There no set of neighbouring counts would do.
    upto = np.concatenate([[0.0], probabilities(32, 0.05).cumsum()])
    between = upto[None, :] - upto[:, None]
    assert not ((between >= 0.93) & (between <= 0.97)).any()


@pytest.mark.parametrize("trials", [1, 2, 3, 4, 8, 32, 128])
def test_no_p_however_small_is_covered_much_less_than_nominally(trials: int) -> None:
    low_K, high_K = binomial_interval(np.arange(trials + 1), np.full(trials + 1, trials), 0.95)
    rates = np.linspace(0.0005, 0.9995, 1999)
    assert min(exact_coverage(low_K, high_K, rate) for rate in rates) > 0.87


def probabilities(trials: int, rate: float) -> Floats:
    return np.array([math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)])


def exact_coverage(low_K: Floats, high_K: Floats, rate: float) -> float:
    return float(probabilities(len(low_K) - 1, rate)[(low_K <= rate) & (rate <= high_K)].sum())


def test_wilsons_interval_is_the_published_one() -> None:
    # 15 of 148, Newcombe (1998), table I, method 3
    low_P, high_P = binomial_interval(np.array([15, 81]), np.array([148, 263]), 0.95)
    assert np.column_stack([low_P, high_P]).round(4).tolist() == [[0.0624, 0.1605], [0.2553, 0.3662]]


REWARDS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "three values": lambda rng, size: rng.choice([0, 0.5, 1], p=[0.6, 0.35, 0.05], size=size),
    "mostly best": lambda rng, size: rng.choice([0, 0.5, 1], p=[0.05, 0.15, 0.8], size=size),
    "continuous": lambda rng, size: rng.beta(0.3, 0.6, size),
    "correct, less a penalty": lambda rng, size: (rng.random(size) < 0.3) - 0.3 * rng.beta(2, 5, size),
    "never more than a half": lambda rng, size: rng.choice([0, 0.5], size=size),
    "always the same": lambda rng, size: np.full(size, -3.0),
    "unbounded": lambda rng, size: rng.normal(size=size),
}


@pytest.mark.parametrize("beta1", [0.125, 0.5, math.inf])
@pytest.mark.parametrize("trials", [8, 32])
@pytest.mark.parametrize("name", REWARDS)
def test_intervals_of_any_rewards_cover_v_star_at_least_nearly_95_percent_of_the_time(
    name: str, trials: int, beta1: float
) -> None:
    rng = np.random.default_rng(2)
    many = REWARDS[name](rng, 1_000_000)
    truth = estimate_vstar(many, np.array([len(many)]), beta1).vstar_P
    found = interval(REWARDS[name](rng, 2000 * trials), np.full(2000, trials), beta1)
    assert coverage(found, truth) > 0.92


@pytest.mark.parametrize("beta1", BETAS)
def test_v_hat_lies_in_its_interval_and_the_interval_in_the_range_of_rewards(beta1: float) -> None:
    rng = np.random.default_rng(3)
    for draw in REWARDS.values():
        counts_P = rng.integers(1, 40, 300)
        rewards_S = draw(rng, counts_P.sum())
        found = interval(rewards_S, counts_P, beta1)
        vstar_P = estimate_vstar(rewards_S, counts_P, beta1).vstar_P
        bottom, top = reward_range(rewards_S)
        assert (bottom - 1e-9 <= found.low_P).all()
        assert (found.low_P <= vstar_P + 1e-9).all()
        assert (vstar_P <= found.high_P + 1e-9).all()
        assert (found.high_P <= top + 1e-9).all()


def test_a_prompts_interval_does_not_depend_on_its_neighbours_unless_they_widen_the_range() -> None:
    counts_P = np.array([3, 2, 4, 1])
    rewards_S = np.array([0.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.25, 1.0, 0.0, 0.0])
    together = interval(rewards_S, counts_P, 0.5)
    parts = np.split(rewards_S, np.cumsum(counts_P)[:-1])
    for place, part in enumerate(parts):
        alone = interval(part, counts_P[place : place + 1], 0.5)
        assert (alone.low_P[0], alone.high_P[0]) == (together.low_P[place], together.high_P[place])
    wide = interval(rewards_S, counts_P, 0.5, limits=(-1.0, 2.0))
    assert (wide.low_P < together.low_P).all()
    assert (wide.high_P > together.high_P).all()
    found = interval(np.concatenate([rewards_S, [-1.0, 2.0]]), np.append(counts_P, 2), 0.5)
    assert found.low_P[:4].tolist() == wide.low_P.tolist()


def test_rewards_of_minus_one_and_one_have_the_interval_of_zero_and_one_stretched() -> None:
    signs_S = np.array([1.0, -1.0, -1.0, 1.0, -1.0, -1.0])
    signed = interval(signs_S, np.array([4, 2]), 1.0)
    plain = interval((signs_S + 1) / 2, np.array([4, 2]), 0.5)
    np.testing.assert_allclose(signed.low_P, 2 * plain.low_P - 1, rtol=1e-14)
    np.testing.assert_allclose(signed.high_P, 2 * plain.high_P - 1, rtol=1e-14)


def test_at_beta1_of_zero_the_interval_goes_from_the_best_seen_to_the_best_possible() -> None:
    found = interval(np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.5]), np.array([2, 2, 2]), 0.0)
    assert found.low_P.tolist() == [1.0, 0.0, 0.5]
    assert found.high_P.tolist() == [1.0, 1.0, 1.0]


def test_equal_rewards_leave_doubt() -> None:
    rewards_S, counts_P = np.array([0.0] * 8 + [0.5] * 8 + [1.0] * 8), np.full(3, 8)
    found = interval(rewards_S, counts_P, 0.5)
    assert found.low_P[0] == 0
    assert found.high_P[2] == 1
    assert (found.high_P - found.low_P > 0.15).all()
    for textbook in (delta_interval, bootstrap_interval):
        nothing = textbook(rewards_S, counts_P, 0.5)
        np.testing.assert_array_equal(nothing.low_P, nothing.high_P)


def test_a_higher_level_gives_a_wider_interval() -> None:
    rewards_S, counts_P = np.array([0.0, 1.0, 0.0, 0.0, 0.2, 0.5, 0.9]), np.array([4, 3])
    narrow, wide = (interval(rewards_S, counts_P, 0.5, level=level) for level in (0.8, 0.99))
    assert (wide.low_P < narrow.low_P).all()
    assert (wide.high_P > narrow.high_P).all()


def test_with_many_samples_all_three_intervals_agree() -> None:
    rng = np.random.default_rng(4)
    rewards_S, counts_P = rng.beta(2, 2, 4 * 2000), np.full(4, 2000)
    intervals = [
        method(rewards_S, counts_P, 0.5) for method in (interval, delta_interval, bootstrap_interval)
    ]
    for found in intervals[1:]:
        width_P = found.high_P - found.low_P
        np.testing.assert_allclose(found.low_P, intervals[0].low_P, atol=0.1 * width_P.max())
        np.testing.assert_allclose(found.high_P, intervals[0].high_P, atol=0.1 * width_P.max())


def test_the_bootstrap_is_seeded_and_takes_prompts_in_chunks() -> None:
    resamples = CHUNK // 6
    rewards_S = np.array([0.0, 1.0, 0.0, 0.25, 0.5, 3.0, 3.0])
    counts_P = np.array([3, 2, 2])
    first, again, other = (
        bootstrap_interval(rewards_S, counts_P, 0.5, resamples=resamples, seed=seed) for seed in (1, 1, 2)
    )
    assert first.high_P.tolist() == again.high_P.tolist()
    # With so many resamples the quantiles are those of the multinomial: certain values here.
    assert (first.low_P.tolist(), first.high_P.tolist()) == (other.low_P.tolist(), other.high_P.tolist())
    assert first.low_P.tolist() == pytest.approx([0.0, 0.25, 3.0])
    assert first.high_P.tolist() == pytest.approx([1.0, 0.5, 3.0])


@pytest.mark.parametrize("beta1", [0.0, 0.05, 0.5, 3.0, math.inf])
@pytest.mark.parametrize("rate", [0.0, 0.03, 0.4, 1.0])
def test_the_plug_ins_bias_is_that_of_all_outcomes_enumerated(rate: float, beta1: float) -> None:
    expected = 0.0
    for rewards in product([0.0, 1.0], repeat=6):
        chance = math.prod(rate if reward else 1 - rate for reward in rewards)
        expected += chance * estimate_vstar(np.array(rewards), np.array([6]), beta1).vstar_P[0]
    found = plugin_bias(np.array([rate]), 6, beta1)
    assert found[0] == pytest.approx(expected - two_valued_vstar(rate, beta1), abs=1e-12)
    assert found[0] <= 1e-15


def test_at_beta1_of_zero_the_bias_is_the_chance_of_missing_every_solution() -> None:
    np.testing.assert_allclose(plugin_bias(RATES, 8, 0.0), -drop_probability(RATES, 8), rtol=1e-12)
    assert drop_probability(0.5, 3) == 0.125


def test_the_approximate_bias_approaches_the_exact_one() -> None:
    rate_P, beta1 = np.array([0.1, 0.5, 0.9]), 0.5
    gain = math.expm1(1 / beta1)
    for trials, tolerance in [(32, 0.08), (512, 0.006)]:
        se_P = beta1 * np.sqrt(rate_P * (1 - rate_P) / trials) * gain / (1 + rate_P * gain)
        np.testing.assert_allclose(
            approximate_bias(se_P, beta1), plugin_bias(rate_P, trials, beta1), rtol=tolerance
        )
    assert approximate_bias(np.array([0.3]), math.inf).tolist() == [0.0]
    assert np.isnan(approximate_bias(np.array([np.nan]), 0.0)).all()


@pytest.mark.parametrize("beta1", BETAS)
def test_v_star_of_two_values_is_the_plug_in_of_a_prompt_with_that_share(beta1: float) -> None:
    for bottom, top in [(0.0, 1.0), (-3.0, 4.5)]:
        for successes in range(6):
            rewards_S = np.array([top] * successes + [bottom] * (5 - successes))
            expected = estimate_vstar(rewards_S, np.array([5]), beta1).vstar_P[0]
            assert two_valued_vstar(successes / 5, beta1, bottom, top) == pytest.approx(expected, abs=1e-13)
