"""REBEL: regression on the difference between two completions' rewards. (Gao et al., 2024, arXiv:2404.16767, Alg. 1)

    ℓ(π) = mean over prompts of ( (1/η) [ln π/π_t (y|x) − ln π/π_t (y'|x)] − (r(x, y) − r(x, y')) )²

π_t is the policy that the pair was drawn from. The loss is twice the centred residual of a pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.centred_residual import group_variance
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from stage2_train.batch import Batch, TokenLogprobs


class REBEL(Section):
    """REBEL: η, the weight of rewards."""

    name: Literal["rebel"]
    eta: Annotated[float, Field(gt=0)] = 1e3

    group_size: ClassVar[int] = 2
    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["group"]] = "group"
    least_judged: ClassVar[int] = 2
    allows_staleness: ClassVar[bool] = False

    def needs(self, steps: int) -> frozenset[Column]:
        """ln π_t, if it differs from ln π."""
        return frozenset({"old"} if steps > 1 else ())

    def credit(self, batch: Batch) -> Batch:
        """Rewards are compared in the loss."""
        return batch

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """(e − e')² with e = (1/η) ln π/π_t − r, which is twice the variance of the pair's two e."""
        anchor_K = batch.before_update(policy.logprobs_K)
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - anchor_K)
        squared_difference_G = 2 * group_variance(log_ratio_B / self.eta - batch.rewards_B, batch)
        return Loss(
            squared_difference_G.sum() / batch.totals.groups,
            {"regression": squared_difference_G.detach()[batch.group_of_B]},
        )
