"""How good a critic is: figures of its values V beside Monte-Carlo values, and of the first wrong steps that it finds.

Shapes: _S state, _B bin, _N solution.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.special import expit
from scipy.stats import rankdata

BINS = 10
"""Bins of equal width of the calibration error and of the reliability plot."""
DEFAULT_THRESHOLD = 0.5
CANDIDATES = 1001
"""Quantiles of the values that are tried as thresholds."""
NONE_WRONG = -1
"""ProcessBench's label of a solution without a wrong step."""

Numbers = NDArray[np.float64]


class ReliabilityBin(BaseModel, frozen=True):
    """The states whose value is in one bin: their number and mean values, and the standard error of the second."""

    states: int
    predicted: float
    monte_carlo: float
    standard_error: float | None


class Calibration(BaseModel, frozen=True):
    """The critic's values of some states beside their Monte-Carlo values. None where a figure has no meaning."""

    states: int
    cross_entropy: float
    """In nats; natural logarithm."""
    brier: float
    """Mean (V − MC)²."""
    brier_perfect: float | None
    """What a critic would have that knew each true value: the variance of Monte-Carlo values of so many completions."""
    brier_constant: float
    """What a critic would have that gave every state the mean value."""
    calibration_error: float
    """Expected calibration error: mean |mean V − mean MC| of the bins, weighted by their states."""
    pearson: float | None
    spearman: float | None
    bins: tuple[ReliabilityBin, ...]


class FirstWrongStep(BaseModel, frozen=True):
    """How often the first step with a value below a threshold is the first wrong one.

    As ProcessBench measures it (arXiv:2412.06559).
    """

    threshold: float
    erroneous: int
    """Solutions with a wrong step."""
    accuracy_erroneous: float | None
    """The share of them whose first wrong step is found."""
    correct: int
    accuracy_correct: float | None
    """The share of solutions without a wrong step in which none is found."""
    f1: float | None
    """The harmonic mean of the two; None if there are no solutions of one kind."""


def calibration(logits_S: Numbers, values_S: Numbers, noise_S: Numbers) -> Calibration:
    """Compare logits with Monte-Carlo values; `noise_S` is the variance of each value, nan where unknown."""
    predicted_S = expit(logits_S)
    bins = reliability(predicted_S, values_S)
    known_S = noise_S[~np.isnan(noise_S)]
    return Calibration(
        states=len(values_S),
        cross_entropy=float(np.mean(np.logaddexp(0, logits_S) - values_S * logits_S)),
        brier=float(np.mean((predicted_S - values_S) ** 2)),
        brier_perfect=float(known_S.mean()) if len(known_S) else None,
        brier_constant=float(values_S.var()),
        calibration_error=sum(each.states * abs(each.predicted - each.monte_carlo) for each in bins)
        / len(values_S),
        pearson=_correlation(predicted_S, values_S),
        spearman=_correlation(rankdata(predicted_S), rankdata(values_S)),
        bins=bins,
    )


def reliability(predicted_S: Numbers, values_S: Numbers) -> tuple[ReliabilityBin, ...]:
    """The bins that have a state, in order."""
    bin_S = np.minimum((predicted_S * BINS).astype(int), BINS - 1)
    found = []
    for number in np.unique(bin_S):
        inside = bin_S == number
        count = int(inside.sum())
        error = float(values_S[inside].std(ddof=1) / count**0.5) if count > 1 else None
        found.append(
            ReliabilityBin(
                states=count,
                predicted=float(predicted_S[inside].mean()),
                monte_carlo=float(values_S[inside].mean()),
                standard_error=error,
            )
        )
    return tuple(found)


def _correlation(ours: Numbers, theirs: Numbers) -> float | None:
    if len(ours) < 2 or not ours.std() or not theirs.std():
        return None
    return float(np.corrcoef(ours, theirs)[0, 1])


def first_below(values: Sequence[float], threshold: float) -> int:
    """The index of the first value below the threshold, NONE_WRONG if there is none."""
    return next((place for place, value in enumerate(values) if value < threshold), NONE_WRONG)


def first_wrong_step(
    values_N: Sequence[Sequence[float]], label_N: Sequence[int], threshold: float
) -> FirstWrongStep:
    """Compare the first step below the threshold with the labels; `values_N` has a solution's value after each step."""
    right: dict[bool, list[bool]] = {False: [], True: []}
    for values, label in zip(values_N, label_N, strict=True):
        right[label == NONE_WRONG].append(first_below(values, threshold) == label)
    erroneous, correct = (sum(each) / len(each) if each else None for each in right.values())
    f1 = None
    if erroneous is not None and correct is not None:
        f1 = 2 * erroneous * correct / (erroneous + correct) if erroneous + correct else 0.0
    return FirstWrongStep(
        threshold=threshold,
        erroneous=len(right[False]),
        accuracy_erroneous=erroneous,
        correct=len(right[True]),
        accuracy_correct=correct,
        f1=f1,
    )


def best_threshold(values_N: Sequence[Sequence[float]], label_N: Sequence[int]) -> float:
    """The threshold with the highest F1, of several the one closest to the default; the default if there is no F1."""
    if first_wrong_step(values_N, label_N, DEFAULT_THRESHOLD).f1 is None:
        return DEFAULT_THRESHOLD
    everything = np.concatenate([np.asarray(values, dtype=float) for values in values_N])
    candidates = {DEFAULT_THRESHOLD, *np.quantile(everything, np.linspace(0, 1, CANDIDATES)).tolist()}

    def merit(threshold: float) -> tuple[float, float]:
        found = first_wrong_step(values_N, label_N, threshold).f1
        assert found is not None, "the labels are those of the default"
        return found, -abs(threshold - DEFAULT_THRESHOLD)

    return float(max(sorted(candidates), key=merit))


def labelled_solutions(states: pl.DataFrame) -> list[tuple[list[int], int]]:
    """The chosen solutions: the numbers of the states after each step, and the label that Monte-Carlo values give.

    It is the index of the first step after which the value is 0. A solution whose prompt has the value 0 is left out:
    no step made it worse. `states` is of `CriticData.states`; a solution's are in the order of their tokens, since
    imported solutions that share a state may count its steps differently.
    """
    solutions = (
        states.explode("solutions")
        .sort("tokens")
        .group_by("prompt_id", "solutions", maintain_order=True)
        .agg("state", "tokens", "value")
    )
    found = []
    for numbers, tokens, values in solutions.select("state", "tokens", "value").iter_rows():
        start = 1 if tokens[0] == 0 else 0
        if len(numbers) > start and not (start and values[0] == 0):
            label = next((at for at, value in enumerate(values[start:]) if value == 0), NONE_WRONG)
            found.append((numbers[start:], label))
    return found
