"""Send libraries' output to a file of the run, each distinct line once; the terminal shows only this project's lines.

Writes to Python's streams are routed by the code that makes them. File descriptors stay as they are, so that the output
of a crash (NCCL, CUDA, an abort) reaches the terminal, and so do tracebacks and your own debugging prints.
"""

import logging
import os
import re
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, TextIO, cast

from common.remote.places import without_secrets
from common.runs import REPOSITORY

_OURS = (f"{REPOSITORY}{os.sep}", f"{sysconfig.get_path('stdlib')}{os.sep}")
_MESSENGERS = (logging.__file__, warnings.__file__)
_TIME = re.compile(r"[\d-]*\d\d:\d\d:\d\d([.,]\d+)?")


@contextmanager
def libraries_logged(path: Path) -> Iterator[None]:
    """A context in which libraries' standard output and error go to the file, as soon as its folder exists."""
    if sys.stdout is None or sys.stderr is None:  # closed by the parent process
        yield
        return
    log = LibraryLog(path, sys.stderr)
    divided = [cast(TextIO, DividedStream(stream, log)) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(divided[0]), redirect_stderr(divided[1]):
        yield


class DividedStream:
    """A standard stream that shows only this project's own lines. Except for `write` it behaves like the stream."""

    def __init__(self, stream: TextIO, log: "LibraryLog") -> None:
        self._stream = stream
        self._log = log

    @property
    def rich_proxied_file(self) -> TextIO:
        """The stream for rich's consoles, whose lines are ours."""
        return self._stream

    def write(self, text: str) -> int:
        """Write our text; log a library's. A library's progress bar is shown in a terminal only."""
        writer = sys._getframe(1).f_code.co_filename
        if not is_library(writer):
            return self._stream.write(text)
        if "/tqdm/" not in writer:
            self._log.add(text)
        elif self._stream.isatty():
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@cache
def is_library(file: str) -> bool:
    """Whether code in that file belongs to a library: an installed package, or Python's own logging and warnings."""
    if file in _MESSENGERS or "site-packages" in file or "dist-packages" in file:
        return True
    return os.path.isabs(file) and not file.startswith(_OURS)


class LibraryLog:
    """Lines of this process in a file that the processes of a job append to."""

    def __init__(self, path: Path, fallback: TextIO) -> None:
        """If the file cannot be written, this is reported once and lines go to `fallback`."""
        self._path = path
        self._fallback = fallback
        self._is_writable = True
        self._lock = threading.RLock()
        self._seen: set[int] = set()
        self._unfinished = ""
        is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self._prefix = "" if is_alone else f"rank {os.environ.get('RANK')}: "
        command = without_secrets(" ".join(sys.argv[1:]))
        self._waiting = [f"{self._prefix}{time.strftime('%Y-%m-%d %H:%M:%S')} {command}"]

    def add(self, text: str) -> None:
        """Log the lines that the text completes, except for lines that were logged before."""
        with self._lock:
            *lines, self._unfinished = (self._unfinished + text).split("\n")
            for line in lines:
                key = hash(_TIME.sub("", line))
                if line.strip() and key not in self._seen:
                    self._seen.add(key)
                    self._waiting.append(f"{self._prefix}{line.rstrip()}")
            if self._seen and self._waiting and self._path.parent.is_dir():
                self._write("".join(f"{line}\n" for line in self._waiting))
                self._waiting.clear()

    def _write(self, lines: str) -> None:
        if self._is_writable:
            try:
                with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(lines)
                return
            except OSError as error:
                self._is_writable = False
                print(
                    f"warning: cannot write {self._path}: {error.strerror}; messages of libraries follow here",
                    file=self._fallback,
                )
        self._fallback.write(lines)
