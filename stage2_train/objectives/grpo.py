"""GRPO: PPO's clipped surrogate with advantages relative to a group. (Shao et al., 2024, arXiv:2402.03300, Eq. 3 and 4)

    A_i = (r_i − mean r) / std r          over the completions of one prompt, for each token of completion i
    ℓ(π) = mean over i of (1/|y_i|) Σ_t [ −min(ρ A_i, clip(ρ, 1 ± ε) A_i) + γ_KL k3(π, π_ref) ] − γ_H · entropy

with ρ = π/π_old of a token, std with n − 1, and the entropy's mean over tokens. The weights are those of the A*-PO
paper (Appendix A.5); `average = "token"` is Yu et al.'s variant (2025), `scale = "none"` that of Liu et al. (2025).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss
from stage2_train.objectives.surrogate import (
    Average,
    averaged,
    clipped_surrogate,
    kl_penalty,
    mean_and_deviation,
)

if TYPE_CHECKING:
    from stage2_train.batch import Batch, TokenLogprobs

SMALLEST_DEVIATION = 1e-4
"""Added to a group's standard deviation, as TRL does: equal rewards give advantages of 0."""


class GRPO(Section):
    """GRPO: the clip of a step, its penalty and bonus."""

    name: Literal["grpo"]
    group_size: Annotated[int, Field(ge=2)] = 2
    """Completions of each prompt; the A*-PO paper draws two."""
    passes: Annotated[int, Field(ge=1)] = 1
    """How often an iteration goes over its batch."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    kl: Annotated[float, Field(ge=0)] = 1e-4
    """γ_KL; with 0 no reference model is loaded."""
    entropy: Annotated[float, Field(ge=0)] = 1e-3
    """γ_H."""
    scale: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the standard deviation of the group or of the batch, or not at all."""
    average: Average = "sequence"

    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 2
    allows_staleness: ClassVar[bool] = False

    def needs(self, steps: int) -> frozenset[Column]:
        """ln π_old, if it differs from ln π, and ln π_ref, if the KL penalty is on."""
        columns: set[Column] = {"old"} if steps > 1 else set()
        return frozenset(columns | ({"reference"} if self.kl else set()))

    def credit(self, batch: Batch) -> Batch:
        """Advantages relative to the group."""
        advantages_B = batch.rewards_B - batch.mean_by_group(batch.rewards_B)
        if self.scale == "group":
            variance_B = batch.sum_by_group(advantages_B**2)[batch.group_of_B] / (batch.group_size_B - 1)
            advantages_B = advantages_B / (variance_B.sqrt() + SMALLEST_DEVIATION)
        elif self.scale == "batch":
            _, deviation = mean_and_deviation(batch.rewards_B, batch)
            advantages_B = (advantages_B / (deviation + SMALLEST_DEVIATION)).to(advantages_B.dtype)
        return batch.with_columns(advantages_B=advantages_B)

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The clipped surrogate with its penalty and bonus."""
        advantages_K = batch.advantages_B[batch.sequence_of_K]
        log_ratio_K = policy.logprobs_K - batch.before_update(policy.logprobs_K)
        surrogate = clipped_surrogate(log_ratio_K, advantages_K, self.clip_low, self.clip_high)
        token_loss_K = surrogate.loss_K
        figures = {
            "surrogate": batch.mean_by_sequence(surrogate.loss_K.detach()),
            "clipped": batch.mean_by_sequence(surrogate.is_clipped_K.to(advantages_K.dtype)),
        }
        if self.kl:
            penalty_K = kl_penalty(policy.logprobs_K, batch.reference_K)
            token_loss_K = token_loss_K + self.kl * penalty_K
            figures["kl"] = batch.mean_by_sequence(penalty_K.detach())
        share = averaged(token_loss_K, batch, self.average)
        if self.entropy:
            share = share - self.entropy * averaged(policy.entropy_K, batch, "token")
        return Loss(share, figures)
