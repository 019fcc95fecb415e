"""The figures of a critic against cases worked out by hand and against their definitions."""

import numpy as np
import polars as pl
import pytest

from stage2_train.critic_job.figures import (
    NONE_WRONG,
    best_threshold,
    calibration,
    first_wrong_step,
    labelled_solutions,
)


def logit(values: list[float]) -> np.ndarray:
    share = np.array(values)
    return np.asarray(np.log(share / (1 - share)))


def test_calibration_of_a_case_worked_out_by_hand() -> None:
    found = calibration(
        logit([0.15, 0.15, 0.85, 0.85]), np.array([0.0, 0.5, 0.5, 1.0]), np.array([0.0, 0.1, 0.2, np.nan])
    )
    assert found.states == 4
    assert found.brier == pytest.approx((0.15**2 + 0.35**2) / 2)
    assert found.brier_constant == pytest.approx(0.125)
    assert found.brier_perfect == pytest.approx(0.1)
    assert found.calibration_error == pytest.approx(0.1)
    entropies = [-np.log(0.85), -np.log(0.85 * 0.15) / 2]
    assert found.cross_entropy == pytest.approx(sum(entropies) / 2)
    assert found.pearson == pytest.approx(1 / 2**0.5)
    assert [(each.states, each.monte_carlo) for each in found.bins] == [(2, 0.25), (2, 0.75)]
    assert [each.predicted for each in found.bins] == pytest.approx([0.15, 0.85])


def test_spearman_is_the_correlation_of_ranks() -> None:
    found = calibration(logit([0.1, 0.2, 0.9, 0.3]), np.array([0.0, 0.25, 1.0, 0.5]), np.zeros(4))
    assert found.spearman == pytest.approx(1)
    assert found.pearson is not None
    assert found.pearson < 1


def test_correlations_of_equal_values_have_no_meaning() -> None:
    found = calibration(logit([0.5, 0.5]), np.array([0.0, 1.0]), np.full(2, np.nan))
    assert found.pearson is found.spearman is found.brier_perfect is None


def test_a_critic_that_knows_every_value_has_the_brier_score_of_a_perfect_one() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(0.05, 0.95, 20_000)
    rewards = rng.random((20_000, 16)) < true[:, None]
    found = calibration(logit(true.tolist()), rewards.mean(1), rewards.var(1, ddof=1) / 16)
    assert found.brier == pytest.approx(found.brier_perfect, rel=0.02)
    assert found.brier == pytest.approx(float(np.mean(true * (1 - true) / 16)), rel=0.02)
    assert found.calibration_error < 0.01


VALUES = [[0.9, 0.4, 0.1], [0.9, 0.8], [0.7, 0.2, 0.6], [0.9, 0.6], [0.3]]
LABELS = [1, NONE_WRONG, 2, NONE_WRONG, 0]


def test_first_wrong_steps_of_a_case_worked_out_by_hand() -> None:
    """At 1/2: found in the first and the last of three, and both correct solutions are seen as correct."""
    found = first_wrong_step(VALUES, LABELS, 0.5)
    assert (found.erroneous, found.correct) == (3, 2)
    assert found.accuracy_erroneous == pytest.approx(2 / 3)
    assert found.accuracy_correct == 1
    assert found.f1 == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    higher = first_wrong_step(VALUES, LABELS, 0.65)
    assert higher.accuracy_correct == 0.5


def test_f1_is_that_of_the_definition_for_any_threshold() -> None:
    rng = np.random.default_rng(1)
    values = [rng.random(rng.integers(1, 6)).tolist() for _ in range(200)]
    labels = [int(rng.integers(-1, len(each))) for each in values]
    for threshold in (0.0, 0.1, 0.3, 0.9, 1.1):
        predicted = [
            min((place for place, value in enumerate(each) if value < threshold), default=-1)
            for each in values
        ]
        accuracies = []
        for kind in (True, False):
            of_kind = [
                (p, label)
                for p, label in zip(predicted, labels, strict=True)
                if (label != NONE_WRONG) is kind
            ]
            accuracies.append(np.mean([p == label for p, label in of_kind]))
        total = sum(accuracies)
        f1 = 2 * accuracies[0] * accuracies[1] / total if total else 0.0
        assert first_wrong_step(values, labels, threshold).f1 == pytest.approx(f1)


def test_f1_needs_solutions_of_both_kinds() -> None:
    assert first_wrong_step([[0.1], [0.2]], [0, 0], 0.5).f1 is None
    assert first_wrong_step([[0.9]], [NONE_WRONG], 0.5).accuracy_erroneous is None
    assert first_wrong_step([[0.1], [0.9]], [NONE_WRONG, 0], 0.5).f1 == 0
    assert best_threshold([[0.1], [0.2]], [0, 0]) == 0.5


def test_the_best_threshold_has_the_highest_f1() -> None:
    values, labels = [[0.09, 0.02], [0.08, 0.07], [0.09, 0.01]], [1, NONE_WRONG, 1]
    threshold = best_threshold(values, labels)
    assert first_wrong_step(values, labels, threshold).f1 == 1
    assert first_wrong_step(values, labels, 0.5).f1 == 0
    assert best_threshold([[0.9], [0.1]], [NONE_WRONG, 0]) == 0.5


def test_the_label_of_a_chosen_solution_is_the_first_step_after_which_no_completion_is_correct() -> None:
    rows = [
        ("a", 0, [0, 1], 0.5),
        ("a", 1, [0, 1], 0.25),
        ("a", 2, [0], 0.0),
        ("a", 3, [0], 0.25),
        ("a", 2, [1], 1.0),
        ("hopeless", 0, [0], 0.0),
        ("hopeless", 1, [0], 0.0),
        ("at once", 0, [4], 0.5),
        ("at once", 1, [4], 0.0),
    ]
    table = pl.DataFrame(
        rows, schema=["prompt_id", "tokens", "solutions", "value"], orient="row"
    ).with_row_index("state")
    assert labelled_solutions(table) == [([1, 2, 3], 1), ([1, 4], NONE_WRONG), ([8], 0)]
