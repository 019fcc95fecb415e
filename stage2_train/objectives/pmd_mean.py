"""PMD-mean: policy mirror descent with the group's mean reward in place of the partition function.

    ℓ(π) = mean over (x, y) of ( τ ln π(y|x)/π_old(y|x) − (r(x, y) − mean r) )²

This is the practice of Kimi k1.5 (2025, arXiv:2501.12599, §2.3.2) and K2, analysed in arXiv:2602.05933. It is the
centred residual with only the reward centred, so the group's mean log-ratio is penalised too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from stage2_train.batch import Batch, TokenLogprobs


class PMDMean(Section):
    """PMD-mean: τ, which keeps the policy near the one before the iteration."""

    name: Literal["pmd_mean"]
    tau: Annotated[float, Field(gt=0)] = 1e-2
    group_size: Annotated[int, Field(ge=2)] = 4
    """Completions of each prompt."""

    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 2
    allows_staleness: ClassVar[bool] = False

    def needs(self, steps: int) -> frozenset[Column]:
        """ln π_old, if it differs from ln π."""
        return frozenset({"old"} if steps > 1 else ())

    def credit(self, batch: Batch) -> Batch:
        """The reward less the group's mean."""
        return batch.with_columns(advantages_B=batch.rewards_B - batch.mean_by_group(batch.rewards_B))

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The squared residual of each sequence, averaged over the step."""
        anchor_K = batch.before_update(policy.logprobs_K)
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - anchor_K)
        squared_residual_B = (self.tau * log_ratio_B - batch.advantages_B) ** 2
        return Loss(
            squared_residual_B.sum() / batch.totals.sequences, {"regression": squared_residual_B.detach()}
        )
