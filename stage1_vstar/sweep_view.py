"""The figures of a sweep as a table for the terminal and as small multiples for a file."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from common.terminal.console import Terminal
from stage1_vstar.sweep import Cell, Sweep, SweepFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPERS_N = 8
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def show(swept: SweepFile, console: Terminal) -> None:
    """Print the figures that depend on N, then one table of N by β1 per figure; the standard β1 fit into 80 columns."""
    figures = swept.figures
    console.print(swept.path)
    console.print(f"{figures.prompts:,} prompts, up to {figures.max_num_samples} samples each")
    for table in (_by_num_samples(figures), *(_by_beta1(figures, *table) for table in _TABLES.items())):
        console.print()
        console.print(table)
    console.print()
    console.print(
        f"± is the standard deviation over subsets of N samples. Errors are against V̂* of all samples of "
        f"a prompt, itself an estimate. The loss is E(r − V̂*)² under π_ref with samples that are not part of V̂*; at "
        f"N = {figures.max_num_samples} there are none, and the loss of N − 1 is shown."
    )


_TABLES: dict[str, Callable[[Cell], float | None]] = {
    "mean V̂*, by N and β1": lambda cell: cell.vstar.mean,
    "spread: standard deviation of V̂* between prompts": lambda cell: cell.spread,
    "bias: mean error of V̂*": lambda cell: cell.bias,
    "RMSE: root mean squared error of a prompt's V̂*": lambda cell: cell.rmse,
    "loss that stage 2 starts from": lambda cell: cell.loss.mean,
}


def _by_num_samples(figures: Sweep) -> Table:
    table = _table("if prompts with pass@N = 0 are dropped")
    table.add_column("N", justify="right")
    table.add_column("dropped", justify="right")
    table.add_column(f"of these solved\nin {figures.max_num_samples} samples", justify="right")
    table.add_column("stage-2\ntokens saved", justify="right")
    table.add_column("prompts left out:\nfewer samples", justify="right")
    for column in figures.by_num_samples:
        dropped, solvable = column.dropped, column.dropped_solvable
        table.add_row(
            f"{column.num_samples}",
            f"{dropped.mean:.1%} ±{dropped.sd:.1%}",
            f"{solvable.mean / dropped.mean:.1%}" if dropped.mean else "–",
            f"{column.time_saved.mean:.1%}",
            f"{column.left_out:,}",
        )
    return table


def _by_beta1(figures: Sweep, title: str, figure: Callable[[Cell], float | None]) -> Table:
    table = _table(title)
    table.add_column("  β1\nN   ", justify="right")
    for beta in figures.betas:
        table.add_column(_beta(beta), justify="right", no_wrap=True, min_width=6)
    for size in figures.sizes:
        values = (figure(figures.cell(beta, size)) for beta in figures.betas)
        table.add_row(f"{size}", *("–" if value is None else _three_digits(value) for value in values))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
        collapse_padding=True,
    )


def _three_digits(value: float) -> str:
    """Three decimals. A bias of −1e-17 is a rounded 0 and must not print as -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"


def draw(figures: Sweep) -> "Figure":
    """Bias and spread, distribution, filter and loss; call it within `figure_style`."""
    from matplotlib import pyplot

    betas = figures.betas
    figure = pyplot.figure(figsize=(max(8.0, 1.15 * len(betas)), 8), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=(1, 1, 1.4), hspace=0.05)
    errors, distributions, choices = rows
    _draw_errors(figures, errors)
    _draw_distributions(figures, distributions)
    choices.suptitle(
        f"Error bars: ± 2 sd over subsets of N of the {figures.max_num_samples} samples", fontsize=9
    )
    left, right = choices.subplots(1, 2)
    _draw_filter(figures, left)
    _draw_losses(figures, right)
    return figure


