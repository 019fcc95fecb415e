"""The process that runs a grader: `python -m common.grading.worker`, started only by `WorkerProcess`.

It greets with what its grader needs (or with why it cannot be loaded, as a text), then answers each batch with its
grades, in order and in parts. Everything a grader can do to it ends here: exceptions and endless Python loops in a
grade, the rest in its own death, which the parent reads from the progress page.
"""

import asyncio
import ctypes
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from common.errors import UserError
from common.grading.graders import Grader
from common.grading.outcome import Grade, Outcome, graded
from common.grading.progress import ProgressPage
from common.grading.spec import GraderSpec

FLUSH_SECONDS = 0.02
ALARM_INTERVAL_SECONDS = 0.1  # an alarm that a bare `except` has swallowed is raised again
BEAT_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1

Task = tuple[str, str | None, str, Sequence[int] | None]
"""Prompt, completion (None: validate the answer), answer, the completion's token ids where they are asked for."""


class _Deadline(BaseException):
    """Not an Exception: math-verify and sympy catch those."""


class Worker:
    """Grades batches from the connection until the parent closes it."""

    def __init__(self, grader: Grader, connection: Connection, page: ProgressPage) -> None:
        self.grader, self.connection, self.page = grader, connection, page
        self.timeout_seconds = grader.spec.timeout_seconds
        self.grading = False
        self.exhausted = False
        self._beat = 0.0
        self._tasks: list[asyncio.Task[Grade]] = []
        self._running: asyncio.Task[Any] | None = None
        self._own_tasks: set[asyncio.Task[None] | None] = set()

    def serve(self) -> None:
        if self.grader.is_async:
            asyncio.run(self._serve_async())
            return
        signal.signal(signal.SIGALRM, self._on_alarm)
        while not self.exhausted and (batch := self._next_batch()) is not None:
            self._grade_batch(batch)

    def _next_batch(self) -> list[Task] | None:
        try:
            return pickle.loads(self.connection.recv_bytes())  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return None

    def _grade_batch(self, batch: list[Task]) -> None:
        grades: list[Grade] = []
        flushed = time.monotonic()
        for index, task in enumerate(batch):
            self.page.start(index)
            grades.append(self._grade(*task))
            if self.exhausted:
                break
            if (now := time.monotonic()) - flushed > FLUSH_SECONDS:
                self._send(grades)
                grades, flushed = [], now
        self.page.rest()
        self._send(grades)

    def _send(self, grades: list[Grade]) -> None:
        send(self.connection, [grade.as_tuple() for grade in grades])

    def _grade(
        self, prompt: str, completion: str | None, answer: str, token_ids: Sequence[int] | None
    ) -> Grade:
        try:
            self.grading = True
            signal.setitimer(signal.ITIMER_REAL, self.timeout_seconds, ALARM_INTERVAL_SECONDS)
            try:
                if completion is None:
                    return self._validate(answer)
                return self.grader.grade(prompt, completion, answer, token_ids)
            finally:
                self.grading = False
        except BaseException as error:  # noqa: BLE001  a rule may raise anything: an outcome with its reason
            return self._failed(error)

    def _failed(self, error: BaseException) -> Grade:
        if isinstance(error, _Deadline):
            return graded(Outcome.VERIFIER_TIMEOUT, reason=f"over {self.timeout_seconds:g} s")
        if isinstance(error, MemoryError):
            self.exhausted = True  # a fresh process is cheaper than one with a full heap
            return graded(Outcome.VERIFIER_CRASH, reason="out of memory")
        return graded(Outcome.VERIFIER_CRASH, reason=f"{type(error).__name__}: {error}")

    def _validate(self, answer: str) -> Grade:
        problem = self.grader.validate_gold(answer)
        return graded(
            Outcome.CORRECT if problem is None else Outcome.GOLD_UNPARSED,
            answer,
            reason=problem,
        )

    def _on_alarm(self, signal_number: int, frame: FrameType | None) -> None:
        if self.grading:
            raise _Deadline

    # Graders that are waited for: many completions at a time, in one thread.

    async def _serve_async(self) -> None:
        """As `serve`. The alarm ends a grade that lets no other run."""
        signal.signal(signal.SIGALRM, self._on_late_beat)
        while not self.exhausted:
            batch = await asyncio.to_thread(self._next_batch)
            if batch is None:
                return
            await self._grade_together(batch)

    async def _grade_together(self, batch: list[Task]) -> None:
        under_way = asyncio.Semaphore(self.grader.spec.max_concurrent)
        tasks = [asyncio.create_task(self._grade_one(task, under_way)) for task in batch]
        self._tasks = tasks
        beating = asyncio.create_task(self._beat_on())
        self._own_tasks = {asyncio.current_task(), beating}
        self._beat_once()
        self.grading = True
        signal.setitimer(signal.ITIMER_REAL, ALARM_INTERVAL_SECONDS, ALARM_INTERVAL_SECONDS)
        try:
            for task in tasks:
                self._send([await task])
                if self.exhausted:
                    break
            self.grading = False  # no alarm may write to the page after this
            self.page.rest()  # not where the process ends: the parent would send again what ended it
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            beating.cancel()
            with suppress(asyncio.CancelledError):
                await beating

    async def _grade_one(self, task: Task, under_way: asyncio.Semaphore) -> Grade:
        prompt, completion, answer, token_ids = task
        async with under_way:
            try:
                if completion is None:
                    return self._validate(answer)
                return await self.grader.grade_async(prompt, completion, answer, token_ids)
            except BaseException as error:
                this = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and this is not None and this.cancelling():
                    raise
                return self._failed(error)

    async def _beat_on(self) -> None:
        while True:
            self._beat_once()
            await asyncio.sleep(BEAT_SECONDS)

    def _beat_once(self) -> None:
        """Tell the parent that none keeps the others from running, and which is the first that is not done."""
        self._beat = time.monotonic()
        self.page.start(next((place for place, task in enumerate(self._tasks) if not task.done()), 0))

    def _on_late_beat(self, signal_number: int, frame: FrameType | None) -> None:
        """Raise in the grade that is running, if it has kept all others from running for too long.

        Many that run one after the other, each for a while, are late together and none of them is.
        """
        running = asyncio.current_task()
        if not self.grading:
            return
        if running is not self._running:
            self._running = running
            self._beat_once()
        is_late = time.monotonic() - self._beat > self.timeout_seconds
        if is_late and running is not None and running not in self._own_tasks:
            raise _Deadline


def send(connection: Connection, message: object) -> None:
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def limit_process(memory_bytes: int) -> None:
    """Bounded memory, no core file, deaf to the terminal's Ctrl-C, and no life after the parent's."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    spec, connection_fd, page_fd, memory_bytes = sys.argv[1:]
    connection, page = Connection(int(connection_fd)), ProgressPage(int(page_fd))
    os.close(int(page_fd))
    os.set_inheritable(int(connection_fd), False)

    def let_go() -> None:
        connection.close()
        page.close()

    os.register_at_fork(after_in_child=let_go)  # a rule's own processes
    limit_process(int(memory_bytes))
    try:
        grader = Grader(GraderSpec.from_json(spec))
        needs = grader.load()
    except Exception as error:  # noqa: BLE001  whatever stops it is news for the parent
        send(connection, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        return
    send(connection, (grader.is_async, needs))
    Worker(grader, connection, page).serve()


if __name__ == "__main__":
    main()
