"""What came of a run: a short table for the terminal and the training curves as PNG and SVG.

Reads the run's artifacts only; no model, no torch.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from common.artifacts import RunPaths, atomic_path
from common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 4
"""Iterations to either side in the running mean that is drawn over the raw values."""


def write_report(paths: RunPaths, console: Console) -> None:
    """Print the table and draw the curves. Raises UserError if the run has not been trained."""
    if not paths.metrics.exists():
        raise UserError(f"{paths.root} has no metrics.jsonl: run `python cli.py train` first")
    metrics = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    evaluations = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name in ("reference", "trained")
        if (file := paths.evaluations / f"{name}.json").exists()
    }
    if evaluations:
        console.print(_table(evaluations))
    for suffix in ("png", "svg"):
        with atomic_path(paths.report / f"training.{suffix}") as temporary:
            draw_training(metrics, temporary, suffix)
    console.print(f"{paths.report}/training.png and .svg: the training curves")


def _table(evaluations: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="held-out prompts")
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "greedy accuracy": lambda result: f"{result['greedy_accuracy']:.3f}",
        "pass@1, sampled": lambda result: f"{result['pass_at_1']:.3f}",
        "  95 % interval": lambda result: "{:.3f}–{:.3f}".format(*result["pass_at_1_interval_95"]),
        "pass@8": lambda result: f"{result['pass_at_k']['8']:.3f}" if "8" in result["pass_at_k"] else "–",
        "KL(π‖π_ref), nats": lambda result: f"{result['kl_sequence']:.3f}",
        "tokens a completion": lambda result: f"{result['completion_tokens_mean']:.1f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(result) for result in evaluations.values()))
    return table


def draw_training(metrics: list[dict[str, float]], path: Path, suffix: str) -> None:
    """Reward and held-out accuracy, KL, regression loss and completion length over the iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "astar-po",
    }
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(8, 5), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        (reward, divergence), (loss, length) = panels
        _curve(reward, metrics, "reward/solved", "training, share correct")
        held_out = [point for point in metrics if "evaluate/pass_at_1" in point]
        if held_out:
            reward.plot(
                [point["iteration"] for point in held_out],
                [point["evaluate/pass_at_1"] for point in held_out],
                color="black",
                marker="o",
                markersize=3,
                linewidth=1,
                label="held-out, sampled pass@1",
            )
        reward.set(title="accuracy", ylim=(0, 1))
        reward.legend(loc="lower right", frameon=False)
        _curve(divergence, metrics, "kl/sequence", "KL")
        divergence.set(title="KL(π‖π_ref), nats a completion")
        _curve(loss, metrics, "loss/regression", "loss")
        loss.set(title="regression loss", xlabel="iteration", ylim=(0, None))
        _curve(length, metrics, "completion/tokens_mean", "tokens")
        length.set(title="tokens a completion", xlabel="iteration", ylim=(0, None))
        length.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(
            str(path), format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None
        )
        pyplot.close(figure)


def _curve(axes: "Axes", metrics: list[dict[str, float]], name: str, label: str) -> None:
    points = [(point["iteration"], point[name]) for point in metrics if point.get(name) is not None]
    iterations, values = [point[0] for point in points], [point[1] for point in points]
    axes.plot(iterations, values, color="0.75", linewidth=0.8)
    windows = [values[max(0, place - SMOOTHING) : place + SMOOTHING + 1] for place in range(len(values))]
    smooth = [sum(window) / len(window) for window in windows]
    axes.plot(iterations, smooth, color="0.35", linewidth=1.8, label=label)
