"""Runs a command of the command line in a process of its own, which never outlives this one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from pydantic import BaseModel

from common.errors import UserError
from common.lifetime import die_with
from common.runs import REPOSITORY
from common.warm_starts import Ended, Order, Process, WarmStarts, warm_starts

Execute = Callable[[Sequence[str], Path, Mapping[str, str]], "Finished"]
"""Runs a command with its output in a file and with more environment variables. Raises UserError if it fails."""

ENDING_SECONDS = 120.0
"""The time that an interrupted command gets to write its checkpoint."""
PATIENCE_SECONDS = 3600
"""The time that torch's launcher gives its processes to end, by default 30 s: too short for an iteration and a
checkpoint."""
POLL_SECONDS = 0.05
_LINES_SHOWN = 3


class Finished(BaseModel):
    """The cost of a process that has ended well."""

    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """Its own and its children's."""
    peak_gib: float
    """The largest resident set of it or of a process that it has waited for.

    Linux counts the process that it was forked from too: it is never less than what this one held then.
    """


def program(processes: int = 1) -> list[str]:
    """The beginning of a command: cli.py in one process, or in several under torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--shutdown-timeout", str(PATIENCE_SECONDS)]
    return [sys.executable, *(launcher if processes > 1 else ()), str(REPOSITORY / "cli.py")]


@dataclass(slots=True)
class ColdProcess:
    """A Process that was started from nothing."""

    _popen: subprocess.Popen[bytes]
    _ended: Ended | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._popen.pid

    def wait(self, timeout: float | None = None) -> Ended | None:
        """As Process.wait.

        It never waits in one long call: polars' handler of SIGINT lets the kernel restart that, and Ctrl-C would do
        nothing.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while self._ended is None:
                found, status, usage = os.wait4(self._popen.pid, os.WNOHANG)
                if found:
                    self._popen.returncode = os.waitstatus_to_exitcode(status)
                    self._ended = Ended(
                        exit_code=self._popen.returncode,
                        cpu_seconds=usage.ru_utime + usage.ru_stime,
                        peak_gib=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30,
                    )
                elif until is not None and time.monotonic() >= until:
                    break
                else:
                    time.sleep(POLL_SECONDS)
            return self._ended


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    warm: WarmStarts | None,
    stdin: int | None = None,
    stdout: int | None = None,
    ends_with_thread: bool = False,
) -> Process:
    """Start a program of this Python, warm if `warm` can; its output and errors go to `stdout`, by default this one's.

    By default it gets no input, and never the terminal's Ctrl-C, which is for this process. With `ends_with_thread` it
    is killed when this thread ends, however that happens; one that starts warm ends with its server in any case.
    """
    with open(os.devnull, "rb") as nothing:
        given = nothing.fileno() if stdin is None else stdin
        if warm is not None:
            order = Order(program=command[1:], environment=environment, folder=os.getcwd())
            return warm.start(order, given, *((1, 2) if stdout is None else (stdout, stdout)))
        return ColdProcess(
            subprocess.Popen(
                command,
                stdin=given,
                stdout=stdout,
                stderr=stdout,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()) if ends_with_thread else None,
            )
        )


@contextmanager
def executing_warm() -> Iterator[Execute]:
    """`execute` with commands that start warm where that is possible, but for those of several processes.

    What they are forked from starts with the first of them and ends with this context.
    """
    with ExitStack() as job:

        @cache
        def server() -> WarmStarts | None:
            return job.enter_context(warm_starts())

        def execute_warm(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> "Finished":
            is_alone = command[: len(program())] == program()
            return execute(command, log, environment, server() if is_alone else None)

        yield execute_warm


def execute(
    command: Sequence[str], log: Path, environment: Mapping[str, str], warm: WarmStarts | None = None
) -> Finished:
    """Run a command to its end, warm if `warm` can. Raises UserError with the end of its output if it fails.

    If this process is interrupted, the command is told to end and waited for; if this process is killed, so is it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        place = output.tell()
        began = time.monotonic()
        process = start(
            command, {**os.environ, **environment}, warm=warm, stdout=output.fileno(), ends_with_thread=True
        )
        try:
            ended = process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
                process.wait(ENDING_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has left behind
            process.wait()
            raise
        seconds = time.monotonic() - began
    assert ended is not None
    if ended.exit_code:
        raise UserError(
            f"{' '.join(_last_lines(log, place)) or f'exit status {ended.exit_code}'} (all of it: {log})"
        )
    return Finished(seconds=seconds, cpu_seconds=ended.cpu_seconds, peak_gib=ended.peak_gib)


def show(command: Sequence[str], warm: WarmStarts | None) -> int:
    """Run a command that prints to where this process prints, and returns its exit code: minus a signal that killed it.

    An interrupt is passed on to it, and it is waited for.
    """
    process = start(command, dict(os.environ), warm=warm, ends_with_thread=True)
    while True:
        try:
            ended = process.wait()
            assert ended is not None
            return ended.exit_code
        except KeyboardInterrupt:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)


def _last_lines(log: Path, place: int) -> list[str]:
    """What a command said last, from this place of the file on: its error, if it names one."""
    text = log.read_bytes()[place:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1:] or [line for line in lines if line][-_LINES_SHOWN:]
