"""Runs a command of the command line in a process of its own, which never outlives this one."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from common.errors import UserError
from common.runs import REPOSITORY

Execute = Callable[[Sequence[str], Path, Mapping[str, str]], "Finished"]
"""Runs a command with its output in a file and with more environment variables. Raises UserError if it fails."""

ENDING_SECONDS = 120.0
"""The time that an interrupted command gets to write its checkpoint."""
POLL_SECONDS = 0.05
_LINES_SHOWN = 3
_PR_SET_PDEATHSIG = 1


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
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, str(REPOSITORY / "cli.py")]


def execute(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
    """Run a command to its end. Raises UserError with the end of its output if it fails.

    If this process is interrupted, the command is told to end and waited for; if this process is killed, so is it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        place = output.tell()
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # the terminal's Ctrl-C is for this process, which passes it on once
            preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
        )
        try:
            # Not one long wait: polars' handler of SIGINT lets the kernel restart it, and Ctrl-C would do nothing.
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                time.sleep(POLL_SECONDS)
            _, status, usage = ended
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.monotonic() - began
    if process.returncode:
        raise UserError(
            f"{' '.join(_last_lines(log, place)) or f'exit status {process.returncode}'} (all of it: {log})"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_gib=usage.ru_maxrss * unit / 2**30,
    )


def _last_lines(log: Path, place: int) -> list[str]:
    """What a command said last, from this place of the file on: its error, if it names one."""
    text = log.read_bytes()[place:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1:] or [line for line in lines if line][-_LINES_SHOWN:]


def die_with_launcher() -> None:
    """Let a process that torchrun has started end with it: torchrun ends its processes, but not if it is killed.

    Only Linux can do this.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    # Init has adopted this process, unless it is the launcher, as in a container: then it runs the same Python.
    if launcher == 1 and os.path.realpath("/proc/1/exe") != os.path.realpath("/proc/self/exe"):
        os.kill(os.getpid(), signal.SIGKILL)
    _die_with(launcher)


def _die_with(parent: int) -> None:
    """Let this process end as soon as its parent does: it must not go on writing to a run that a new one continues.

    `parent` is the id of the parent that it began with.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os.kill(os.getpid(), signal.SIGKILL)
