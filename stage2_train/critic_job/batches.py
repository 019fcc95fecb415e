"""Trajectories as optimizer steps and as tensors.

Shapes: _B trajectory of the micro-batch, _T position, _S state of the micro-batch, in row order.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.seeds import derive_seed
from stage2_train.batch import TokenSequence, token_batches
from stage2_train.critic_job.states import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """A micro-batch: the tokens of some trajectories, and where their states end."""

    input_ids_BT: Tensor
    is_state_BT: Tensor
    """Marks the last token of each state."""
    states: tuple[int, ...]
    """The numbers of its S states."""


def state_batches(
    trajectories: Sequence[Trajectory], tokens_per_batch: int, pad_token_id: int, device: torch.device
) -> list[StateBatch]:
    """Cut trajectories into micro-batches of similar length under a budget of padded tokens."""
    units = [
        [TokenSequence(row=row, prompt_token_ids=tuple(each.token_ids), completion_token_ids=())]
        for row, each in enumerate(trajectories)
    ]
    batches = []
    for tokens in token_batches(units, tokens_per_batch, pad_token_id):
        is_state_BT = torch.zeros_like(tokens.is_completion_BT)
        rows = [trajectories[row] for row in tokens.rows]
        for number, trajectory in enumerate(rows):
            is_state_BT[number, torch.tensor(trajectory.ends) - 1] = True
        batches.append(
            StateBatch(
                input_ids_BT=tokens.input_ids_BT.to(device, non_blocking=True),
                is_state_BT=is_state_BT.to(device, non_blocking=True),
                states=tuple(state for trajectory in rows for state in trajectory.states),
            )
        )
    return batches


def optimizer_steps(
    trajectories: Sequence[Trajectory], batch_size: int, seed: int, epoch: int
) -> list[list[Trajectory]]:
    """An epoch's trajectories in random order, cut into steps of about `batch_size` states.

    A trajectory is never split, and no step is much smaller than the others.
    """
    order = list(trajectories)
    random.Random(derive_seed(seed, "critic", epoch)).shuffle(order)
    total = sum(len(each.states) for each in order)
    steps: list[list[Trajectory]] = [[] for _ in range(max(1, round(total / batch_size)))]
    before = 0
    for each in order:
        middle = before + len(each.states) / 2
        steps[int(middle * len(steps) / total)].append(each)
        before += len(each.states)
    return [step for step in steps if step]


def share_of(trajectories: Sequence[Trajectory], rank: int, world_size: int) -> list[Trajectory]:
    """A rank's part of some trajectories: about as many tokens as the others'."""
    return sorted(trajectories, key=len, reverse=True)[rank::world_size]
