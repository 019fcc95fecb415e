"""Completions as tensors: the tokens, padded in micro-batches, and the columns of each completion and each token.

Tokens are sorted by length, cut into micro-batches under a token budget and padded on the right. Right padding needs no
attention mask: a causal model's real tokens never see the padding that follows them.

Shapes: _B sequence (a prompt with a completion), _G group (the completions of one prompt), _T position (prompt and
completion, padded), _K completion token (all sequences', one after the other).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from common.rollout import Rollout

ABSENT: Any = None
"""A column that the objective did not ask for."""
TOKENS_A_BATCH = 512
"""The fixed cost of a forward and backward pass, in tokens: it reads the weights and writes the gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """A prompt with its completion; `row` is its place in the `Batch` that it belongs to."""

    row: int
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, row: int, rollout: Rollout) -> Self:
        """The tokens of a rollout."""
        return cls(
            row=row,
            prompt_token_ids=tuple(rollout.prompt.token_ids),
            completion_token_ids=rollout.completion.token_ids,
        )

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """A micro-batch: the tokens of some sequences, and which of them are completion tokens."""

    rows: tuple[int, ...]
    input_ids_BT: Tensor
    is_completion_BT: Tensor
    """Marks the positions that hold a completion token."""

    @property
    def sequence_of_K(self) -> Tensor:
        """The sequence of each completion token, counted within this micro-batch."""
        return self.is_completion_BT.nonzero()[:, 0]

    def to(self, device: torch.device) -> "TokenBatch":
        """The same micro-batch on another device."""
        return TokenBatch(
            rows=self.rows,
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            is_completion_BT=self.is_completion_BT.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """ln π(y_t | x, y_<t) of each completion token, and the entropy of π there, both of shape (K,).

    Either may be part of a loss. An entropy that is not costs nothing in the backward pass.
    """

    logprobs_K: Tensor
    entropy_K: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Totals of an optimizer step over all its slices and all ranks, by which a slice's loss is divided."""

    sequences: int
    groups: int
    tokens: int

    @classmethod
    def together(cls, totals: Iterable["Totals"]) -> Self:
        """The totals of several steps together."""
        each = list(totals)
        return cls(
            sequences=sum(one.sequences for one in each),
            groups=sum(one.groups for one in each),
            tokens=sum(one.tokens for one in each),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """This rank's part of an optimizer step."""

    slices: Sequence[TokenBatch]
    filler: TokenBatch
    """Passed through the networks when only other ranks have slices left: under ZeRO-3 a pass is collective."""
    totals: Totals

    @property
    def rows(self) -> list[int]:
        """The rows of the iteration's batch that it trains on."""
        return [row for tokens in self.slices for row in tokens.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The data of some completions besides the policy's log-probs, in the columns that the objective needs.

    A prompt's completions are adjacent. Completions that the grader could not judge are left out.
    """

    group_of_B: Tensor
    """Which completions belong to one prompt: numbers from 0 on, in no particular order."""
    lengths_B: Tensor
    """Completion tokens."""
    rewards_B: Tensor
    """nan for a step of a solution, which has no reward of its own."""
    totals: Totals
    """Totals of the iteration in `credit`, of the step in `loss`."""
    vstar_B: Tensor = ABSENT
    """V̂* of the prompt, from stage 1."""
    quantile_B: Tensor = ABSENT
    """The share of the prompt's rewards in stage 1 that do not exceed the completion's."""
    expected_B: Tensor = ABSENT
    """The reward that is expected from the prompt's history."""
    rewards_K: Tensor = ABSENT
    """The reward given to each token: a step's reward at the step's last token, any other at the completion's last."""
    reference_K: Tensor = ABSENT
    """ln π_ref."""
    old_K: Tensor = ABSENT
    """ln π before the iteration's first step."""
    values_K: Tensor = ABSENT
    """The critic's value of the state before each token."""
    sampled_K: Tensor = ABSENT
    """The engine's own log-probs, nan if they were not requested."""
    advantages_B: Tensor = ABSENT
    advantages_K: Tensor = ABSENT
    returns_K: Tensor = ABSENT
    """Credit, which an objective's `credit` adds, or which is known from a file."""
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values
    """Adds up tensors of one shape; a collective operation, for `credit`."""

    def __len__(self) -> int:
        return len(self.lengths_B)

    @property
    def sequence_of_K(self) -> Tensor:
        """The row of each token."""
        rows_B = torch.arange(len(self), device=self.lengths_B.device)
        return rows_B.repeat_interleave(self.lengths_B)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return int(self.group_of_B.max()) + 1 if len(self) else 0

    def sum_by_sequence(self, values_K: Tensor) -> Tensor:
        """Add up each sequence's tokens, shape (B,)."""
        return sum_by(values_K, self.sequence_of_K, len(self))

    def mean_by_sequence(self, values_K: Tensor) -> Tensor:
        """The mean over each sequence's tokens, shape (B,); 0 for a sequence without one."""
        return self.sum_by_sequence(values_K) / self.lengths_B.clamp(min=1)

    def sum_by_group(self, values_B: Tensor) -> Tensor:
        """Add up each group's sequences, shape (G,)."""
        return sum_by(values_B, self.group_of_B, self.groups)

    @property
    def sizes_G(self) -> Tensor:
        """The size of each group, shape (G,)."""
        return self.sum_by_group(torch.ones_like(self.rewards_B))

    @property
    def group_size_B(self) -> Tensor:
        """The size of each sequence's group, shape (B,)."""
        return self.sizes_G[self.group_of_B]

    def mean_by_group(self, values_B: Tensor) -> Tensor:
        """The mean over the group of each sequence, shape (B,)."""
        return self.sum_by_group(values_B)[self.group_of_B] / self.group_size_B

    def before_update(self, logprobs_K: Tensor) -> Tensor:
        """ln π before the iteration's first step: the policy's own if that is the only step."""
        return logprobs_K.detach() if self.old_K is ABSENT else self.old_K

    def with_columns(self, **columns: Tensor) -> "Batch":
        """The same completions with these columns."""
        return replace(self, **columns)  # type: ignore[arg-type]

    def at(self, rows: Sequence[int], totals: Totals) -> "Batch":
        """Some of the sequences, in the given order, with the totals of the step that they belong to."""
        rows_B = torch.tensor(rows, dtype=torch.long, device=self.lengths_B.device)
        places_K = self.places_of(rows_B)
        taken = {}
        for field in fields(self):
            column = getattr(self, field.name)
            if isinstance(column, Tensor):
                taken[field.name] = column[places_K if field.name.endswith("_K") else rows_B]
        taken["group_of_B"] = taken["group_of_B"].unique(return_inverse=True)[1]
        return replace(self, totals=totals, **taken)  # type: ignore[arg-type]

    def places_of(self, rows_B: Tensor) -> Tensor:
        """The positions of these sequences' tokens among all tokens, sequence after sequence."""
        starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        lengths_B = self.lengths_B[rows_B]
        ends_B = lengths_B.cumsum(0)
        places_K = torch.arange(int(ends_B[-1]) if len(ends_B) else 0, device=rows_B.device)
        return places_K + (starts_B[rows_B] - ends_B + lengths_B).repeat_interleave(lengths_B)


def sum_by(values: Tensor, part_of: Tensor, parts: int) -> Tensor:
    """Add up the values of each part, one after the other, shape (parts,)."""
    return values.new_zeros(parts).index_add(0, part_of, values)


def token_batches(
    units: Sequence[Sequence[TokenSequence]], tokens_per_batch: int, pad_token_id: int
) -> Iterator[TokenBatch]:
    """Cut units of sequences into micro-batches of similar length, each at most `tokens_per_batch` padded tokens.

    A unit, one sequence or a group of them, stays together. Units are sorted by their longest sequence and cut where
    the total cost is least. A micro-batch costs its padded tokens plus `TOKENS_A_BATCH`. A single unit above the limit
    gets a micro-batch of its own.
    """
    ordered = sorted(units, key=_longest, reverse=True)
    costs = [0]  # costs[n] is the cost of the best cut of the first n units
    starts = [0]  # starts[n] is where that cut's last micro-batch starts
    for end in range(1, len(ordered) + 1):
        rows = len(ordered[end - 1])
        best = (costs[end - 1] + rows * _longest(ordered[end - 1]) + TOKENS_A_BATCH, end - 1)
        for start in range(end - 2, -1, -1):
            rows += len(ordered[start])
            padded = rows * _longest(ordered[start])
            if padded > tokens_per_batch:
                break
            best = min(best, (costs[start] + padded + TOKENS_A_BATCH, start))
        costs.append(best[0])
        starts.append(best[1])
    ends = [len(ordered)]
    while ends[-1] > 0:
        ends.append(starts[ends[-1]])
    for start, end in pairwise(reversed(ends)):
        yield _pad([sequence for unit in ordered[start:end] for sequence in unit], pad_token_id)


def _longest(unit: Sequence[TokenSequence]) -> int:
    return max(map(len, unit))


def _pad(sequences: Sequence[TokenSequence], pad_token_id: int) -> TokenBatch:
    input_ids_BT = torch.full((len(sequences), max(map(len, sequences))), pad_token_id)
    is_completion_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    for number, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence.prompt_token_ids + sequence.completion_token_ids)
        input_ids_BT[number, : len(sequence)] = tokens
        is_completion_BT[number, len(sequence.prompt_token_ids) : len(sequence)] = True
    return TokenBatch(
        rows=tuple(sequence.row for sequence in sequences),
        input_ids_BT=input_ids_BT,
        is_completion_BT=is_completion_BT,
    )