def _draw_errors(figures: Sweep, figure: Any) -> None:
    betas, sizes = figures.betas, figures.sizes
    figure.suptitle(
        f"Error of V̂* from N samples, against V̂* from all {figures.max_num_samples}. "
        "Line: mean over prompts (bias). Band: ± sd of one prompt's V̂*",
        fontsize=9,
    )
    row = figure.subplots(1, len(betas), sharey=True, squeeze=False)[0]
    for axes, beta in zip(row, betas, strict=True):
        cells = [cell for cell in figures.cells if cell.beta1 == beta]
        low = [cell.bias - cell.prompt_sd for cell in cells]
        high = [cell.bias + cell.prompt_sd for cell in cells]
        axes.fill_between(sizes, low, high, color="0.85", linewidth=0)
        axes.axhline(0, color="0.4", linewidth=0.8, linestyle=":")
        axes.plot(
            sizes, [cell.bias for cell in cells], color="black", linestyle="-", marker="o", markersize=3
        )
        axes.set_title(f"β1 = {_beta(beta)}")
        _size_axis(axes, sizes, few=True)
    row[0].set_ylabel("error, in rewards")


def _draw_distributions(figures: Sweep, figure: Any) -> None:
    betas, sizes = figures.betas, figures.sizes
    most, small = sizes[-1], _small(sizes)
    figure.suptitle(
        f"Distribution of V̂*: share of the prompts whose V̂* is at most v. "
        f"Thick grey: N = {most}. Thin black: N = {small}",
        fontsize=9,
    )
    edges = figures.histogram_edges
    row = figure.subplots(1, len(betas), sharey=True, squeeze=False)[0]
    for axes, beta in zip(row, betas, strict=True):
        for size, color, width in ((most, "0.7", 3), (small, "black", 1)):
            reached = [0.0, *(100 * share for share in accumulate(figures.cell(beta, size).histogram))]
            axes.plot(edges, reached, color=color, linewidth=width, linestyle="-")
        axes.set(title=f"β1 = {_beta(beta)}", xlabel="v", ylim=(0, 102))
    row[0].set_ylabel("% of prompts")


def _draw_filter(figures: Sweep, axes: "Axes") -> None:
    sizes, columns = figures.sizes, figures.by_num_samples
    solved = f"dropped, yet solved in {figures.max_num_samples}"
    for shares, label, style, marker, color in (
        ([column.dropped for column in columns], "dropped: no correct sample in N", "-", "o", "black"),
        ([column.time_saved for column in columns], "stage-2 tokens that this saves", ":", "^", "0.45"),
        ([column.dropped_solvable for column in columns], solved, "--", "s", "black"),
    ):
        axes.errorbar(
            sizes,
            [100 * share.mean for share in shares],
            [200 * share.sd for share in shares],
            linestyle=style,
            marker=marker,
            markersize=4,
            color=color,
            linewidth=1,
            label=label,
        )
    axes.set(title="What the filter pass@N = 0 drops", ylim=(0, None))
    axes.set_ylabel("% of prompts, of tokens")
    axes.legend()
    _size_axis(axes, sizes)


def _draw_losses(figures: Sweep, axes: "Axes") -> None:
    betas, sizes = figures.betas, figures.sizes
    for place, beta in reversed(list(enumerate(betas))):
        losses = [cell.loss for cell in figures.cells if cell.beta1 == beta]
        axes.errorbar(
            sizes,
            [math.nan if loss.mean is None else loss.mean for loss in losses],
            [2 * loss.sd for loss in losses],
            linestyle=_STYLES[place % len(_STYLES)],
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=4,
            color=str(0.6 * place / len(betas)),
            linewidth=1,
            label=f"{_beta(beta)}",
        )
    axes.set(title="Loss E(r − V̂*)² that stage 2 starts from", ylim=(0, None))
    axes.set_ylabel("squared rewards")
    axes.legend(title="β1", loc="center left", bbox_to_anchor=(1, 0.5))
    _size_axis(axes, sizes)


def _size_axis(axes: "Axes", sizes: Sequence[int], *, few: bool = False) -> None:
    axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes[::2] if few and len(sizes) > 4 else sizes, minor=False)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.set_xlabel("N")


def _small(sizes: Sequence[int]) -> int:
    """The paper's N if it was swept, or else the one in the middle."""
    return PAPERS_N if PAPERS_N in sizes[:-1] else sizes[(len(sizes) - 1) // 2]


def _beta(beta1: float) -> str:
    return "∞" if beta1 == float("inf") else f"{beta1:g}"
