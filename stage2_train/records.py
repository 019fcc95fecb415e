"""What is logged of each sequence of a step, and its summary over a step.

Shapes: _K completion token of the micro-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.grading import UNJUDGED, Outcome
from common.rollout import Rollout
from stage2_train.batch import MicroBatch, TokenBatch
from stage2_train.logprobs import TokenLogprobs
from stage2_train.metrics import Metrics


@dataclass(slots=True, kw_only=True)
class SequenceRecord:
    """What is logged of one sequence of a step."""

    reward: float
    advantage: float
    completion_tokens: int
    truncated: bool
    solved: bool
    unjudged: bool
    """The grader failed: the reward of 0 says nothing, and the sequence is left out of the regression."""
    regressed: bool = False
    """Whether it took part in an optimizer step that was not skipped; without that the figures below mean nothing."""
    loss: float = 0.0
    log_ratio: float = 0.0
    entropy: float = 0.0
    """Summed over the completion's tokens."""
    logprob_gap: float | None = None
    """The largest difference between the engine's and the trainer's log-prob of a token, where it was compared."""


def record_of(rollout: Rollout, advantage: float) -> SequenceRecord:
    return SequenceRecord(
        reward=rollout.grade.reward,
        advantage=advantage,
        completion_tokens=len(rollout.completion.token_ids),
        truncated=rollout.completion.truncated,
        solved=rollout.grade.outcome == Outcome.CORRECT,
        unjudged=rollout.grade.outcome in UNJUDGED,
    )


def note_slice(
    records: dict[int, SequenceRecord],
    tokens: TokenBatch,
    batch: MicroBatch,
    policy: TokenLogprobs,
    loss_B: Tensor,
) -> None:
    """Note the loss, log-ratio and entropy of a slice's sequences; `loss_B` is each sequence's own loss."""
    columns = (
        loss_B.tolist(),
        batch.sum_by_sequence(policy.logprobs_K.detach() - batch.reference_logprobs_K).tolist(),
        batch.sum_by_sequence(policy.entropy_K).tolist(),
    )
    for place, loss, log_ratio, entropy in zip(tokens.places, *columns, strict=True):
        records[place].loss = loss
        records[place].log_ratio = log_ratio
        records[place].entropy = entropy


def compare_logprobs(
    records: dict[int, SequenceRecord],
    tokens: TokenBatch,
    policy: TokenLogprobs,
    rollouts: dict[int, Rollout],
) -> None:
    """Note how far the engine's log-probs are from the trainer's; before the first step both have the same weights."""
    for row, place in enumerate(tokens.places):
        sampled = rollouts[place].completion.sampled_logprobs
        if sampled is not None:
            ours = policy.logprobs_K.detach()[tokens.sequence_of_K == row].cpu()
            records[place].logprob_gap = float((ours - torch.tensor(sampled)).abs().max())


def summarise(records: Sequence[SequenceRecord], seconds: float) -> Metrics:
    """Rewards of the judged sequences, losses of the regressed ones, lengths of all; NaN where there are none."""
    judged = [record for record in records if not record.unjudged]
    regressed = [record for record in records if record.regressed]
    tokens = sum(record.completion_tokens for record in records)
    regressed_tokens = sum(record.completion_tokens for record in regressed)
    gaps = [record.logprob_gap for record in records if record.logprob_gap is not None]

    def mean(name: str, over: Sequence[SequenceRecord]) -> float:
        return _ratio(sum(getattr(record, name) for record in over), len(over))

    return {
        "reward/mean": mean("reward", judged),
        "reward/solved": mean("solved", judged),
        "reward/unjudged": mean("unjudged", records),
        "advantage/mean": mean("advantage", regressed),
        "loss/regression": mean("loss", regressed),
        "kl/sequence": mean("log_ratio", regressed),
        "kl/token": _ratio(sum(record.log_ratio for record in regressed), regressed_tokens),
        "completion/tokens_mean": tokens / len(records),
        "completion/tokens_max": max(record.completion_tokens for record in records),
        "completion/truncated": mean("truncated", records),
        "policy/entropy": _ratio(sum(record.entropy for record in regressed), regressed_tokens),
        **({"engine/logprob_gap": max(gaps)} if gaps else {}),
        "throughput/completion_tokens_per_second": tokens / seconds,
    }


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan
