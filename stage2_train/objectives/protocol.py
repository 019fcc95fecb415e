"""The interface of an objective. Each is its own section of the config, `[train.objective]`, with its behaviour.

Shapes: _B sequence, _K completion token (all sequences', one after the other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from stage2_train.batch import Batch, TokenLogprobs

Column = Literal["vstar", "quantile", "expected", "advantage", "rewards", "reference", "old", "values"]
"""A column of Batch that only some objectives need."""
STAGE1_COLUMNS: frozenset[Column] = frozenset({"vstar", "quantile", "expected"})
"""The columns that only stage 1's file can give."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A slice's share of a step's loss: a scalar, divided by the step's totals, so that shares add up.

    `figures` are logged as loss/<name>: each is a number per sequence, shape (B,), detached, whose mean over the batch
    (and over its passes) is taken. The console shows the first one.
    """

    share: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """An objective: frozen, and it does not import torch until it is used."""

    @property
    def name(self) -> str:
        """The value of `train.objective.name` that selects it."""
        ...

    @property
    def group_size(self) -> int:
        """Completions of each prompt, which stay together on one rank and in one optimizer step; 0 if it draws none."""
        ...

    @property
    def passes(self) -> int:
        """How often an iteration goes over its batch."""
        ...

    @property
    def unit(self) -> Literal["sequence", "group"]:
        """The unit that a micro-batch must not split."""
        ...

    @property
    def least_judged(self) -> int:
        """A group with fewer completions that the grader could judge is left out."""
        ...

    @property
    def allows_staleness(self) -> bool:
        """Whether completions may come from older weights."""
        ...

    def needs(self, steps: int) -> frozenset[Column]:
        """The columns that it reads if an iteration has `steps` optimizer steps."""
        ...

    def credit(self, batch: Batch) -> Batch:
        """The rank's completions of a whole iteration with their advantages, per sequence or per token."""
        ...

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """A slice's share of the policy's loss."""
        ...


@runtime_checkable
class TrainsCritic(Protocol):
    """An objective that also trains a critic, whose values it reads."""

    @property
    def critic_learning_rate(self) -> float: ...

    def critic_loss(self, values_K: Tensor, batch: Batch) -> Loss:
        """A slice's share of the critic's loss; `batch.values_K` are the critic's before the iteration's first step."""
        ...


@dataclass(frozen=True, slots=True)
class Tally:
    """A prompt's history: the weight of its successes, and of its failures."""

    solved: float
    failed: float

    @property
    def expected(self) -> float:
        """The reward that is expected from it."""
        return self.solved / (self.solved + self.failed)


@runtime_checkable
class LearnsOffline(Protocol):
    """An objective that draws no completions: it learns from (state, action) pairs of a file, with their advantages."""

    @property
    def state_wise(self) -> bool:
        """Whether all actions of a state are in one batch and one optimizer step, or each has a place of its own."""
        ...


@runtime_checkable
class KeepsHistory(Protocol):
    """An objective whose baseline is a prompt's history, for rewards from 0 to 1."""

    def first_tally(self, rewards: Sequence[float]) -> Tally:
        """The tally of a prompt from its rewards in stage 1."""
        ...

    def next_tally(self, tally: Tally, reward: float, drift: float) -> Tally:
        """The tally after a visit. `drift` is the policy's change since the last one, in nats per token."""
        ...
