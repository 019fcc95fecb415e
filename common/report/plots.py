"""The style of every figure of this project, and how it is written to a file or put into a page.

Colours are greys, told apart by lightness and line style: they survive a black-and-white printer and, inverted, a dark
page. The background is transparent in a page and white in a file. The same data give the same bytes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREYS = ("0.0", "0.45", "0.65", "0.25", "0.8")
LINE_STYLES = ("-", "--", "-.", ":", "-")

_SAME_BYTES: dict[Any, Any] = {"svg.hashsalt": "astar-po"}
_NO_DATE = {"Date": None}


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib without a display, in this project's style: 9 pt, greys, no top and right spines."""
    import matplotlib
    from cycler import cycler

    matplotlib.use("Agg")
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=GREYS) + cycler(linestyle=LINE_STYLES),
        "legend.frameon": False,
        **_SAME_BYTES,
    }
    with matplotlib.rc_context(style):
        yield


def save(figure: "Figure", path: Path, suffix: str) -> None:
    """Write a figure as `suffix`, png or svg, whatever the path is called (`atomic_path` hands out temporary names)."""
    import matplotlib

    with matplotlib.rc_context(_SAME_BYTES):
        figure.savefig(str(path), format=suffix, dpi=150, metadata=_NO_DATE if suffix == "svg" else None)


def svg_text(figure: "Figure") -> str:
    """A figure as the text of an SVG document with a transparent background, to be put into a page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_SAME_BYTES):
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_DATE)
    return text.getvalue()
