"""SPO: one rollout per prompt, with a baseline that remembers the prompt. (Xu and Ding, 2025, arXiv:2509.13232)

    p̂(x) = α/(α + β)                                        before the completion counts
    A = r − p̂(x), whitened over the whole batch             in GRPO's clipped surrogate, averaged over tokens
    α ← ρ α + r,   β ← ρ β + 1 − r,   ρ = 2^(−D/0.06) clipped to [0.875, 0.96]

The initial values come from stage 1's S successes of N samples: α = N₀ (S + ½)/(N + 1), β = N₀ (N − S + ½)/(N + 1),
with N₀ = 1/(1 − 0.875) = 8. D is the policy's change since the prompt's last visit: the mean of |ln π_now − ln π_then|
over the tokens of that visit's completion, both taken after their iteration's update; 0 at the first visit. Formulas
and constants are those of the authors' code (verl-recipe/spo), without its sampling of prompts by their difficulty and
its bound on the surrogate of negative advantages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss, Tally
from stage2_train.objectives.surrogate import averaged, clipped_surrogate, whitened

if TYPE_CHECKING:
    from stage2_train.batch import Batch, TokenLogprobs

HALF_LIFE = 0.06
"""The drift that halves the weight of a prompt's history, in nats per token."""


class SPO(Section):
    """SPO: how fast it forgets, and the clip of a step."""

    name: Literal["spo"]
    least_kept: Annotated[float, Field(ge=0, lt=1)] = 0.875
    """The smallest ρ."""
    most_kept: Annotated[float, Field(ge=0, lt=1)] = 0.96
    """The largest ρ."""
    passes: Annotated[int, Field(ge=1)] = 1
    """How often an iteration goes over its batch."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.28

    group_size: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 1
    allows_staleness: ClassVar[bool] = False

    @model_validator(mode="after")
    def _kept_in_order(self) -> SPO:
        if self.least_kept > self.most_kept:
            raise ValueError(
                f"least_kept {self.least_kept} is above most_kept {self.most_kept}; exchange them"
            )
        return self

    def needs(self, steps: int) -> frozenset[Column]:
        """p̂, and ln π_old, if it differs from ln π."""
        columns: set[Column] = {"expected"}
        return frozenset(columns | ({"old"} if steps > 1 else set()))

    def credit(self, batch: Batch) -> Batch:
        """r − p̂, whitened."""
        return batch.with_columns(advantages_B=whitened(batch.rewards_B - batch.expected_B, batch))

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The clipped surrogate."""
        advantages_K = batch.advantages_B[batch.sequence_of_K]
        log_ratio_K = policy.logprobs_K - batch.before_update(policy.logprobs_K)
        surrogate = clipped_surrogate(log_ratio_K, advantages_K, self.clip_low, self.clip_high)
        return Loss(
            averaged(surrogate.loss_K, batch, "token"),
            {
                "surrogate": batch.mean_by_sequence(surrogate.loss_K.detach()),
                "clipped": batch.mean_by_sequence(surrogate.is_clipped_K.to(advantages_K.dtype)),
            },
        )

    def first_tally(self, rewards: Sequence[float]) -> Tally:
        """(α, β) of a prompt, from its rewards in stage 1."""
        weight = 1 / (1 - self.least_kept)
        successes, samples = sum(rewards), len(rewards)
        shares = (successes + 0.5, samples - successes + 0.5)
        return Tally(*(weight * share / (samples + 1) for share in shares))

    def next_tally(self, tally: Tally, reward: float, drift: float) -> Tally:
        """(α, β) after a visit, with the drift since the one before."""
        kept = min(max(2 ** (-drift / HALF_LIFE), self.least_kept), self.most_kept)
        return Tally(kept * tally.solved + reward, kept * tally.failed + 1 - reward)
