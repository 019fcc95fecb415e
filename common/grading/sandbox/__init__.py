"""Runs a program and its tests in a fresh interpreter that can do nothing but compute.

No network, no other processes, no file but Python's own to read and none to write, bounded time and memory: see
`seccomp.py` for the calls and `child.py` for the limits. Nothing is left behind, not even a folder.
"""

import marshal
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.grading.sandbox.child import COMPILED, MAX_REPORT_BYTES, SET_UP
from common.grading.sandbox.seccomp import MACHINES, filter_program

_CHILD = Path(__file__).with_name("child.py")
_LONGEST_REPORT = len(SET_UP + COMPILED) + MAX_REPORT_BYTES


class SandboxError(RuntimeError):
    """This machine does not let a program run in isolation, so it was not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a program fared; `failure` is the first thing that went wrong, None if every test passed."""

    compiled: bool
    failure: str | None


def run(program: str, tests: Sequence[tuple[str, str]], *, seconds: float, memory_bytes: int) -> Run:
    """Run a program and then its tests, pairs of a name and a source. Raises SandboxError instead of running it freely.

    The verdict is a nonce that the child sends after the last test: exit statuses and output mean nothing.
    """
    nonce = os.urandom(16).hex().encode()
    payload = (program, list(tests), nonce, os.getpid(), seconds, memory_bytes, _filter())
    started = time.monotonic()
    with os.fdopen(os.memfd_create("payload"), "wb") as file:
        file.write(marshal.dumps(payload))
        file.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", str(_CHILD)],
            env={"PYTHONHASHSEED": "0"},  # one verdict for a program that depends on the order of a set
            cwd="/",
            start_new_session=True,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    with process:
        try:
            report = _read(process)
        finally:
            process.kill()
    if not report.startswith(SET_UP):
        raise SandboxError(report.decode(errors="replace") or _death(process.returncode))
    compiled = report.startswith(SET_UP + COMPILED)
    said = report.removeprefix(SET_UP).removeprefix(COMPILED)
    if compiled and said == nonce:
        return Run(compiled=True, failure=None)
    late = time.monotonic() - started >= seconds
    failure = said.decode(errors="replace") or (f"over {seconds:g} s" if late else _death(process.returncode))
    return Run(compiled=compiled, failure=failure)


def _read(process: "subprocess.Popen[bytes]") -> bytes:
    """The child's report, up to the length of an honest one; its timer bounds the wait."""
    assert process.stdout is not None, "the child's report is piped"
    report = b""
    while len(report) < _LONGEST_REPORT:
        chunk = os.read(process.stdout.fileno(), _LONGEST_REPORT - len(report))
        if not chunk:
            break
        report += chunk
    return report


def _death(status: int) -> str:
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"left with exit status {status}"


@cache
def _filter() -> bytes:
    try:
        return filter_program()
    except KeyError as machine:
        raise SandboxError(f"no system call filter for {machine}, only for {', '.join(MACHINES)}") from None
