"""Progress of stage 1: a bar in a terminal, a line now and then in a log file."""

import time
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common.terminal.console import Terminal
from common.terminal.progress import progress_bar

BAR_SECONDS = 0.1
LOG_SECONDS = 30.0


class SamplingProgress:
    """Counts samples, prompts and tokens, and shows them with the rate and the remaining time."""

    def __init__(self, missing_PN: NDArray[np.bool_], console: Terminal, prompts: str = "prompts") -> None:
        """`missing_PN` marks the samples to draw of each prompt; `prompts` says what these are."""
        self._name = prompts
        self._left_P: list[int] = missing_PN.sum(axis=1).tolist()
        self._all_prompts = sum(left > 0 for left in self._left_P)
        self._samples = sum(self._left_P)
        self._console = console
        self._started = self._shown = time.monotonic()
        self._interval = BAR_SECONDS if console.is_terminal else LOG_SECONDS
        self._done = self._prompts = self._tokens = 0
        self._bar = progress_bar(console)
        self._task = self._bar.add_task(self._state(), total=self._samples)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def add(self, place: int, tokens: int) -> None:
        """Count one sample of the prompt at this place."""
        self._done += 1
        self._tokens += tokens
        self._left_P[place] -= 1
        self._prompts += self._left_P[place] == 0
        now = time.monotonic()
        if now - self._shown > self._interval or self._done == self._samples:
            self._shown = now
            self._show(now - self._started)

    def _show(self, seconds: float) -> None:
        if self._bar.disable:
            left = seconds / self._done * (self._samples - self._done)
            self._console.print(f"{self._state()}, {left:,.0f} s left")
        else:
            self._bar.update(self._task, completed=self._done, description=self._state())

    def _state(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (
            f"{self._prompts:,}/{self._all_prompts:,} {self._name}, "
            f"{self._done:,}/{self._samples:,} samples, {self._tokens / seconds:,.0f} tokens/s"
        )
