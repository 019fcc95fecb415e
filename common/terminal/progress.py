"""The progress bar of both stages, in a terminal only; a log file gets lines instead."""

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from common.terminal.console import Terminal

RATE_WINDOW_SECONDS = 3600.0
"""The remaining time is computed from the rate over this period: several of the longest iterations."""


def progress_bar(console: Terminal) -> Progress:
    """A bar with its task's description and the remaining time; hidden unless the console is a terminal."""
    return Progress(
        BarColumn(bar_width=None),
        TextColumn("{task.description}"),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        # Libraries' output would otherwise appear above the bar.
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=RATE_WINDOW_SECONDS,
    )
