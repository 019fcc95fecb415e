"""Turns a rank's rollouts of an iteration into the batch that its objective sees, and into optimizer steps on it.

Shapes: _B sequence, _K completion token.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.data.rendering import PromptRenderer
from common.rollout import Rollout
from stage2_train.batch import Batch, Step, TokenBatch, TokenSequence, Totals, token_batches
from stage2_train.config import TrainConfig
from stage2_train.data import Stage1
from stage2_train.objectives.protocol import STAGE1_COLUMNS, Column
from stage2_train.prompt_history import PromptHistory
from stage2_train.ranks import Ranks
from stage2_train.sources.batches import Group, flat


@dataclass(frozen=True, slots=True, kw_only=True)
class Collated:
    """The batch and steps of an iteration; `rows` gives the rollout, counted over all groups, of each of its rows."""

    batch: Batch
    steps: Sequence[Step]
    rows: Sequence[int]


class Cutter:
    """Cuts units of sequences, which stay together, into micro-batches on this rank's device."""

    def __init__(self, train: TrainConfig, renderer: PromptRenderer, ranks: Ranks) -> None:
        self._pad_token_id = renderer.pad_token_id
        self._budget = train.tokens_per_micro_batch
        self._device = ranks.device

    def __call__(self, units: Sequence[Sequence[TokenSequence]]) -> list[TokenBatch]:
        return [batch.to(self._device) for batch in token_batches(units, self._budget, self._pad_token_id)]


Value = Callable[[Rollout], float]
"""A value of a completion that follows from its prompt's past."""


def known_values(
    columns: frozenset[Column], stage1: Stage1 | None, history: PromptHistory | None
) -> dict[str, Value]:
    """The columns with one number per completion that come from stage 1, or from the prompt's history since."""
    values: dict[str, Value] = {}
    assert stage1 or columns.isdisjoint(STAGE1_COLUMNS), "the objective needs stage 1"
    if "vstar" in columns and stage1:
        values["vstar_B"] = lambda rollout: stage1.vstar[rollout.prompt.id]
    if "advantage" in columns:
        values["advantages_B"] = _known_advantage
    if "quantile" in columns and stage1:
        values["quantile_B"] = lambda rollout: quantile(rollout.reward, stage1.rewards[rollout.prompt.id])
    if "expected" in columns:
        assert history, "who expects a reward keeps a history"
        values["expected_B"] = lambda rollout: history.expected(rollout.prompt.id)
    return values


def _known_advantage(rollout: Rollout) -> float:
    assert rollout.advantage is not None, "it comes from a table of advantages"
    return rollout.advantage


def quantile(reward: float, rewards: Sequence[float]) -> float:
    """The share of the rewards that do not exceed it."""
    return sum(other <= reward for other in rewards) / len(rewards)


