"""Programs that start warm: each is a fork of one process, which has imported torch, transformers and vLLM.

A program imports those in 10 seconds; a fork has them at once. What is of this project each program imports itself, so
that it runs the code that is there when it starts. `common.warm_server` is the process that is forked. A program that
was started warm can start others so: the server forks them all.

CUDA does not survive a fork, and importing may initialise it: on a machine with a GPU programs start cold.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.runs import REPOSITORY

CONTROL = "ASTAR_PO_WARM"
"""The variable that tells a program its own id and the number of its socket to the server."""
LONGEST_MESSAGE = 1 << 20
HAS_GPU = any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))
"""Also one of Windows, whose Linux has the last."""


def can_fork() -> bool:
    """Whether programs are forked here: on Linux without a GPU, if it tells when a process ends (from 5.3 on)."""
    if sys.platform != "linux" or HAS_GPU:
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # an older one, or a container that does not allow it
        return False
    return True


CAN_FORK = can_fork()
_SHOWN = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A program to start."""

    program: Sequence[str]
    """As after `python`: a file, or `-m` and a module, after `-P` where its folder is not to be searched; arguments."""
    environment: Mapping[str, str]
    folder: str
    own_session: bool = True

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program has ended."""

    exit_code: int
    """As in Popen.returncode: minus the signal that killed it."""
    cpu_seconds: float
    """Its own, and those of the processes that it has waited for."""
    peak_gib: float
    """The largest resident set of it or of a process that it has waited for, with what it shares with others."""


class Process(Protocol):
    """A program that was started."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> Ended | None:
        """How it has ended; None if it still runs after `timeout` seconds."""
        ...


@dataclass(slots=True)
class WarmProcess:
    """A fork of the server."""

    pid: int
    _reports: socket.socket
    _ended: Ended | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, timeout: float | None = None) -> Ended | None:
        """As Process.wait. Raises ServerLost."""
        with self._lock:
            if self._ended is None:
                with selectors.DefaultSelector() as selector:
                    selector.register(self._reports, selectors.EVENT_READ)
                    if not selector.select(timeout):
                        return None
                self._ended = Ended(**_message(self._reports))
                self._reports.close()
            return self._ended


class ServerLost(RuntimeError):
    """The process that is forked has died."""

    def __init__(self, output: str = "") -> None:
        super().__init__(f"the process that programs are forked from has died{output and f': {output}'}")


@dataclass(frozen=True, slots=True)
class WarmStarts:
    """The way to a server."""

    _control: socket.socket

    def start(self, order: Order, stdin: int, stdout: int, stderr: int) -> WarmProcess:
        """Start a program with these files. Raises ServerLost."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._control, [order.text()], [stdin, stdout, stderr, theirs.fileno()])
            except ConnectionError as error:
                raise ServerLost from error
        return WarmProcess(_message(ours)["pid"], ours)


def _message(reports: socket.socket) -> dict[str, Any]:
    try:
        text = reports.recv(LONGEST_MESSAGE)
    except ConnectionError:
        text = b""
    if not text:
        raise ServerLost
    message: dict[str, Any] = json.loads(text)
    return message


@contextmanager
def warm_starts(environment: Mapping[str, str] | None = None) -> Iterator[WarmStarts | None]:
    """A server for as long as the context lasts, or the one that has forked this process; None where no fork can be.

    Programs end with their server, and with the program that has ordered them. `environment` is the new server's own,
    by default this process's.
    """
    found = inherited()
    if found is not None or not CAN_FORK:
        yield found
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as output:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "common.warm_server", str(theirs.fileno()), str(os.getpid())],
                env={**(os.environ if environment is None else environment), "PYTHONPATH": str(REPOSITORY)},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # the terminal's Ctrl-C is for this process
            )
        try:
            yield WarmStarts(ours)
        except ServerLost as error:
            output.seek(0)
            raise ServerLost(output.read().decode(errors="replace")[-_SHOWN:]) from error
        finally:
            process.kill()  # it may be importing
            process.wait()


def inherited() -> WarmStarts | None:
    """The server that this process is a fork of; None if it was started cold."""
    process, _, number = os.environ.get(CONTROL, "").partition(":")
    if process != str(os.getpid()):
        return None
    return WarmStarts(socket.socket(fileno=os.dup(int(number))))
