"""PPO: a critic's advantages in a clipped surrogate. (Schulman et al., 2017, arXiv:1707.06347, as in RLHF)

    r_t = step reward − γ_KL (ln π_old − ln π_ref)                 the completion's reward goes to its last token
    Â_t = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V(s_{t+1}) − V(s_t)  (GAE; Schulman et al., 2016, arXiv:1506.02438)
    ℓ(π) = mean over tokens of −min(ρ Â, clip(ρ, 1 ± ε) Â) − γ_H · entropy
    ℓ(V) = mean over tokens of ½ max((V − R)², (clip(V, V_old ± c) − R)²),   R = Â + V_old

Â is whitened over the whole batch after R is computed. The weights are those of the A*-PO paper (Appendix A.5);
whitening and c, which it does not state, follow the trainer that the paper used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss
from stage2_train.objectives.surrogate import averaged, clipped_surrogate, whitened

if TYPE_CHECKING:
    from torch import Tensor

    from stage2_train.batch import Batch, TokenLogprobs


class PPO(Section):
    """PPO: the clip of a step, the assignment of credit, the penalty and the bonus."""

    name: Literal["ppo"]
    passes: Annotated[int, Field(ge=1)] = 1
    """How often an iteration goes over its batch."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε."""
    value_clip: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 0.5
    """c; inf switches it off."""
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0
    """γ."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ."""
    kl: Annotated[float, Field(ge=0)] = 1e-4
    """γ_KL; with 0 no reference model is loaded."""
    entropy: Annotated[float, Field(ge=0)] = 1e-3
    """γ_H."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5

    group_size: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 1
    allows_staleness: ClassVar[bool] = False

    def needs(self, steps: int) -> frozenset[Column]:
        """Rewards by token, ln π_old, V, and ln π_ref, if the KL penalty is on."""
        columns: set[Column] = {"rewards", "old", "values"}
        return frozenset(columns | ({"reference"} if self.kl else set()))

    def credit(self, batch: Batch) -> Batch:
        """Advantages and returns of each token."""
        rewards_K = batch.rewards_K
        if self.kl:
            rewards_K = rewards_K - self.kl * (batch.old_K - batch.reference_K)
        advantages_K = generalised_advantages(
            rewards_K, batch.values_K, batch.lengths_B, self.discount, self.gae_lambda
        )
        return batch.with_columns(
            advantages_K=whitened(advantages_K, batch), returns_K=advantages_K + batch.values_K
        )

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The clipped surrogate with its entropy bonus."""
        log_ratio_K = policy.logprobs_K - batch.old_K
        surrogate = clipped_surrogate(log_ratio_K, batch.advantages_K, self.clip, self.clip)
        share = averaged(surrogate.loss_K, batch, "token")
        if self.entropy:
            share = share - self.entropy * averaged(policy.entropy_K, batch, "token")
        return Loss(
            share,
            {
                "surrogate": batch.mean_by_sequence(surrogate.loss_K.detach()),
                "clipped": batch.mean_by_sequence(surrogate.is_clipped_K.to(log_ratio_K.dtype)),
            },
        )

    def critic_loss(self, values_K: Tensor, batch: Batch) -> Loss:
        """The clipped squared error of the values."""
        near_K = batch.values_K + (values_K - batch.values_K).clamp(-self.value_clip, self.value_clip)
        error_K = 0.5 * ((values_K - batch.returns_K) ** 2).maximum((near_K - batch.returns_K) ** 2)
        return Loss(averaged(error_K, batch, "token"), {"value": batch.mean_by_sequence(error_K.detach())})


def generalised_advantages(
    rewards_K: Tensor, values_K: Tensor, lengths_B: Tensor, discount: float, gae_lambda: float
) -> Tensor:
    """GAE of each token, shape (K,); the value after a sequence's last token is 0."""
    if not len(values_K):
        return values_K
    longest = int(lengths_B.max())
    steps_L = rewards_K.new_zeros(longest).long() + 1
    places_L = steps_L.cumsum(0) - 1
    is_token_BL = places_L < lengths_B[:, None]

    def padded(column_K: Tensor) -> Tensor:
        column_BL = column_K.new_zeros(is_token_BL.shape)
        column_BL[is_token_BL] = column_K
        return column_BL

    values_BL = padded(values_K)
    next_values_BL = values_BL.roll(-1, dims=1)
    next_values_BL[:, -1] = 0.0
    errors_BL = padded(rewards_K) + discount * next_values_BL - values_BL
    advantages_BL = errors_BL.clone()
    for place in range(longest - 2, -1, -1):
        advantages_BL[:, place] += discount * gae_lambda * advantages_BL[:, place + 1]
    return advantages_BL[is_token_BL]
