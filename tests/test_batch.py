"""Sequences into padded batches, and prompts into the endless row of epochs."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from stage2_train.batch import TOKENS_A_BATCH, TokenSequence, Totals, sum_by, token_batches
from stage2_train.data import prompt_batch
from tests.batches import batch_of, tensor

PAD = 99


def ragged(count: int, *, seed: int = 0) -> list[TokenSequence]:
    """Sequences whose tokens tell where they belong; prompts and completions of 1 to 9 tokens."""
    rng = random.Random(seed)
    return [
        TokenSequence(
            row=place,
            prompt_token_ids=tuple(1000 * place + index for index in range(rng.randint(1, 9))),
            completion_token_ids=tuple(1000 * place + 500 + index for index in range(rng.randint(1, 9))),
        )
        for place in range(count)
    ]


def alone(sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    return [[sequence] for sequence in sequences]


@pytest.mark.parametrize("budget", [1, 18, 40, 64, 100_000])
def test_every_sequence_comes_once_and_whole_whatever_the_budget(budget: int) -> None:
    sequences = ragged(23)
    found: Counter[int] = Counter()
    for batch in token_batches(alone(sequences), budget, PAD):
        for row, place in enumerate(batch.rows):
            found[place] += 1
            sequence = sequences[place]
            tokens = batch.input_ids_BT[row].tolist()
            padding = [PAD] * (len(tokens) - len(sequence))
            assert tokens == [*sequence.prompt_token_ids, *sequence.completion_token_ids, *padding]
            completion = batch.input_ids_BT[row][batch.is_completion_BT[row]].tolist()
            assert completion == list(sequence.completion_token_ids)
    assert found == Counter(range(23))


@pytest.mark.parametrize("budget", [1, 18, 40, 64])
def test_no_batch_is_over_the_budget_unless_one_sequence_is(budget: int) -> None:
    for batch in token_batches(alone(ragged(23)), budget, PAD):
        assert batch.input_ids_BT.numel() <= budget or len(batch.rows) == 1


def test_batches_are_few_and_hold_similar_lengths() -> None:
    sequences = ragged(40)
    batches = list(token_batches(alone(sequences), 60, PAD))
    padded = sum(batch.input_ids_BT.numel() for batch in batches)
    assert padded < 1.15 * sum(map(len, sequences))
    for batch, following in pairwise(batches):
        assert min(len(sequences[place]) for place in batch.rows) >= following.input_ids_BT.shape[1]


def cost(lengths: Sequence[int]) -> int:
    return len(lengths) * max(lengths) + TOKENS_A_BATCH


def cheapest(lengths: tuple[int, ...], budget: int) -> int:
    """The least cost of any cut of sorted lengths, by trying them all."""
    if not lengths:
        return 0
    return min(
        cost(lengths[:rows]) + cheapest(lengths[rows:], budget)
        for rows in range(1, len(lengths) + 1)
        if rows == 1 or rows * lengths[0] <= budget
    )


@pytest.mark.parametrize("budget", [1, 1200, 2500, 100_000])
def test_no_cut_costs_less(budget: int) -> None:
    lengths = (1000, 900, 880, 300, 290, 280, 270, 260, 30, 20, 10)
    sequences = [
        TokenSequence(row=place, prompt_token_ids=(1,), completion_token_ids=(1,) * (length - 1))
        for place, length in enumerate(lengths)
    ]
    found = list(token_batches(alone(sequences), budget, PAD))
    assert sum(cost([lengths[place] for place in batch.rows]) for batch in found) == cheapest(lengths, budget)
    if budget == 100_000:
        assert [len(batch.rows) for batch in found] == [3, 5, 3]


def test_no_sequences_make_no_batches() -> None:
    assert list(token_batches([], 10, PAD)) == []


def test_each_completion_token_knows_its_row() -> None:
    (batch,) = token_batches(alone(ragged(5)), 10_000, PAD)
    lengths = [len(ragged(5)[place].completion_token_ids) for place in batch.rows]
    assert batch.sequence_of_K.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize("budget", [1, 40, 64, 100_000])
def test_a_group_stays_in_one_batch_and_counts_as_a_whole(budget: int) -> None:
    sequences = ragged(24)
    groups = [sequences[start : start + 3] for start in range(0, 24, 3)]
    batches = list(token_batches(groups, budget, PAD))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(24))
    for batch in batches:
        for start in range(0, len(batch.rows), 3):
            first, *others = batch.rows[start : start + 3]
            assert others == [first + 1, first + 2]
            assert first % 3 == 0
        assert batch.input_ids_BT.numel() <= budget or len(batch.rows) == 3


def test_values_are_added_up_by_part() -> None:
    values_K, sequence_of_K = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert sum_by(values_K, sequence_of_K, 3).tolist() == [10.0, 0.0, 5.0]


def test_a_batch_knows_its_sequences_and_groups() -> None:
    batch = batch_of([2, 0, 1, 3], [1.0, 0.0, 4.0, 2.0], group_size=2)
    values_K = tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert batch.sequence_of_K.tolist() == [0, 0, 2, 3, 3, 3]
    assert batch.sum_by_sequence(values_K).tolist() == [3.0, 0.0, 4.0, 56.0]
    assert batch.mean_by_sequence(values_K).tolist() == [1.5, 0.0, 4.0, pytest.approx(56 / 3)]
    assert batch.group_size_B.tolist() == [2.0] * 4
    assert batch.mean_by_group(batch.rewards_B).tolist() == [0.5, 0.5, 3.0, 3.0]


def test_a_slice_of_a_batch_has_the_columns_of_its_rows_in_their_order() -> None:
    values_K = tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    batch = batch_of([2, 0, 1, 3], [1.0, 0.0, 4.0, 2.0], group_size=2, reference_K=values_K)
    totals = Totals(sequences=7, groups=3, tokens=20)
    part = batch.at([3, 0, 2], totals)
    assert part.lengths_B.tolist() == [3, 2, 1]
    assert part.rewards_B.tolist() == [2.0, 1.0, 4.0]
    assert part.reference_K.tolist() == [8.0, 16.0, 32.0, 1.0, 2.0, 4.0]
    assert part.group_of_B.tolist() == [1, 0, 1]
    assert part.mean_by_group(part.rewards_B).tolist() == [3.0, 1.0, 3.0]
    assert part.totals == totals
    assert part.vstar_B is None
    assert len(batch.at([], totals)) == 0


@pytest.mark.parametrize(("prompts", "batch_size"), [(10, 4), (7, 7), (5, 13), (12, 1)])
def test_each_epoch_has_each_prompt_once(prompts: int, batch_size: int) -> None:
    row: list[int] = []
    for iteration in range(1, 3 * prompts + 1):
        batch = prompt_batch(prompts, batch_size, seed=3, iteration=iteration)
        assert len(batch) == batch_size
        row += batch
    epochs = [row[start : start + prompts] for start in range(0, len(row) - prompts + 1, prompts)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(prompts))
    assert len({tuple(epoch) for epoch in epochs}) > 1 or prompts == 1


def test_the_order_of_prompts_does_not_depend_on_how_it_is_cut() -> None:
    def row(batch_size: int) -> list[int]:
        return [
            place
            for step in range(1, 60 // batch_size + 1)
            for place in prompt_batch(11, batch_size, 5, step)
        ]

    assert row(4) == row(5) == row(60) == row(1)


def test_the_order_of_prompts_follows_the_seed() -> None:
    assert prompt_batch(50, 20, 1, 4) == prompt_batch(50, 20, 1, 4)
    assert prompt_batch(50, 20, 1, 4) != prompt_batch(50, 20, 2, 4)
