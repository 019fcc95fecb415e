"""Figures of several panels with one legend: each panel as a picture of a page, or all side by side in a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.report.picture import PANEL_INCHES, Picture
from common.report.plots import figure_style, save, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND_COLUMNS = 2
LEGEND_INCHES = 0.17
"""The height of a row of the legend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A drawing within a figure."""

    draw: Callable[["Axes"], None]
    alt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Panels that belong together, and their names in the legend."""

    name: str
    """Of its files."""
    title: str
    caption: str
    panels: Sequence[Panel]

    def pictures(self) -> list[Picture]:
        """Each panel as a picture of its own."""
        from matplotlib.figure import Figure

        pictures = []
        with figure_style():
            for panel in self.panels:
                figure = Figure(figsize=PANEL_INCHES, layout="constrained")
                panel.draw(figure.subplots())
                _add_legend(figure, LEGEND_COLUMNS)
                pictures.append(Picture(svg=svg_text(figure), alt=panel.alt))
        return pictures

    def save(self, path: Path, suffix: str) -> None:
        """All panels side by side in one file."""
        from matplotlib.figure import Figure

        with figure_style():
            count = len(self.panels)
            width, height = PANEL_INCHES
            figure = Figure(figsize=(width * count, height), layout="constrained")
            for axes, panel in zip(figure.subplots(1, count, squeeze=False).flat, self.panels, strict=True):
                panel.draw(axes)
            _add_legend(figure, LEGEND_COLUMNS * count)
            save(figure, path, suffix)


def _add_legend(figure: "Figure", columns: int) -> None:
    """One legend below all panels, for which the figure grows."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if not labels:
        return
    columns = min(columns, len(labels))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_INCHES * -(-len(labels) // columns))
    figure.legend(
        labels.values(),
        labels.keys(),
        loc="outside lower center",
        ncols=columns,
        fontsize=7.5,
        handlelength=2.2,
        columnspacing=1.2,
    )
