"""One optimizer step: the losses of its slices, their gradients, and a step of each trained network.

It depends neither on rollouts nor on the kind of objective.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor

from stage2_train.batch import ABSENT, Batch, Step, TokenBatch, Totals
from stage2_train.checkpoint import CRITIC, POLICY
from stage2_train.critic import Critic
from stage2_train.learner import Learner
from stage2_train.objectives.protocol import Loss, Objective, TrainsCritic
from stage2_train.policy import Policy
from stage2_train.ranks import Ranks
from stage2_train.records import ENTROPY, LOG_RATIO, LOGPROB_GAP, Records


class Trained(Protocol):
    """A network with the loss that trains it."""

    learner: Learner

    def loss(self, tokens: TokenBatch, batch: Batch) -> Loss:
        """A slice's share of the loss."""
        ...

    def nothing(self, tokens: TokenBatch) -> Tensor:
        """A share of 0 that runs through the network like the loss: under ZeRO-3 all ranks must run it."""
        ...


class TrainedPolicy:
    """The policy with its objective."""

    def __init__(self, policy: Policy, objective: Objective) -> None:
        self.learner = policy.learner
        self._policy = policy
        self._objective = objective

    def loss(self, tokens: TokenBatch, batch: Batch) -> Loss:
        """The objective's share, with its figures and those of the policy itself."""
        policy = self._policy.logprobs(tokens)
        loss = self._objective.loss(policy, batch)
        logprobs_K = policy.logprobs_K.detach()
        figures = {f"loss/{name}": values_B for name, values_B in loss.figures.items()}
        figures[ENTROPY] = batch.sum_by_sequence(policy.entropy_K.detach())
        if batch.reference_K is not ABSENT:
            figures[LOG_RATIO] = batch.sum_by_sequence(logprobs_K - batch.reference_K)
        if batch.sampled_K is not ABSENT:
            gaps_K = (logprobs_K - batch.sampled_K).abs()
            figures[LOGPROB_GAP] = gaps_K.new_zeros(len(batch)).scatter_reduce(
                0, batch.sequence_of_K, gaps_K, "amax"
            )
        return Loss(loss.share, figures)

    def nothing(self, tokens: TokenBatch) -> Tensor:
        """Like Trained.nothing."""
        policy = self._policy.logprobs(tokens)
        return self._objective.loss(policy, _blank(tokens, policy.logprobs_K.detach())).share * 0.0


class TrainedCritic:
    """The critic with the objective's loss for it."""

    def __init__(self, critic: Critic, objective: TrainsCritic) -> None:
        self.learner = critic.learner
        self._critic = critic
        self._objective = objective

    def loss(self, tokens: TokenBatch, batch: Batch) -> Loss:
        """The objective's share for the critic, with its figures."""
        loss = self._objective.critic_loss(self._critic.values(tokens), batch)
        return Loss(loss.share, {f"loss/{name}": values_B for name, values_B in loss.figures.items()})

    def nothing(self, tokens: TokenBatch) -> Tensor:
        """Like Trained.nothing."""
        return self._critic.values(tokens).sum() * 0.0


def _blank(tokens: TokenBatch, logprobs_K: Tensor) -> Batch:
    """A placeholder group of completions: all policies are equal, every other number is 0."""
    sequences = len(tokens.rows)
    zeros_B, zeros_K = logprobs_K.new_zeros(sequences), torch.zeros_like(logprobs_K)
    known = {"reference_K": logprobs_K, "old_K": logprobs_K}
    names = [field.name for field in fields(Batch) if field.name.endswith(("_B", "_K"))]
    columns = {name: known.get(name, zeros_B if name.endswith("_B") else zeros_K) for name in names}
    batch = Batch(
        group_of_B=zeros_B.long(),
        lengths_B=tokens.is_completion_BT.sum(1),
        rewards_B=zeros_B,
        totals=Totals(sequences=sequences, groups=1, tokens=len(logprobs_K)),
    )
    own = ("group_of_B", "lengths_B", "rewards_B")
    return batch.with_columns(**{name: column for name, column in columns.items() if name not in own})


def trained_parts(objective: Objective, policy: Policy, critic: Critic | None) -> dict[str, Trained]:
    """The networks that an objective trains, by their names in a checkpoint."""
    parts: dict[str, Trained] = {POLICY: TrainedPolicy(policy, objective)}
    if critic is not None:
        assert isinstance(objective, TrainsCritic)
        parts[CRITIC] = TrainedCritic(critic, objective)
    return parts


class Update:
    """Takes optimizer steps."""

    def __init__(self, parts: Mapping[str, Trained], ranks: Ranks) -> None:
        self.parts = parts
        self._ranks = ranks

    def __call__(self, step: Step, batch: Batch, records: Records) -> dict[str, float]:
        """One step of SGD on the losses, slice by slice; each part's gradient norm, NaN for a step that was skipped.

        `batch` holds the iteration's completions, with the objective's credit.
        """
        if step.totals.sequences == 0:
            return dict.fromkeys(self.parts, math.nan)
        turns = self._ranks.largest(len(step.slices))
        for turn in range(turns):
            is_last = turn == turns - 1
            if turn < len(step.slices):
                tokens = step.slices[turn]
                part_of_batch = batch.at(tokens.rows, step.totals)
                for part in self.parts.values():
                    loss = part.loss(tokens, part_of_batch)
                    part.learner.backward(loss.share, last=is_last)
                    records.note_slice(tokens.rows, loss.figures)
            else:
                for part in self.parts.values():
                    part.learner.backward(part.nothing(step.filler), last=is_last)
        norms = {name: part.learner.step() for name, part in self.parts.items()}
        records.note_step(step.rows, norms[POLICY])
        return norms
