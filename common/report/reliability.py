"""The reliability plot of a critic: Monte-Carlo values over predicted values, and how many states have each.

Shapes: _B bin.
"""

from collections.abc import Sequence
from pathlib import Path

from common.report.plots import figure_style, save


def draw_reliability(
    predicted_B: Sequence[float],
    observed_B: Sequence[float],
    errors_B: Sequence[float],
    states_B: Sequence[int],
    path: Path,
    suffix: str,
) -> None:
    """One point per bin with bars of ±1.96 standard errors; on the diagonal the critic is calibrated."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(4, 4.6), layout="constrained")
        points, counts = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        points.plot([0, 1], [0, 1], color="0.65", linestyle="--", linewidth=0.8)
        points.errorbar(
            predicted_B,
            observed_B,
            yerr=[1.96 * error for error in errors_B],
            color="black",
            linestyle="-",
            linewidth=1,
            marker="o",
            markersize=3,
            capsize=2,
        )
        points.set(ylabel="mean Monte-Carlo value", xlim=(0, 1), ylim=(0, 1))
        counts.bar(predicted_B, states_B, width=0.04, color="0.65")
        counts.set(xlabel="the critic's value, mean of a bin", ylabel="states")
        counts.yaxis.set_major_formatter("{x:,.0f}")
        save(figure, path, suffix)
