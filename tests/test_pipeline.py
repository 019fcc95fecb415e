"""Batches are drawn from the weights that `train.staleness` says, at the same time as the trainer works."""

import json
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from threading import Semaphore
from typing import Any

import pytest
import torch
from torch import Tensor

from common.config import SamplingParams
from common.grading import Grade, Outcome
from common.rollout import Completion, Prompt, Rollout, SampleRequest
from stage2_train.metrics import Metrics
from stage2_train.ranks import Ranks
from stage2_train.sources.batches import flat
from stage2_train.sources.pipeline import RolloutPipeline
from stage2_train.sources.rollouts import as_json, from_json
from stage2_train.sources.sampler import Draw, Sampler

LAST = 8
"""Iterations."""
SECONDS = 20
"""Patience with a thread."""
PROMPTS = [
    Prompt(id=name, text=name, answer="", token_ids=array("I", [7]), token_hash="") for name in ("a", "b")
]


class VersionEngine:
    """Completes each prompt with the version of the weights that it holds, once it may."""

    def __init__(self, dies_at: Sequence[int] = ()) -> None:
        self.version = 0
        self.may_draw: Callable[[], object] = lambda: None
        self.draws = self.sleeps = 0
        self._dies_at = dies_at

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        self.draws += 1
        version = self.version
        self.may_draw()
        for number, request in enumerate(requests):
            if number == 1 and self.draws in self._dies_at:
                raise RuntimeError("CUDA error")
            assert self.version == version, "new weights in the middle of a draw"
            yield Completion(key=request.key, token_ids=(version,), text=f"{version}", truncated=False)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        ((_, weight),) = named_tensors
        self.version = int(weight)

    def sleep(self) -> None:
        self.sleeps += 1

    def close(self) -> None:
        pass


class BackwardPool:
    """Gives each completion its text as its reward, the last one first."""

    def __init__(self) -> None:
        self._grades: list[tuple[Hashable, Grade]] = []

    def submit(self, key: Hashable, *, completion: str, **_: Any) -> None:
        grade = Grade(outcome=Outcome.CORRECT, reward=float(completion), extracted="\ud800 1")
        self._grades.insert(0, (key, grade))

    def drain(self) -> list[tuple[Hashable, Grade]]:
        drained, self._grades = self._grades, []
        return drained


class Training:
    """A loop like stage 2's around a pipeline; the policy's weights are the number of finished iterations."""

    def __init__(self, staleness: int, *engines: VersionEngine) -> None:
        self.engines = engines or (VersionEngine(),)
        self.weight = torch.tensor(0)
        waiting, pool = iter(self.engines), BackwardPool()
        ranks = Ranks(0, 1, torch.device("cpu"))
        sampler = Sampler(lambda: next(waiting), pool, SamplingParams(), ranks)  # type: ignore[arg-type]
        self.pipeline = RolloutPipeline(sampler, staleness, self.draw_of, lambda: [("weight", self.weight)])

    def draw_of(self, number: int) -> Draw:
        return Draw(prompts=PROMPTS, places=range(2), seed=number)

    def version_drawn(self, number: int, metrics: Metrics | None = None) -> int:
        """The version of the weights behind an iteration's batch, after which the iteration ends."""
        groups = self.pipeline.groups(number, LAST, {} if metrics is None else metrics)
        version = version_of(flat(groups))
        self.weight.fill_(number)
        return version


