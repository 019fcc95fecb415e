"""Rollouts as tensors: sorted by length, cut into micro-batches under a token budget, padded on the right.

Right padding needs no attention mask: a causal model's real tokens never see the padding that follows them.

Shapes: _B sequence, _T position (prompt and completion, padded), _K completion token of the micro-batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from common.rollout import Rollout

TOKENS_A_BATCH = 512
"""What a forward and backward pass costs however small it is, in tokens: weights are read, gradients written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """A prompt with its completion, and where it stands in the step's rollouts."""

    place: int
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, place: int, rollout: Rollout) -> Self:
        """The tokens of a rollout."""
        return cls(
            place=place,
            prompt_token_ids=tuple(rollout.prompt.token_ids),
            completion_token_ids=rollout.completion.token_ids,
        )

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The tokens of some sequences, and which of them are completion tokens."""

    places: tuple[int, ...]
    input_ids_BT: Tensor
    is_completion_BT: Tensor
    """Marks the positions that hold a completion token."""

    @property
    def sequence_of_K(self) -> Tensor:
        """The row of each completion token."""
        return self.is_completion_BT.nonzero()[:, 0]

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on another device."""
        return TokenBatch(
            places=self.places,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            is_completion_BT=self.is_completion_BT.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What an objective needs of a slice of a step besides the policy's log-probs."""

    sequence_of_K: Tensor
    reference_logprobs_K: Tensor
    advantages_B: Tensor
    step_sequences: int
    """The number of sequences in the whole optimizer step, over all slices and ranks."""

    def sum_by_sequence(self, values_K: Tensor) -> Tensor:
        """Add up each sequence's completion tokens, shape (B,)."""
        return sum_by_sequence(values_K, self.sequence_of_K, len(self.advantages_B))


def sum_by_sequence(values_K: Tensor, sequence_of_K: Tensor, sequences: int) -> Tensor:
    """Add up the values of each sequence, shape (B,)."""
    return values_K.new_zeros(sequences).index_add(0, sequence_of_K, values_K)


def token_batches(
    sequences: Sequence[TokenSequence], tokens_per_batch: int, pad_token_id: int
) -> Iterator[TokenBatch]:
    """Cut sequences into batches of similar length, each at most `tokens_per_batch` padded tokens.

    Of all such cuts of the sequences sorted by length, the one that costs least: a batch costs its padded tokens, and
    as much as `TOKENS_A_BATCH` more for being one. A single sequence that is longer than allowed makes one alone.
    """
    rows = sorted(sequences, key=len, reverse=True)
    costs, starts = [0], [0]  # of the best cut of the first so many rows, and where its last batch starts
    for end in range(1, len(rows) + 1):
        best = (costs[end - 1] + len(rows[end - 1]) + TOKENS_A_BATCH, end - 1)
        for start in range(end - 2, -1, -1):
            padded = (end - start) * len(rows[start])
            if padded > tokens_per_batch:
                break
            best = min(best, (costs[start] + padded + TOKENS_A_BATCH, start))
        costs.append(best[0])
        starts.append(best[1])
    ends = [len(rows)]
    while ends[-1] > 0:
        ends.append(starts[ends[-1]])
    for start, end in pairwise(reversed(ends)):
        yield _pad(rows[start:end], pad_token_id)


def _pad(rows: Sequence[TokenSequence], pad_token_id: int) -> TokenBatch:
    input_ids_BT = torch.full((len(rows), len(rows[0])), pad_token_id)
    is_completion_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for number, row in enumerate(rows):
        input_ids_BT[number, : len(row)] = torch.tensor(row.prompt_token_ids + row.completion_token_ids)
        is_completion_BT[number, len(row.prompt_token_ids) : len(row)] = True
    return TokenBatch(
        places=tuple(row.place for row in rows), input_ids_BT=input_ids_BT, is_completion_BT=is_completion_BT
    )
