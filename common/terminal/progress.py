"""The progress of long jobs: a bar in a terminal, in a log file lines instead."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from common.terminal.console import Terminal

BAR_SECONDS = 0.1
LOG_SECONDS = 30.0
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


class Advance:
    """How much of a job is done: a bar in a terminal, a line now and then in a log file."""

    def __init__(self, console: Terminal, total: int, state: Callable[[int], str]) -> None:
        """`state` describes how many of the `total` are done."""
        self._console = console
        self._total = total
        self._state = state
        self._started = self._shown = time.monotonic()
        self._interval = BAR_SECONDS if console.is_terminal else LOG_SECONDS
        self.done = 0
        self._bar = progress_bar(console)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.update(self._task, description=self._state(self.done))
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    def by(self, count: int) -> None:
        """Count what was done since the last call. A job that ends before its first line is due leaves none."""
        self.done += count
        now = time.monotonic()
        if now - self._shown > self._interval:
            self._shown = now
            self.show()

    def show(self) -> None:
        """Show how far it is."""
        if self._bar.disable:
            left = self.seconds / max(1, self.done) * (self._total - self.done)
            self._console.print(f"{self._state(self.done)}, {left:,.0f} s left")
        else:
            self._bar.update(self._task, completed=self.done, description=self._state(self.done))
