"""Processes of their own: commands with their time and memory, functions in a fresh interpreter. Linux only."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil  # type: ignore[import-untyped]

POLL_SECONDS = 0.2
"""Listing all processes takes milliseconds, which those that are measured need."""
POLLS_BETWEEN_SHARES = 5
"""What a process shares with others changes rarely, and takes the kernel some milliseconds to count."""

P = ParamSpec("P")
T = TypeVar("T")


def alone(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """The function's result in a process of its own, to separate its peak of memory and its libraries."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments, **options).result()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that has ended well."""

    began: float
    """Seconds since the epoch."""
    seconds: float
    cpu_seconds: float
    """Its own and its children's."""
    peak_mib: float
    """The largest sum of the peaks of resident memory of the process and its living descendants.

    What several of them share, such as the libraries of forks, counts once.
    """


def run(command: Iterable[object], log: Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end. Raises RuntimeError with the end of its output if it fails."""
    arguments = [str(part) for part in command]
    peak = 0.0
    living: set[int] = set()
    shared: dict[int, float] = {}
    with log.open("w") as output:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.time()
        process = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            for poll in count():
                if process.poll() is not None:
                    break
                earlier, living = living, _family(process.pid)
                if poll % POLLS_BETWEEN_SHARES == 0 or living != earlier:
                    shared = {pid: _shared_mib(pid) for pid in living}
                # A child just forked still shows its parent's memory as its own.
                peak = max(peak, sum(peak_mib(pid) - shared[pid] for pid in living & earlier))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
        finally:
            process.kill()  # where this process is interrupted
        seconds = time.time() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Finished(began=began, seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=peak)


def cli(command: str, config: Path, run: str, values: Mapping[str, object], *more: object) -> list[object]:
    """A command of ours, with these values in place of the config's."""
    options = [part for assignment in assignments(values) for part in ("--set", assignment)]
    return [sys.executable, "cli.py", command, "--config", config, "--run", run, *options, *more]


def assignments(values: Mapping[str, object]) -> list[str]:
    """The values as `--set` takes them."""
    return [f"{key}={value}" for key, value in values.items()]


def resident_mib() -> float:
    """This process's resident memory."""
    return float(psutil.Process().memory_info().rss) / 2**20


def peak_mib(pid: int | None = None) -> float:
    """The peak of resident memory of a process, by default this one, which psutil does not report on Linux."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _shared_mib(pid: int) -> float:
    """The part of a process's resident memory that others answer for: the kernel divides each page among its users."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss:", "Pss:"))}
    return (sizes["Rss:"] - sizes["Pss:"]) / 1024 if len(sizes) == 2 else 0.0


def forget_peak() -> None:
    """Reset this process's peak to its current memory."""
    Path("/proc/self/clear_refs").write_text("5")


def rotations(names: Sequence[str], repetitions: int) -> Iterable[tuple[int, str]]:
    """Each contestant in each repetition, in an order that changes between repetitions."""
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in (*names[first:], *names[:first]):
            yield repetition, name


def _family(pid: int) -> set[int]:
    """A process, and those that it and they have started."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()
