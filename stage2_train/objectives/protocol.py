"""What an objective is: one function that assigns credit over a step, one that gives a slice's share of the loss."""

from typing import Protocol

from torch import Tensor

from stage2_train.batch import MicroBatch


class Objective(Protocol):
    """An objective, with its own hyper-parameters.

    Shapes: _B sequence, _K completion token of the micro-batch (all its sequences', one after the other).
    """

    def advantages(self, rewards_B: Tensor, vstar_B: Tensor) -> Tensor:
        """Credit for each sequence, shape (B,), from its reward and its prompt's V̂*."""
        ...

    def loss(self, logprobs_K: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """This slice's share of the step's loss (a scalar), and each sequence's own loss (detached, shape (B,)).

        Shares are divided by the step's totals, carried in the batch, so that they add up over slices and ranks.
        """
        ...
