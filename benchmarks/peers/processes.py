"""A command as a process of its own, with its time and the memory of all its processes. Linux only."""

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that has ended well."""

    began: float
    """Seconds since the epoch."""
    seconds: float
    cpu_seconds: float
    """Its own and its children's."""
    peak_mib: float
    """The most that the peaks of its own and its living descendants' resident memory added up to."""


def run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
    """Run a command to its end. Raises RuntimeError with the end of its output if it fails."""
    peak_mib = 0.0
    living: set[int] = set()
    with log.open("w") as output:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.time()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        try:
            while process.poll() is None:
                earlier, living = living, _family(process.pid)
                # A child just forked still shows its parent's memory as its own.
                peak_mib = max(peak_mib, sum(_peak_mib(pid) for pid in living & earlier))
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()  # where this process is interrupted
        seconds = time.time() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Finished(began=began, seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=peak_mib)


def resident_mib() -> float:
    """This process's resident memory."""
    return float(psutil.Process().memory_info().rss) / 2**20


def _family(pid: int) -> set[int]:
    """A process, and those that it and they have started."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def _peak_mib(pid: int) -> float:
    """The most resident memory that a process has had, which psutil does not tell on Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)