class Collator:
    """Puts rollouts into tensors: a prompt's completions, its group, one after the other and in one step."""

    def __init__(
        self,
        train: TrainConfig,
        values: Mapping[str, Value],
        renderer: PromptRenderer,
        cut: Cutter,
        ranks: Ranks,
    ) -> None:
        """`values` are columns by name; the renderer maps tokens to positions in the text."""
        self._train = train
        self._objective = train.objective
        self._values = values
        self._renderer = renderer
        self._cut = cut
        self._ranks = ranks

    def __call__(self, groups: Sequence[Group], places: Sequence[int]) -> Collated:
        """The batch and the steps of these groups; `places` number them in the whole job.

        A collective operation. Completions that the grader could not judge are left out, and so is a group in which too
        few are left for the objective.
        """
        rollouts = flat(groups)
        rows: list[int] = []
        members: list[list[TokenSequence]] = []
        start = 0
        for group in groups:
            judged = [start + at for at, rollout in enumerate(group) if rollout.is_judged]
            if len(judged) < self._objective.least_judged:
                judged = []
            members.append([TokenSequence.of(len(rows) + at, rollouts[row]) for at, row in enumerate(judged)])
            rows += judged
            start += len(group)
        steps = self._steps(groups, members, places)
        group_of = [number for number, group in enumerate(filter(None, members)) for _ in group]
        batch = self._batch([rollouts[row] for row in rows], group_of, steps)
        return Collated(batch=batch, steps=steps, rows=rows)

    def _batch(self, rollouts: Sequence[Rollout], group_of: Sequence[int], steps: Sequence[Step]) -> Batch:
        rewards_B = self._per_sequence([rollout.reward for rollout in rollouts])
        lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
        columns: dict[str, Tensor] = {}
        for name, value in self._values.items():
            columns[name] = self._per_sequence([value(rollout) for rollout in rollouts])
        if "rewards" in self._train.columns:
            columns["rewards_K"] = self._rewards_by_token(rollouts)
        if any(rollout.completion.sampled_logprobs is not None for rollout in rollouts):
            columns["sampled_K"] = self._sampled_logprobs(rollouts)
        return Batch(
            group_of_B=torch.tensor(group_of, dtype=torch.long, device=self._ranks.device),
            lengths_B=torch.tensor(lengths, dtype=torch.long, device=self._ranks.device),
            rewards_B=rewards_B,
            totals=Totals.together(step.totals for step in steps),
            sum_over_ranks=self._ranks.sum,
            **columns,
        )

    def _per_sequence(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._ranks.device)

    def _rewards_by_token(self, rollouts: Sequence[Rollout]) -> Tensor:
        values: list[float] = []
        for rollout in rollouts:
            values += rewards_by_token(rollout, self._renderer.decode)
        return self._per_sequence(values)

    def _sampled_logprobs(self, rollouts: Sequence[Rollout]) -> Tensor:
        values: list[float] = []
        for rollout in rollouts:
            sampled = rollout.completion.sampled_logprobs
            values += [math.nan] * len(rollout.completion.token_ids) if sampled is None else sampled
        return self._per_sequence(values)

    def _steps(
        self,
        groups: Sequence[Group],
        members: Sequence[Sequence[TokenSequence]],
        places: Sequence[int],
    ) -> list[Step]:
        """The steps on `members`, the sequences of each group that are trained on."""
        train = self._train
        work: list[tuple[list[TokenBatch], TokenBatch]] = []
        counts: list[list[int]] = []
        for number in range(train.batch_size // train.mini_batch_size):
            ours = [at for at, place in enumerate(places) if place // train.mini_batch_size == number]
            units = [members[at] for at in ours if members[at]]
            sequences = [sequence for unit in units for sequence in unit]
            if self._objective.unit == "sequence":
                units = [[sequence] for sequence in sequences]
            slices = self._cut(units)
            filler = slices[-1] if slices else self._idle(groups[ours[0]])
            work.append((slices, filler))
            tokens = sum(len(sequence.completion_token_ids) for sequence in sequences)
            counts.append([len(sequences), sum(bool(members[at]) for at in ours), tokens])
        everywhere = self._ranks.sum(torch.tensor(counts, device=self._ranks.device)).tolist()
        return [
            Step(
                slices=slices,
                filler=filler,
                totals=Totals(sequences=sequences, groups=groups_there, tokens=tokens),
            )
            for (slices, filler), (sequences, groups_there, tokens) in zip(work, everywhere, strict=True)
        ]

    def _idle(self, group: Group) -> TokenBatch:
        """Input for the networks if nothing of a step was judged on this rank: a unit of a group that was not."""
        unit = group if self._objective.unit == "group" else group[:1]
        (tokens,) = self._cut([[TokenSequence.of(-1, rollout) for rollout in unit]])
        return tokens


def rewards_by_token(rollout: Rollout, decode: Callable[[Sequence[int]], str]) -> list[float]:
    """The reward of each token: a step's reward goes to the token that ends it, the completion's to the last token.

    The last token ends the completion: an EOS, or the end of a stop string, which is not in the text. A step that ends
    with the text ends at that token.
    """
    token_ids, text = rollout.completion.token_ids, rollout.completion.text
    rewards = [0.0] * len(token_ids)
    for end, reward in rollout.graded.step_rewards or ((len(text), rollout.reward),):
        place = len(token_ids) - 1
        if end < len(text):
            places = range(len(token_ids))
            place = min(place, bisect_left(places, end, key=lambda at: len(decode(token_ids[: at + 1]))))
        if rewards:
            rewards[place] += reward
    return rewards
