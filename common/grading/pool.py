"""Grading beside an engine: worker processes, and one thread that feeds, times and replaces them.

The caller's thread only appends to a queue and collects what is finished; it waits for a full queue and for
nothing else. Every submitted completion ends in exactly one grade, whatever it does to a worker.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from types import TracebackType
from typing import Any, Self

from common.errors import UserError
from common.grading.config import GraderConfig, fingerprint
from common.grading.conventions import Needs
from common.grading.graders import RULES, Grader
from common.grading.judge import REFUSED, UNAVAILABLE, JudgeUsage
from common.grading.outcome import Grade, Outcome, graded
from common.grading.process import Inbox, Job, WorkerProcess
from common.grading.rule_custom import ADVICE, WRONG_TYPE

MAX_QUEUED = 16_384
MAX_QUEUED_CHARACTERS = 64 * 1024**2
MAX_FRUITLESS_DEATHS = 3
MAX_UNANSWERED = 8
"""Requests in a row that a judge may leave without an answer, each after its retries."""

MAX_ATTEMPTS = 3
"""Attempts to have one completion judged while the judge answers others."""

GATHER_SECONDS = 0.01
"""A single completion waits this long for others, because each message interrupts the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingTask:
    """One completion for `grade_all`."""

    prompt: str
    completion: str
    answer: str
    truncated: bool = False
    token_ids: Sequence[int] | None = None


