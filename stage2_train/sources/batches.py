"""The interface of a source of batches, and which places of a batch are a rank's."""

from collections.abc import Sequence
from typing import Protocol

from common.rollout import Rollout
from stage2_train.config import TrainConfig
from stage2_train.metrics import Metrics
from stage2_train.ranks import Ranks

Group = list[Rollout]
"""The completions of one prompt, which stay together on one rank and in one optimizer step."""


class Units(Protocol):
    """Training data that is there before training begins, in the units that batches count."""

    @property
    def unit(self) -> str:
        """What a unit is, in the plural."""
        ...

    def __len__(self) -> int: ...

    def group(self, unit: int, visit: int) -> Group:
        """What is trained on at a visit of a unit; visits are counted from 0."""
        ...

    def digest(self) -> str:
        """A hash of everything that training reads."""
        ...

    def lines(self) -> list[str]:
        """The data, for people."""
        ...


class BatchSource(Protocol):
    """Gives a rank its share of each iteration's batch: one group for each of its places, in their order."""

    def groups(self, number: int, last: int, metrics: Metrics) -> list[Group]:
        """The share of iteration `number`; `last` is the run's last one. Adds figures of its own."""
        ...

    def waiting(self, version: int) -> list[list[Group]]:
        """The shares of the iterations after `version` that are there already; a checkpoint keeps them."""
        ...

    def resume(self, version: int, batches: Sequence[list[Group]]) -> None:
        """Continue after `version` iterations with the shares that were waiting at that point."""
        ...

    def close(self) -> None:
        """Begin no more work."""
        ...


def own_places(train: TrainConfig, ranks: Ranks) -> range:
    """The places of a rank's groups in a batch."""
    return range(ranks.rank, train.batch_size, ranks.world_size)


def flat(groups: Sequence[Group]) -> list[Rollout]:
    """The completions, group after group."""
    return [rollout for group in groups for rollout in group]
