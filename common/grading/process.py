"""The parent's end of one worker process: start it, talk to it, watch its deadline, kill it.

A fresh interpreter, neither forked nor re-importing `__main__`: it holds nothing of the engine's memory.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common.grading.conventions import Needs
from common.grading.outcome import Grade, Outcome, graded
from common.grading.progress import ProgressPage, page_file
from common.grading.spec import GraderSpec

KILL_GRACE_SECONDS = 0.5  # after the worker's own alarm had its chance
START_SECONDS = 120.0
MAX_BATCH = 512
BATCH_SECONDS = 0.02  # long enough to pay for its message, short enough not to queue behind a slow item
ROUNDS = 4
"""Completions in a batch of an async grader, as a multiple of those graded at a time: a batch ends with its slowest."""

_ROOT = Path(__file__).resolve().parents[2]


class Inbox:
    """The finished grades of one caller, until it collects them."""

    def __init__(self) -> None:
        self.finished: list[tuple[Any, Grade]] = []
        self.pending = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One completion on its way through the pool; without a completion, an answer to validate."""

    inbox: Inbox
    key: Hashable
    prompt: str
    completion: str | None
    answer: str
    token_ids: Sequence[int] | None = None
    attempts: int = 0
    """Requests to a judge that had no answer."""
    alone: bool = False
    """Whether to grade it by itself, because a process died while it and others were being graded."""

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.completion or "") + len(self.answer)


class WorkerProcess:
    """A child process and the batch it is working on; used by the pool's supervising thread alone."""

    def __init__(self, spec: GraderSpec, *, memory_bytes: int) -> None:
        self.batch: deque[Job] = deque()
        self.ready = False
        self.needs = Needs()
        """The parts of a row that its grader reads; known once it is ready."""
        self.batch_size = 8
        self.death = ""  # how it died, once buried
        self._received = 0
        self._killed = False
        self._sent = self._heard = 0.0
        self._spec = spec
        self._is_async = False
        self._limit_seconds = spec.timeout_seconds + KILL_GRACE_SECONDS
        self._started = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs, page_file() as page:
            self._page = ProgressPage(page.fileno())
            arguments = [spec.to_json(), theirs.fileno(), page.fileno(), memory_bytes]
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "common.grading.worker",
                    *map(str, arguments),
                ],
                env=worker_environment(),
                pass_fds=(theirs.fileno(), page.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what a rule starts ends with it
            )
        self.connection = Connection(ours.detach())
        self.exit_descriptor = os.pidfd_open(self._process.pid)
        """Readable once the process is gone: a child of a rule's may keep the connection open beyond that."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, jobs: list[Job]) -> None:
        """Sends to a waiting worker, so it never blocks for long; a dead one shows at the next receive."""
        self.batch.extend(jobs)
        self._received, self._sent = 0, time.monotonic()
        self._heard = self._sent
        try:
            tasks = [(job.prompt, job.completion, job.answer, job.token_ids) for job in jobs]
            self.connection.send_bytes(pickle.dumps(tasks, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self._process.kill()

    def receive(self) -> list[tuple[Job, Grade]]:
        """The next finished items; EOFError once the process is gone and all it said is read.

        ValueError if the worker could not load its grader.
        """
        try:
            message = pickle.loads(self.connection.recv_bytes())
        except OSError as error:
            raise EOFError from error
        if not self.ready:
            if isinstance(message, str):
                raise ValueError(message)
            self.ready = True
            self._is_async, self.needs = message
            if self._is_async:
                self.batch_size = ROUNDS * self._spec.max_concurrent
            return []
        self._received += len(message)
        self._heard = time.monotonic()
        finished = [(self.batch.popleft(), Grade.of(values)) for values in message]
        if not self.batch and not self._is_async:
            fast = time.monotonic() - self._sent < BATCH_SECONDS
            self.batch_size = min(MAX_BATCH, 2 * self.batch_size) if fast else max(1, self.batch_size // 2)
        return finished

    def seconds_left(self) -> float | None:
        """Until this process must be killed; None while it waits for work, or for its end."""
        if self._killed:
            return None
        if not self.ready:
            return self._started + START_SECONDS - time.monotonic()
        if not self.batch:
            return None
        progress = self._page.read()
        since = progress.started if progress.busy else max(self._heard, progress.started)
        return since + self._limit_seconds - time.monotonic()

    def kill(self) -> None:
        self._killed = True
        self._kill_group()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def bury(self) -> tuple[list[tuple[Job, Grade]], list[Job]]:
        """Reaps a dead process: what it finished, with a grade for the item that it died on, and the rest."""
        finished: list[tuple[Job, Grade]] = []
        with suppress(EOFError):
            while self.ready and self.connection.poll():
                finished += self.receive()
        self._kill_group()
        self.death = _death(self._process.wait(), killed=self._killed)
        progress = self._page.read()
        rest = list(self.batch)
        culprit = progress.position - self._received
        if self._is_async and len(rest) > 1:  # any of them may be what it died of
            rest, culprit = [replace(job, alone=True) for job in rest], -1
        late = time.monotonic() - progress.started >= self._limit_seconds
        if progress.busy and 0 <= culprit < len(rest) and (late or not self._killed):
            outcome = Outcome.VERIFIER_TIMEOUT if self._killed else Outcome.VERIFIER_CRASH
            finished.append((rest.pop(culprit), graded(outcome, reason=f"the grading process {self.death}")))
        self.batch.clear()
        self.connection.close()
        self._page.close()
        os.close(self.exit_descriptor)
        return finished, rest


def _death(status: int, *, killed: bool) -> str:
    if killed:
        return "was killed at its deadline"
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"left with exit status {status}"


def worker_environment() -> dict[str, str]:
    """gmpy cannot be interrupted and aborts when out of memory; sys.path makes a user's reward importable."""
    return {
        **os.environ,
        "SYMPY_GROUND_TYPES": "python",
        "MPMATH_NOGMPY": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *(os.path.abspath(entry) for entry in sys.path)]),
    }
