"""The distributions of pass rates and V̂* over the prompts, with kept and dropped prompts shown separately.

Shapes: _P prompt, _E edge of a bin.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.report.picture import PANEL_INCHES, Picture
from common.report.plots import figure_style, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 20


def pass_rate_picture(prompts: pl.DataFrame) -> Picture:
    """Prompts by pass rate: one bar for each possible rate if all prompts have the same, small N."""
    rate_P = prompts["pass_rate"].to_numpy()
    solved, unsolved = float((rate_P == 1).mean()), float((rate_P == 0).mean())
    return Picture(
        svg=_histogram(rate_P, prompts["keep"].to_numpy(), _rate_edges(prompts["num_samples"]), "pass rate"),
        alt=f"Histogram of pass rates: {unsolved:.1%} of the prompts have none of their samples correct, "
        f"{solved:.1%} all of them. {_kept(prompts)}",
    )


def vstar_picture(prompts: pl.DataFrame) -> Picture:
    """Prompts by V̂*."""
    vstar_P = prompts["vstar"].to_numpy()
    low, middle, high = np.quantile(vstar_P, [0.25, 0.5, 0.75])
    edges_E = np.histogram_bin_edges(vstar_P, BINS, range=(min(0.0, vstar_P.min()), max(1.0, vstar_P.max())))
    return Picture(
        svg=_histogram(vstar_P, prompts["keep"].to_numpy(), edges_E, r"$\hat{V}{}^*$"),
        alt=f"Histogram of V̂*: median {middle:.3f}, middle half from {low:.3f} to {high:.3f}. {_kept(prompts)}",
    )


def _kept(prompts: pl.DataFrame) -> str:
    return f"{int(prompts['keep'].sum()):,} of {prompts.height:,} prompts are kept for training."


def _rate_edges(num_samples_P: pl.Series) -> NDArray[np.float64]:
    most = int(num_samples_P.to_numpy().max())
    if num_samples_P.n_unique() == 1 and most <= BINS:
        return np.asarray((np.arange(most + 2) - 0.5) / most)
    return np.linspace(0, 1, BINS + 1)


def _histogram(
    values_P: NDArray[np.float64], keep_P: NDArray[np.bool_], edges_E: NDArray[np.float64], label: str
) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with figure_style():
        figure = Figure(figsize=PANEL_INCHES, layout="constrained")
        axes = figure.subplots()
        kept, _ = np.histogram(values_P[keep_P], edges_E)
        dropped, _ = np.histogram(values_P[~keep_P], edges_E)
        _bars(axes, edges_E, kept, np.zeros_like(kept), color="0.4", label="kept")
        if dropped.any():
            _bars(axes, edges_E, dropped, kept, color="0.85", hatch="//////", label="dropped")
            figure.legend(loc="outside upper right", ncols=2)
        axes.set(xlabel=label, ylabel="prompts")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        return svg_text(figure)


def _bars(
    axes: "Axes",
    edges_E: NDArray[np.float64],
    counts: NDArray[np.int64],
    below: NDArray[np.int64],
    **style: Any,
) -> None:
    width = np.diff(edges_E)
    some = counts > 0
    axes.bar(
        (edges_E[:-1] + 0.1 * width)[some],
        counts[some],
        0.8 * width[some],
        bottom=below[some],
        align="edge",
        edgecolor="0.4",
        linewidth=0.5,
        **style,
    )
