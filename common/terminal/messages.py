"""A command's final message: it reaches the user from any process of a job, and on any terminal.

The processes of a training job often find the same mistake. The first one reports it, before the launcher ends the
others, and notes this in a file of the temporary folder. A note counts only for processes that were running when it was
made, or whose launcher was, so that the message of an earlier job silences nobody.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from common.lifetime import has_launcher
from common.remote.places import shown

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def prepare_output() -> None:
    """Make sure that all three standard streams exist; characters that they cannot encode are escaped."""
    for standard in range(3):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the place of the closed one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(document: str) -> None:
    """Print a JSON document, with JSON's escapes if standard output cannot encode one of its characters."""
    try:
        document.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        document = _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], document)
    print(shown(document))


def leave(status: int, message: str, *, unless_said: bool = False) -> NoReturn:
    """Print the final message and end this process at once, whatever its engines, graders and threads are doing."""
    say_once(message, unless_said=unless_said)
    with suppress(OSError):
        if sys.stdout is not None:
            sys.stdout.flush()
    os._exit(status)


def say_once(message: str, *, unless_said: bool = False) -> None:
    """Print to standard error, once for all processes of a training job that share it.

    With `unless_said`, do nothing if one of them has already reported why the job ends.
    """
    message = shown(message)
    note = _open_note()
    try:
        said = _said(note)
        digest = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()
        if digest in said or (unless_said and said):
            return
        with suppress(OSError):  # nobody reads it any more
            print(message, file=sys.stderr, flush=True)
        if note is not None:
            with suppress(OSError):
                os.write(note, f"{time.clock_gettime(time.CLOCK_BOOTTIME)} {digest}\n".encode())
    finally:
        if note is not None:
            os.close(note)


def say_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that no user can fix; for sys.excepthook."""
    say_once("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _open_note() -> int | None:
    """The locked file of this job's messages; None for a single process, or if the file cannot be opened."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        stream = os.fstat(2)
        job = (
            *(_BOOT.read_text(), os.uname().nodename, os.getppid(), stream.st_dev, stream.st_ino),
            *(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")),
        )
        name = f"astar-po-{hashlib.sha256(repr(job).encode()).hexdigest()[:32]}"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        note = os.open(Path(tempfile.gettempdir(), name), flags, 0o600)
        fcntl.flock(
            note, fcntl.LOCK_EX
        )  # until it is closed: a waiting process then knows that the message has been printed
    except OSError:
        return None
    return note


def _said(note: int | None) -> set[str]:
    """The digests of the messages of this job."""
    if note is None:
        return set()
    lines = os.pread(note, os.fstat(note).st_size, 0).decode().splitlines()
    entries = [line.split() for line in lines if line.count(" ") == 1]
    began = _job_began()
    return {digest for seconds, digest in entries if float(seconds) >= began}


def _job_began() -> float:
    """When the launcher or, without one, this process began, in seconds since the machine's start (Linux).

    On a loaded machine a process may begin after another one has found the mistake and ended.
    """
    process = os.getppid() if has_launcher() else os.getpid()
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
