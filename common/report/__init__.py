"""Report a run: one page, and for trained runs a short table for the terminal and the curves as PNG and SVG.

Reads the run's artifacts only; no model, no torch. It shows whatever a run has so far.
"""

from collections.abc import Sequence

from rich.table import Table

from common.documents import read_metrics
from common.errors import UserError
from common.evaluations import EVALUATE_COMMAND, TRAINED, is_evaluated, read_results
from common.files import atomic_path
from common.report.curves import draw_training
from common.report.evaluations import Evaluated, evaluated
from common.report.page import write_page
from common.report.stage1 import read_stage1
from common.runs import RunPaths
from common.terminal.console import Terminal

_OLD = f"`{TRAINED}` was evaluated before the last training of the run: run `{EVALUATE_COMMAND}` again"


def write_report(paths: RunPaths, console: Terminal, *, before_training: Sequence[str] = ("vstar",)) -> None:
    """Print the table, draw the curves, write the page. Raises UserError if there is nothing, or a damaged file.

    `before_training` are the commands that make what the run's training reads.
    """
    metrics = [values for _, values in read_metrics(paths.metrics)]
    if not metrics and not paths.vstar.exists():
        # A table of V̂* is enough for a page; other objectives have something to show once they train.
        commands = before_training if "vstar" in before_training else [*before_training, "train"]
        raise UserError(
            f"{paths.root} has neither vstar.parquet nor metrics.jsonl: run "
            f"{', '.join(f'`python cli.py {command}`' for command in commands)} first"
        )
    results = read_results(paths)
    is_old = paths.trained_with.exists() and not is_evaluated(paths, paths.model)
    evaluations = evaluated(results, of_trained=[_OLD] if is_old else ()) if results else []
    for each in evaluations:
        console.print(_table(each))
    if any(_OLD in each.notes for each in evaluations):
        console.print(f"warning: {_OLD}")
    if metrics:
        for suffix in ("png", "svg"):
            with atomic_path(paths.curves(suffix)) as temporary:
                draw_training(metrics, temporary, suffix)
        console.print(f"{paths.curves('png')} and .svg: the training curves")
    stage1 = read_stage1(paths.vstar) if paths.vstar.exists() else None
    page = write_page(paths, stage1, metrics, evaluations)
    console.print(f"{page}: everything on a page; open it in a browser")


def _table(evaluation: Evaluated) -> Table:
    table = Table(title=f"{evaluation.benchmark}: {evaluation.prompts:,} prompts")
    table.add_column("")
    for name in evaluation.models:
        table.add_column(name, justify="right")
    for label, cells in evaluation.rows:
        table.add_row(label, *cells)
    return table
