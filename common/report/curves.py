"""The training curves, on one sheet or as single pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.report.picture import PANEL_INCHES, Picture
from common.report.plots import figure_style, save, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 4
"""Iterations to either side in the running mean that is drawn over the raw values."""

Metrics = Sequence[dict[str, float]]
"""One dictionary per line of metrics.jsonl."""


def draw_training(metrics: Metrics, path: Path, suffix: str) -> None:
    """Accuracy or, without rewards, entropy; KL, loss and lengths over the iterations, on one sheet."""
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(8, 5), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        drawings = list(_panels(metrics).values())
        for axes, draw in zip(panels.flat, drawings, strict=False):
            draw(axes, metrics)
        for axes in panels.flat[len(drawings) :]:
            axes.set_axis_off()
        for axes in panels[1]:
            axes.set_xlabel("iteration")
        save(figure, path, suffix)


def training_pictures(metrics: Metrics) -> list[Picture]:
    """The same panels, one picture each."""
    from matplotlib.figure import Figure

    pictures = []
    with figure_style():
        for name, draw in _panels(metrics).items():
            figure = Figure(figsize=PANEL_INCHES, layout="constrained")
            axes = figure.subplots()
            draw(axes, metrics)
            axes.set_xlabel("iteration")
            pictures.append(Picture(svg=svg_text(figure), alt=_in_words(metrics, name)))
    return pictures


def _accuracy(axes: "Axes", metrics: Metrics) -> None:
    _curve(axes, metrics, "reward/solved", "training, share correct")
    if held_out := _points(metrics, "evaluate/pass_at_1"):
        axes.plot(
            *zip(*held_out, strict=True),
            color="black",
            linestyle="-",
            marker="o",
            markersize=3,
            linewidth=1,
            label="held-out, sampled pass@1",
        )
    axes.set(title="accuracy", ylim=(0, 1))
    axes.legend(loc="lower right")


def _divergence(axes: "Axes", metrics: Metrics) -> None:
    _curve(axes, metrics, "kl/sequence")
    axes.set(title=f"KL(π‖π_ref), nats per {_unit(metrics)}")


def _entropy(axes: "Axes", metrics: Metrics) -> None:
    _curve(axes, metrics, "policy/entropy")
    axes.set(title="entropy, nats per token", ylim=(0, None))


def _regression(axes: "Axes", metrics: Metrics) -> None:
    _curve(axes, metrics, "loss/regression")
    axes.set(title="regression loss", ylim=(0, None))


def _surrogate(axes: "Axes", metrics: Metrics) -> None:
    _curve(axes, metrics, "loss/surrogate")
    axes.set(title="surrogate loss")


def _length(axes: "Axes", metrics: Metrics) -> None:
    from matplotlib.ticker import MaxNLocator

    _curve(axes, metrics, "completion/tokens_mean")
    axes.set(title=f"tokens a {_unit(metrics)}", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _panels(metrics: Metrics) -> dict[str, Callable[["Axes", Metrics], None]]:
    """The main figure of each panel, and how it is drawn; not every objective measures rewards and KL."""
    logged = {name for point in metrics for name in point}
    has_accuracy = not logged.isdisjoint({"reward/solved", "evaluate/pass_at_1"})
    has_entropy = "policy/entropy" in logged
    has_kl = "kl/sequence" in logged or not has_entropy
    return {
        **({"reward/solved": _accuracy} if has_accuracy else {}),
        **({"kl/sequence": _divergence} if has_kl else {}),
        **({"policy/entropy": _entropy} if has_entropy and not (has_accuracy and has_kl) else {}),
        **(
            {"loss/surrogate": _surrogate} if "loss/surrogate" in logged else {"loss/regression": _regression}
        ),
        "completion/tokens_mean": _length,
    }


def _unit(metrics: Metrics) -> str:
    """What the objective trains on: completions, or without rewards the steps of solutions."""
    has_rewards = any(name.startswith("reward/") for point in metrics for name in point)
    return "completion" if has_rewards else "reasoning step"


def _in_words(metrics: Metrics, name: str) -> str:
    words = {
        "reward/solved": "share of correct training completions",
        "kl/sequence": f"KL to the reference in nats per {_unit(metrics)}",
        "policy/entropy": "entropy in nats per token",
        "loss/regression": "regression loss",
        "loss/surrogate": "surrogate loss",
        "completion/tokens_mean": f"tokens a {_unit(metrics)}",
    }
    if not (points := _points(metrics, name)):
        return f"Curve of the {words[name]}: no values."
    (first, start), (last, end) = points[0], points[-1]
    return f"Curve of the {words[name]}: {start:.3g} at iteration {first:g}, {end:.3g} at iteration {last:g}."


def _points(metrics: Metrics, name: str) -> list[tuple[float, float]]:
    return [(point["iteration"], point[name]) for point in metrics if point.get(name) is not None]


def _curve(axes: "Axes", metrics: Metrics, name: str, label: str | None = None) -> None:
    points = _points(metrics, name)
    iterations, values = [point[0] for point in points], [point[1] for point in points]
    axes.plot(iterations, values, color="0.75", linestyle="-", linewidth=0.8)
    windows = [values[max(0, place - SMOOTHING) : place + SMOOTHING + 1] for place in range(len(values))]
    smooth = [sum(window) / len(window) for window in windows]
    axes.plot(iterations, smooth, color="0.35", linestyle="-", linewidth=1.8, label=label)
