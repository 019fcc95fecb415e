"""A page of memory that parent and worker share: which item of its batch a worker is at, and since when.

Announcing each start by message would cost more than grading it. The monotonic clock is one for all processes.
"""

import mmap
import struct
import tempfile
import time
from typing import IO, NamedTuple

_FIELDS = struct.Struct("<qd")
_IDLE = -1


class Progress(NamedTuple):
    """`position` in the batch, and the monotonic time at which that item started."""

    position: int
    started: float

    @property
    def busy(self) -> bool:
        return self.position != _IDLE


class ProgressPage:
    """The worker writes (`start`, `rest`), the parent reads."""

    def __init__(self, file_descriptor: int) -> None:
        self._memory = mmap.mmap(file_descriptor, _FIELDS.size)

    def start(self, position: int) -> None:
        _FIELDS.pack_into(self._memory, 0, position, time.monotonic())

    def rest(self) -> None:
        _FIELDS.pack_into(self._memory, 0, _IDLE, 0.0)

    def read(self) -> Progress:
        return Progress(*_FIELDS.unpack_from(self._memory, 0))

    def close(self) -> None:
        self._memory.close()


def page_file() -> IO[bytes]:
    """An unlinked file of the page's size, to be mapped on both sides."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    file.write(_FIELDS.pack(_IDLE, 0.0))
    file.flush()
    return file
