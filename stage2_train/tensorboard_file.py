"""Scalars in TensorBoard's format, on disk when `write` returns.

TensorBoard's own writer uses a thread, which notices a full disk late and prints a traceback.
"""

import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorBoardFile:
    """One event file of several in a folder that TensorBoard reads as one run."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Continue at `first_step`: TensorBoard then ignores this and later steps in other files."""
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step's scalars. Raises OSError if they cannot be written."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Do nothing: everything is on disk already."""
        self._file.close()