def version_of(rollouts: Sequence[Rollout]) -> int:
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    (version,) = {rollout.completion.token_ids[0] for rollout in rollouts}
    assert [rollout.reward for rollout in rollouts] == [version, version]
    return version


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_completions_come_from_weights_that_lag_by_the_staleness(staleness: int) -> None:
    training = Training(staleness)
    drawn = [training.version_drawn(number) for number in range(1, LAST + 1)]
    assert drawn == [max(0, number - 1 - staleness) for number in range(1, LAST + 1)]
    assert training.engines[0].draws == LAST
    assert training.engines[0].sleeps == (0 if staleness else LAST)


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_later_batch_is_drawn_while_the_trainer_works(staleness: int) -> None:
    training = Training(staleness)
    may_end, has_begun = Semaphore(1), Semaphore(0)

    def hold() -> None:
        has_begun.release()
        assert may_end.acquire(timeout=SECONDS)

    training.engines[0].may_draw = hold
    training.pipeline.groups(1, LAST, {})
    # This is the trainer's turn: the second draw has begun, and cannot end before the next line but one.
    assert has_begun.acquire(timeout=SECONDS)
    assert has_begun.acquire(timeout=SECONDS)
    training.weight.fill_(1)
    may_end.release(LAST)
    drawn = [training.version_drawn(number) for number in range(2, LAST + 1)]
    assert drawn == [max(0, number - 1 - staleness) for number in range(2, LAST + 1)]


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_an_evaluation_is_of_the_current_policy_and_changes_no_later_batch(staleness: int) -> None:
    training = Training(staleness)
    drawn = []
    for number in range(1, LAST + 1):
        drawn.append(training.version_drawn(number))
        if number % 2 == 0:
            draw = Draw(prompts=PROMPTS, places=range(2), seed=-1)
            assert version_of(training.pipeline.now(draw, number)) == number
    assert drawn == [max(0, number - 1 - staleness) for number in range(1, LAST + 1)]


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("end", [1, 4, LAST - 1])
def test_a_restart_continues_with_the_batches_that_were_waiting(staleness: int, end: int) -> None:
    before = Training(staleness)
    drawn = [before.version_drawn(number) for number in range(1, end + 1)]
    waiting = before.pipeline.waiting(end)
    assert len(waiting) == min(staleness, LAST - end)
    written = json.dumps([[list(map(as_json, group)) for group in batch] for batch in waiting])
    prompts = {prompt.id: prompt for prompt in PROMPTS}
    read = [
        [[from_json(rollout, prompts) for rollout in group] for group in batch]
        for batch in json.loads(written)
    ]
    for batch, kept in zip(waiting, read, strict=True):
        assert [(one.prompt, one.grade) for one in flat(batch)] == [
            (one.prompt, one.grade) for one in flat(kept)
        ]
    for going_on in (
        before,
        Training(staleness),
    ):  # a checkpoint does not disturb the run that goes on, either
        if going_on is not before:
            going_on.weight.fill_(end)
            going_on.pipeline.resume(end, read)
        later = [going_on.version_drawn(number) for number in range(end + 1, LAST + 1)]
        assert drawn + later == [max(0, number - 1 - staleness) for number in range(1, LAST + 1)]


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_an_engine_that_dies_is_replaced_and_its_batch_drawn_from_the_current_weights(
    staleness: int, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(staleness, VersionEngine(dies_at=[4]), VersionEngine())
    metrics: list[Metrics] = [{} for _ in range(LAST)]
    drawn = [training.version_drawn(number, metrics[number - 1]) for number in range(1, LAST + 1)]
    expected = [max(0, number - 1 - staleness) for number in range(1, LAST + 1)]
    assert drawn[3] == 3
    assert [row["engine/rebuilds"] for row in metrics] == [0, 0, 0, 1, 0, 0, 0, 0]
    # The dead engine may hold others that were begun before it was noticed: those are drawn anew as well.
    assert drawn[:3] + drawn[4 + staleness :] == expected[:3] + expected[4 + staleness :]
    assert all(
        low <= found < number for number, (low, found) in enumerate(zip(expected, drawn, strict=True), 1)
    )
    assert "the rollout engine died (RuntimeError: CUDA error)" in capsys.readouterr().err


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("dies_at", [3, 4, 5, 6])
def test_an_engine_may_die_around_evaluations(staleness: int, dies_at: int) -> None:
    """Whatever it dies of, evaluations are of the current policy, and grades belong to their completions."""
    training = Training(staleness, VersionEngine(dies_at=[dies_at]), VersionEngine())
    for number in range(1, LAST + 1):
        drawn = training.version_drawn(number)
        assert max(0, number - 1 - staleness) <= drawn < number
        draw = Draw(prompts=PROMPTS, places=range(2), seed=-1)
        assert version_of(training.pipeline.now(draw, number)) == number
    assert training.engines[0].draws >= dies_at  # those that were begun by then fail likewise, or succeed


def test_the_end_of_a_job_does_not_wait_for_what_is_being_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(1)
    may_go_on, has_begun = Semaphore(1), Semaphore(0)

    def hold() -> None:
        has_begun.release()
        assert may_go_on.acquire(timeout=SECONDS)

    training.engines[0].may_draw = hold
    training.pipeline.groups(1, LAST, {})
    for _draw in (1, 2):
        assert has_begun.acquire(timeout=SECONDS)
    training.pipeline.close()
    may_go_on.release()
    ((_, attempt),) = training.pipeline._begun
    assert attempt() is None
    assert capsys.readouterr().err == ""
