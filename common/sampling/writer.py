"""Rows to fragments, beside the engine."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FRAGMENT_SAMPLES = 4096
FRAGMENT_CHARACTERS = 64 * 1024**2
FRAGMENT_SECONDS = 60.0
"""A killed job loses at most what was graded since the last fragment."""


class FragmentWriter:
    """Collects graded rows and has them appended to a store from a thread of its own.

    Whoever adds a row waits for the disk only where that takes longer than sampling a whole fragment. What the disk
    refuses is raised at a later row, or at the end.
    """

    def __init__(self, append: Callable[[list[dict[str, Any]]], Path]) -> None:
        """`append` writes one fragment: `SampleStore.append` or `SampleStore.add_grades`."""
        self._append = append
        self._thread = ThreadPoolExecutor(1, "fragment-writer")
        self._writing: Future[Path] | None = None
        self.written = False
        self._start()

    def _start(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        self._since = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Take a row; what has come together becomes a fragment once it is large or old enough."""
        self._rows.append(row)
        self._characters += len(row.get("completion", ""))
        if (
            len(self._rows) >= FRAGMENT_SAMPLES
            or self._characters >= FRAGMENT_CHARACTERS
            or time.monotonic() - self._since >= FRAGMENT_SECONDS
        ):
            self._flush()

    def discard(self) -> None:
        """Forget the rows of the fragment that has not been written."""
        self._start()

    def _flush(self) -> None:
        self._settle()
        if rows := self._rows:
            self._start()  # first: rows must not be written twice, whatever interrupts this
            self.written = True
            self._writing = self._thread.submit(self._append, rows)

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, also where an error ends the job: it has been sampled and graded."""
        try:
            self._flush()
            self._settle()
        finally:
            self._thread.shutdown()
