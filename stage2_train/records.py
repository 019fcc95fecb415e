"""The figures logged for each completion of an iteration, and their summary over all completions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from common.rollout import Rollout
from stage2_train.batch import ABSENT, Batch
from stage2_train.metrics import Metrics

LOG_RATIO = "log_ratio"
"""ln π/π_ref of a completion, if the objective has a reference."""
ENTROPY = "entropy"
"""Entropy of π, summed over the completion's tokens."""
LOGPROB_GAP = "logprob_gap"
"""The largest difference between the engine's and the trainer's log-prob of a token; nan if it was not compared."""


@dataclass(slots=True, kw_only=True)
class SequenceRecord:
    """The figures of one completion."""

    reward: float | None
    """Missing for a step of a solution, which has none of its own."""
    completion_tokens: int
    truncated: bool
    solved: bool
    unjudged: bool
    """The grader failed: the reward of 0 says nothing, and the completion is left out of the training."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """The parts of a reward that is a weighted sum, by name."""
    advantage: float | None = None
    trained: bool = False
    """Whether it took part in an optimizer step that was not skipped; otherwise the figures are meaningless."""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures from the losses, averaged over passes, by the name in the log or one of the names above."""
    steps: int = 0
    """Optimizer steps that it was part of, skipped ones too."""


class Records:
    """The records of a rank's rollouts; `rows` are those that are in its batch, in the batch's order."""

    def __init__(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> None:
        self.all = [
            SequenceRecord(
                reward=None if rollout.grade is None else rollout.grade.reward,
                completion_tokens=len(rollout.completion.token_ids),
                truncated=rollout.completion.truncated,
                solved=rollout.is_solved,
                unjudged=not rollout.is_judged,
                parts={} if rollout.grade is None else dict(rollout.grade.parts or ()),
            )
            for rollout in rollouts
        ]
        self._rows = rows

    def note_credit(self, batch: Batch) -> None:
        """Record the advantages, if the objective has any; for a completion, the mean over its tokens."""
        advantages_B = batch.advantages_B
        if batch.advantages_K is not ABSENT:
            advantages_B = batch.mean_by_sequence(batch.advantages_K)
        if advantages_B is not ABSENT:
            for row, advantage in zip(self._rows, advantages_B.tolist(), strict=True):
                self.all[row].advantage = advantage

    def note_slice(self, rows: Sequence[int], figures: Mapping[str, Tensor]) -> None:
        """Record the figures of a slice, each of shape (B,); `rows` are rows of the batch."""
        for name, values_B in figures.items():
            for row, value in zip(rows, values_B.tolist(), strict=True):
                record = self.all[self._rows[row]]
                before = record.figures.get(name, value)
                record.figures[name] = before + (value - before) / (record.steps + 1)

    def note_step(self, rows: Sequence[int], gradient_norm: float) -> None:
        """Record whether a step on these rows of the batch was taken."""
        for row in rows:
            self.all[self._rows[row]].steps += 1
            self.all[self._rows[row]].trained |= math.isfinite(gradient_norm)


def summarise(records: Sequence[SequenceRecord], seconds: float, *, drawn: bool) -> Metrics:
    """Rewards of the judged completions, figures of those trained on, lengths of all; NaN if there are none.

    What was not `drawn` by the policy but read gives no figures of rewards, truncation, KL and throughput, which would
    not be the policy's.
    """
    judged = [record for record in records if not record.unjudged]
    trained = [record for record in records if record.trained]
    tokens = sum(record.completion_tokens for record in records)
    trained_tokens = sum(record.completion_tokens for record in trained)
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    advantages = [record.advantage for record in trained if record.advantage is not None]

    def total(name: str) -> float:
        return sum(record.figures[name] for record in trained)

    def mean(name: str, over: Sequence[SequenceRecord]) -> float:
        return _ratio(sum(getattr(record, name) for record in over), len(over))

    return {
        **(
            {
                "reward/mean": mean("reward", judged),
                "reward/solved": mean("solved", judged),
                "reward/unjudged": mean("unjudged", records),
                **_means_of_parts(judged),
            }
            if drawn
            else {}
        ),
        **({"advantage/mean": _ratio(sum(advantages), len(advantages))} if advantages else {}),
        **{name: _ratio(total(name), len(trained)) for name in names if name.startswith("loss/")},
        **(_log_ratios(total(LOG_RATIO), len(trained), trained_tokens, drawn) if LOG_RATIO in names else {}),
        "completion/tokens_mean": tokens / len(records),
        "completion/tokens_max": max(record.completion_tokens for record in records),
        **({"completion/truncated": mean("truncated", records)} if drawn else {}),
        **({"policy/entropy": _ratio(total(ENTROPY), trained_tokens)} if ENTROPY in names else {}),
        **_largest_gap(records),
        **({"throughput/completion_tokens_per_second": tokens / seconds} if drawn else {}),
    }


def _log_ratios(total: float, sequences: int, tokens: int, drawn: bool) -> Metrics:
    """Means of ln π/π_ref: they estimate KL(π‖π_ref) if π has drawn the completions, and not if a file has them."""
    if not drawn:
        return {"policy/log_ratio": _ratio(total, sequences)}
    return {"kl/sequence": _ratio(total, sequences), "kl/token": _ratio(total, tokens)}


def _means_of_parts(records: Sequence[SequenceRecord]) -> Metrics:
    """The mean of each part over the completions that it applied to."""
    names = dict.fromkeys(name for record in records for name in record.parts)
    rewards = {name: [record.parts[name] for record in records if name in record.parts] for name in names}
    return {f"reward/{name}": sum(each) / len(each) for name, each in rewards.items()}


def _largest_gap(records: Sequence[SequenceRecord]) -> Metrics:
    gaps = [record.figures.get(LOGPROB_GAP, math.nan) for record in records]
    compared = [gap for gap in gaps if not math.isnan(gap)]
    return {"engine/logprob_gap": max(compared)} if compared else {}


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan
