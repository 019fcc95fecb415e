"""Writes rows to fragments, in a thread beside the engine."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FRAGMENT_SAMPLES = 4096
FRAGMENT_CHARACTERS = 64 * 1024**2
FRAGMENT_SECONDS = 60.0
"""A killed job loses at most the samples graded since the last fragment."""


class FragmentWriter:
    """Collects graded rows and appends them to a store in a thread of its own.

    Adding a row waits for the disk only if writing takes longer than sampling a whole fragment. An error of the disk is
    raised at a later row, or at the end.
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
        """Add a row; the collected rows become a fragment once they are many or old enough."""
        self._rows.append(row)
        self._characters += sum(len(row.get(name, "")) for name in ("prompt", "answer", "completion"))
        if (
            len(self._rows) >= FRAGMENT_SAMPLES
            or self._characters >= FRAGMENT_CHARACTERS
            or time.monotonic() - self._since >= FRAGMENT_SECONDS
        ):
            self._flush()

    def discard(self) -> None:
        """Discard the rows of the unwritten fragment."""
        self._start()

    def _flush(self) -> None:
        self._settle()
        if rows := self._rows:
            self._start()  # first: an interruption must not lead to rows being written twice
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
        """Write the remaining rows, even if an error ends the job: they are sampled and graded."""
        try:
            self._flush()
            self._settle()
        finally:
            self._thread.shutdown()
