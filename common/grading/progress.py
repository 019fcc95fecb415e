"""A page of memory that parent and worker share: which item of its batch a worker is at, and since when.

Announcing each start by message would cost more than grading it. The monotonic clock is one for all processes.
Nothing locks the page: each field is one aligned store (struct would write zeros first), and the time of a start is
written before its position, so that a reader in between never sees a busy worker with an old start.
"""

import mmap
import struct
import tempfile
import time
from typing import IO, NamedTuple

_PAGE_BYTES = 16  # a 64-bit position, a double
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
        self._memory = mmap.mmap(file_descriptor, _PAGE_BYTES)
        self._positions = memoryview(self._memory).cast("q")
        self._times = memoryview(self._memory).cast("d")

    def start(self, position: int) -> None:
        self._times[1] = time.monotonic()
        self._positions[0] = position

    def rest(self) -> None:
        self._positions[0] = _IDLE

    def read(self) -> Progress:
        position = self._positions[0]
        return Progress(position, self._times[1])

    def close(self) -> None:
        self._positions.release()
        self._times.release()
        self._memory.close()


def page_file() -> IO[bytes]:
    """An unlinked file of the page's size, to be mapped on both sides."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    file.write(struct.pack("@qd", _IDLE, 0.0))
    file.flush()
    return file
