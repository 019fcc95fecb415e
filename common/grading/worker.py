"""The process that runs a rule: `python -m common.grading.worker`, started only by `WorkerProcess`.

It greets with None (or with why its grader cannot be loaded), then answers each batch with its grades, in order
and in parts. Everything a rule can do to it ends here: exceptions and endless Python loops in a grade, the rest
in its own death, which the parent reads from the progress page.
"""

import ctypes
import os
import pickle
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from common.errors import UserError
from common.grading.graders import Grader, find_grader
from common.grading.outcome import Grade, Outcome, graded
from common.grading.progress import ProgressPage

FLUSH_SECONDS = 0.02
ALARM_INTERVAL_SECONDS = 0.1  # an alarm that a bare `except` has swallowed is raised again
_PR_SET_PDEATHSIG = 1

Task = tuple[str, str | None, str]  # prompt, completion (None: validate the answer), answer


class _Deadline(BaseException):
    """Not an Exception: math-verify and sympy catch those."""


class Worker:
    """Grades batches from the connection until the parent closes it."""

    def __init__(
        self,
        grader: Grader,
        connection: Connection,
        page: ProgressPage,
        timeout_seconds: float,
    ) -> None:
        self.grader, self.connection, self.page = grader, connection, page
        self.timeout_seconds = timeout_seconds
        self.grading = False
        self.exhausted = False

    def serve(self) -> None:
        signal.signal(signal.SIGALRM, self._on_alarm)
        while not self.exhausted:
            try:
                batch = pickle.loads(self.connection.recv_bytes())
            except (EOFError, OSError):
                return
            self._grade_batch(batch)

    def _grade_batch(self, batch: list[Task]) -> None:
        grades: list[tuple[Any, ...]] = []
        flushed = time.monotonic()
        for index, task in enumerate(batch):
            self.page.start(index)
            grade = self._grade(*task)
            grades.append(
                (grade.outcome.value, grade.reward, grade.extracted, grade.reason, grade.step_rewards)
            )
            if self.exhausted:
                break
            if (now := time.monotonic()) - flushed > FLUSH_SECONDS:
                send(self.connection, grades)
                grades, flushed = [], now
        self.page.rest()
        send(self.connection, grades)

    def _grade(self, prompt: str, completion: str | None, answer: str) -> Grade:
        try:
            self.grading = True
            signal.setitimer(signal.ITIMER_REAL, self.timeout_seconds, ALARM_INTERVAL_SECONDS)
            try:
                if completion is None:
                    return self._validate(answer)
                return self.grader.grade(prompt, completion, answer)
            finally:
                self.grading = False
        except _Deadline:
            return graded(Outcome.VERIFIER_TIMEOUT, reason=f"over {self.timeout_seconds:g} s")
        except MemoryError:
            self.exhausted = True  # a fresh process is cheaper than one with a full heap
            return graded(Outcome.VERIFIER_CRASH, reason="out of memory")
        except BaseException as error:  # noqa: BLE001  a rule may raise anything: an outcome with its reason
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
    name, connection_fd, page_fd, timeout_seconds, memory_bytes = sys.argv[1:]
    connection, page = Connection(int(connection_fd)), ProgressPage(int(page_fd))
    os.close(int(page_fd))
    os.set_inheritable(int(connection_fd), False)

    def let_go() -> None:
        connection.close()
        page.close()

    os.register_at_fork(after_in_child=let_go)  # a rule's own processes
    limit_process(int(memory_bytes))
    try:
        grader = find_grader(name)
        grader.warm_up()
    except Exception as error:  # noqa: BLE001  whatever stops it is news for the parent
        send(connection, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        return
    send(connection, None)
    Worker(grader, connection, page, float(timeout_seconds)).serve()


if __name__ == "__main__":
    main()