class GraderPool:
    """Grades completions in killable processes; safe to use from any thread, and from several.

    Built before the engine it costs a second at most and refuses a grader that cannot be loaded (UserError).
    """

    def __init__(self, config: GraderConfig) -> None:
        self._config = config
        self._spec = config.spec
        fingerprint(config)  # refuses a function whose module is missing, in fewer words than a worker would
        self._max_characters = Grader(self._spec).max_completion_characters
        self.judge_usage = JudgeUsage()
        self._unanswered = 0
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._queued_characters = 0
        self._inbox = Inbox()
        self._starved = True  # a worker waits: the supervisor wants to hear of the next job
        self._waiting = 0  # callers that can do nothing until their grades are there
        self._closing = False
        self._started = False
        self._failure: Exception | None = None
        self._wake_reader, self._wake_writer = os.pipe()
        self._workers: list[WorkerProcess] = []
        self._needs = Needs()  # as the last worker said that greeted; one that was just started has not yet
        self._fruitless_deaths = 0
        self._supervisor = threading.Thread(target=self._supervise, name="grader-pool", daemon=True)
        self._supervisor.start()
        with self._changed:
            self._changed.wait_for(lambda: self._started or self._failure is not None)
        if self._failure is not None:
            failure = self._failure
            self.close()
            raise failure

    def submit(
        self,
        key: Hashable,
        *,
        prompt: str,
        completion: str,
        answer: str,
        truncated: bool,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        """Queues one completion; its grade comes back under `key`. Waits only while the queue is full."""
        self._submit(self._inbox, key, prompt, completion, answer, truncated, token_ids)

    def ready(self) -> list[tuple[Any, Grade]]:
        """Returns the grades that have finished since the last call, without waiting."""
        with self._changed:
            return self._collect(self._inbox)

    def drain(self) -> list[tuple[Any, Grade]]:
        """Waits for everything submitted so far and returns what has finished since the last call."""
        return self._wait(self._inbox)

    def grade_all(self, tasks: Iterable[GradingTask]) -> list[Grade]:
        """The grades in the order of the tasks; independent of what other callers have submitted."""
        inbox = Inbox()
        for position, task in enumerate(tasks):
            self._submit(
                inbox,
                position,
                task.prompt,
                task.completion,
                task.answer,
                task.truncated,
                task.token_ids,
            )
        return [grade for _, grade in sorted(self._wait(inbox), key=lambda pair: pair[0])]

    def validate_golds(self, answers: Sequence[str]) -> list[str | None]:
        """Returns the problem of each reference answer, or None, before anything is generated for it."""
        inbox = Inbox()
        for position, answer in enumerate(answers):
            self._enqueue(Job(inbox, position, "", None, answer))
        grades = [grade for _, grade in sorted(self._wait(inbox), key=lambda pair: pair[0])]
        return [None if grade.outcome is Outcome.CORRECT else grade.reason for grade in grades]

    @property
    def reads_token_ids(self) -> bool:
        """Whether the grader may read the token ids of completions."""
        return self._needs.token_ids or self._needs.may_read_token_ids

    def try_out(self, prompt: str, answer: str) -> None:
        """Has reward functions and the judge grade an empty completion, before anything is generated.

        Raises UserError if they return what is no reward whatever the completion, or the judge does not answer or
        refuses the request.
        """
        if not all(name in RULES for name in self._config.names):
            inbox = Inbox()
            self._enqueue(Job(inbox, None, prompt, "", answer, (), attempts=MAX_ATTEMPTS))
            ((_, grade),) = self._wait(inbox)
            self.judge_usage = JudgeUsage()  # of completions alone
            reason = grade.reason or ""
            if reason.startswith((UNAVAILABLE, REFUSED)):
                raise UserError(self._no_judge(reason))
            if not grade.is_judged and reason.startswith(WRONG_TYPE):
                raise UserError(
                    f"grader.name = {self._config.title} returns what is no reward: "
                    f"{reason.removeprefix(WRONG_TYPE)}; {ADVICE}"
                )

    def usage_lines(self) -> list[str]:
        """A line on the replies and tokens of the judge, if there was one."""
        return [str(self.judge_usage)] if self.judge_usage.replies else []

    def close(self) -> None:
        """Ends the workers; grades not collected by now are lost."""
        with self._changed:
            self._closing = True
            self._wake()
        self._supervisor.join()
        for descriptor in (self._wake_reader, self._wake_writer):
            if descriptor >= 0:
                os.close(descriptor)
        self._wake_reader = self._wake_writer = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # The caller's side.

    def _submit(
        self,
        inbox: Inbox,
        key: Hashable,
        prompt: str,
        completion: str,
        answer: str,
        truncated: bool,
        token_ids: Sequence[int] | None,
    ) -> None:
        if truncated:
            with self._changed:
                inbox.finished.append((key, graded(Outcome.TRUNCATED)))
            return
        if (
            self._max_characters is not None
        ):  # a built-in rule reads the end of the completion and nothing else
            prompt, completion = "", completion[-self._max_characters :]
        if not self.reads_token_ids:
            token_ids = None
        self._enqueue(Job(inbox, key, prompt, completion, answer, token_ids))

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            while len(self._queue) >= MAX_QUEUED or self._queued_characters >= MAX_QUEUED_CHARACTERS:
                self._check()
                self._changed.wait()
            self._check()
            job.inbox.pending += 1
            self._queue.append(job)
            self._queued_characters += job.characters
            if self._starved:
                self._wake()

    def _wait(self, inbox: Inbox) -> list[tuple[Any, Grade]]:
        with self._changed:
            self._waiting += 1
            try:
                while inbox.pending:
                    self._check()
                    self._changed.wait()
            finally:
                self._waiting -= 1
            return self._collect(inbox)

    def _collect(self, inbox: Inbox) -> list[tuple[Any, Grade]]:
        if inbox.pending:
            self._check()
        finished, inbox.finished = inbox.finished, []
        return finished

    def _check(self) -> None:
        if isinstance(self._failure, UserError):
            raise UserError(*self._failure.args) from None
        if self._failure is not None:
            raise RuntimeError("the grader pool has failed") from self._failure
        if self._closing:
            raise RuntimeError("the grader pool is closed")

    def _wake(self) -> None:
        if self._wake_writer >= 0:
            self._starved = False
            os.write(self._wake_writer, b".")

    # The supervising thread's side.

    def _supervise(self) -> None:
        try:
            self._workers = [self._spawn() for _ in range(self._config.workers)]
            while not self._closing:
                self._feed()
                self._listen()
                for worker in self._workers:
                    if (left := worker.seconds_left()) is not None and left <= 0:
                        worker.kill()
        except Exception as error:  # noqa: BLE001  callers wait on this thread: silence would hang them
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            for worker in self._workers:
                worker.kill()
                worker.bury()
            with self._changed:
                self._closing = True
                self._changed.notify_all()

    def _spawn(self) -> WorkerProcess:
        return WorkerProcess(self._spec, memory_bytes=self._config.memory_bytes)

    def _feed(self) -> None:
        """Gives every waiting worker its share of the queue."""
        waiting = [worker for worker in self._workers if worker.ready and not worker.batch]
        batches: list[list[Job]] = []
        with self._changed:
            for worker in waiting:
                size = min(worker.batch_size, -(-len(self._queue) // len(self._workers)))
                batches.append(self._next_batch(size))
                self._queued_characters -= sum(job.characters for job in batches[-1])
            self._starved = any(not batch for batch in batches)
            if any(batches):
                self._changed.notify_all()
        for worker, batch in zip(waiting, batches, strict=True):
            if batch:
                worker.send(batch)

    def _next_batch(self, size: int) -> list[Job]:
        """So many jobs from the front of the queue, or one that is to be alone."""
        batch: list[Job] = []
        while len(batch) < size and not (batch and self._queue[0].alone):
            batch.append(self._queue.popleft())
            if batch[-1].alone:
                break
        return batch

    def _listen(self) -> None:
        """Sleeps until a worker speaks or dies, a deadline passes, or a caller has work."""
        limits = [left for worker in self._workers if (left := worker.seconds_left()) is not None]
        speakers: dict[Any, WorkerProcess] = {worker.connection: worker for worker in self._workers}
        exits: dict[Any, WorkerProcess] = {worker.exit_descriptor: worker for worker in self._workers}
        timeout = max(0.0, min(limits)) if limits else None
        heard = connection.wait([*speakers, *exits, self._wake_reader], timeout)
        for speaker in heard:
            if speaker in speakers:
                self._receive(speakers[speaker])
            elif speaker in exits:
                if exits[speaker].connection not in heard:  # else all that it said is read first
                    self._bury(exits[speaker])
            else:
                os.read(self._wake_reader, 4096)
                if not self._waiting and not self._closing:
                    time.sleep(GATHER_SECONDS)

    def _hopeless(self, worker: WorkerProcess) -> str:
        return (
            f"the processes of grader.name = {self._config.title} die before they grade anything: "
            f"{self._fruitless_deaths} in a row, the last {worker.death}. Does it load within "
            f"grader.memory_gib = {self._config.memory_gib:g}, and does it import outside this job?"
        )

    def _receive(self, worker: WorkerProcess) -> None:
        try:
            finished = worker.receive()
        except ValueError as refusal:
            raise UserError(str(refusal)) from None
        except EOFError:
            self._bury(worker)
        else:
            self._fruitless_deaths = 0
            self._needs = worker.needs
            self._deliver(*self._answered(finished))

    def _answered(self, finished: list[tuple[Job, Grade]]) -> tuple[list[tuple[Job, Grade]], list[Job]]:
        """Splits these into finished grades and jobs to send again because the judge did not answer.

        Raises UserError after too many requests in a row without an answer.
        """
        done: list[tuple[Job, Grade]] = []
        again: list[Job] = []
        for job, grade in finished:
            if not (grade.reason or "").startswith(UNAVAILABLE):
                self._unanswered = 0
                done.append((job, grade))
                self.judge_usage += JudgeUsage.of(grade)
                continue
            self._unanswered += 1
            if self._unanswered >= MAX_UNANSWERED:
                raise UserError(self._no_judge(str(grade.reason)))
            if job.attempts < MAX_ATTEMPTS:
                again.append(replace(job, attempts=job.attempts + 1))
            else:
                done.append((job, grade))
        return done, again

    def _no_judge(self, reason: str) -> str:
        judge = self._config.judge
        assert judge is not None, "only a judge does not answer"
        return (
            f"{reason}; grader.judge.url = {judge.url!r}, model = {judge.model!r}: start it, or correct them "
            f"(its key, where it wants one, is read from ${judge.api_key_env}). The same command then goes on from "
            "what is kept"
        )

    def _bury(self, worker: WorkerProcess) -> None:
        """Replaces a dead worker; what it had not finished goes back to the front of the queue."""
        finished, rest = worker.bury()
        self._workers.remove(worker)
        self._fruitless_deaths += not finished
        if self._fruitless_deaths >= MAX_FRUITLESS_DEATHS:
            raise UserError(self._hopeless(worker))
        self._workers.append(self._spawn())
        self._deliver(finished, rest)

    def _deliver(self, finished: list[tuple[Job, Grade]], rest: list[Job]) -> None:
        with self._changed:
            self._started = self._started or all(each.ready for each in self._workers)
            for job, grade in finished:
                job.inbox.finished.append((job.key, grade))
                job.inbox.pending -= 1
            self._queue.extendleft(reversed(rest))
            self._queued_characters += sum(job.characters for job in rest)
            self._changed.notify_all()
