"""A*-PO: least-squares regression of the log-ratio on the optimal advantage (Algorithm 1, line 10).

    ℓ(π) = Σ over (x, y) of ( β2 ln π(y|x)/π_ref(y|x) − (r(x, y) − V̂*(x)) )²

divided by the number of completions in the step. No critic, no group, no old policy, no clipping; the minimiser is
π* ∝ π_ref exp(r/β2) whatever distribution the completions come from. (Brantley et al., 2025, arXiv:2505.20686)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.config import Section
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from stage2_train.batch import Batch
    from stage2_train.logprobs import TokenLogprobs


class AStarPO(Section):
    """A*-PO: the regression's temperature β2."""

    name: Literal["astar_po"] = "astar_po"
    beta2: Annotated[float, Field(gt=0)] = 1e-3
    group_size: Annotated[int, Field(ge=1)] = 1
    """Completions of each prompt in an iteration; the paper draws one."""

    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 1
    allows_staleness: ClassVar[bool] = True

    def needs(self, steps: int) -> frozenset[Column]:
        """V̂* and ln π_ref."""
        return frozenset({"vstar", "reference"})

    def credit(self, batch: Batch) -> Batch:
        """The optimal advantage A*(x, y) = r(x, y) − V̂*(x)."""
        return batch.with_columns(advantages_B=batch.rewards_B - batch.vstar_B)

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The squared residual of each sequence, averaged over the step."""
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - batch.reference_K)
        squared_residual_B = (self.beta2 * log_ratio_B - batch.advantages_B) ** 2
        return Loss(
            squared_residual_B.sum() / batch.totals.sequences, {"regression": squared_residual_B.detach()}
        )
