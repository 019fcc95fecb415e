"""Measures an iteration from outside: the engine's calls, each optimizer step, and the trainer's own memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import settled
from common.config import SamplingParams
from common.engines import RolloutEngine
from common.rollout import Completion, Rollout, SampleRequest
from stage2_train.batch import Batch, Step
from stage2_train.metrics import Metrics
from stage2_train.records import Records
from stage2_train.train import Trainer
from stage2_train.update import Update

GIB = 2**30


class TimedEngine:
    """An engine whose calls are timed; the seconds are those of the last call."""

    def __init__(self, build: Callable[[], RolloutEngine]) -> None:
        began = settled()
        self.engine = build()
        self.seconds = {"build": settled() - began}
        self.allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        """Bytes that torch counts for the engine, whether it is awake or asleep."""
        self.freed = 0
        """Bytes that the last sleep has given back to the device."""

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Like RolloutEngine.generate."""
        began = settled()
        yield from self.engine.generate(requests, sampling)
        self.seconds["generate"] = settled() - began

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Like RolloutEngine.load_weights."""
        with self._timed("load"):
            self.engine.load_weights(named_tensors)

    def sleep(self) -> None:
        """Like RolloutEngine.sleep."""
        free = free_bytes()
        with self._timed("sleep"):
            self.engine.sleep()
        self.freed = free_bytes() - free

    def close(self) -> None:
        """Like RolloutEngine.close."""
        self.engine.close()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = settled()
        yield
        self.seconds[name] = settled() - began


def free_bytes() -> int:
    """Of the device, as its driver counts; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def device_bytes() -> int:
    """The memory of the device; of a CPU's machine 0."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """An optimizer step that was taken."""

    seconds: float
    rows: Sequence[int]
    """Of the iteration's rollouts, all of which must have been judged."""
    slices: int
    padded: int
    """Tokens that went through the model, padding included."""

    def lengths(self, rollouts: Sequence[Rollout]) -> tuple[list[int], list[int]]:
        """The tokens of each sequence, and how many of them were sampled."""
        chosen = [rollouts[row] for row in self.rows]
        sampled = [len(rollout.completion.token_ids) for rollout in chosen]
        return [
            len(rollout.prompt.token_ids) + many for rollout, many in zip(chosen, sampled, strict=True)
        ], sampled


class TimedUpdate(Update):
    """A trainer's update, whose steps are timed; `seen` is called after each."""

    def __init__(self, trainer: Trainer[Any], seen: Callable[[TimedStep], None]) -> None:
        super().__init__(trainer.parts.update.parts, trainer.ranks)
        self._seen = seen
        trainer.parts = replace(trainer.parts, update=self)

    def __call__(self, step: Step, batch: Batch, records: Records) -> dict[str, float]:
        """Like Update.__call__."""
        began = settled()
        norms = super().__call__(step, batch, records)
        self._seen(
            TimedStep(
                seconds=settled() - began,
                rows=step.rows,
                slices=len(step.slices),
                padded=sum(tokens.input_ids_BT.numel() for tokens in step.slices),
            )
        )
        return norms


class TrainingPeak:
    """The most memory that torch has held for the trainer since the last rollouts, without that of an engine."""

    def __init__(self, trainer: Trainer[Any], engine_bytes: int) -> None:
        self._engine_bytes = engine_bytes
        self._score = trainer.score
        trainer.score = self._begin  # type: ignore[method-assign]

    def _begin(self, collated: Any, metrics: Metrics) -> Batch:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self._score(collated, metrics)

    @property
    def bytes(self) -> int:
        """0 without a GPU."""
        return torch.cuda.max_memory_allocated() - self._engine_bytes if torch.cuda.is_available() else 0
