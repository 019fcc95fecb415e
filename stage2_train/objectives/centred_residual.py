"""The centred residual: the variance, over a prompt's completions, of β ln π/π_anchor − r.

    ℓ(π) = mean over prompts of 1/(K − 1) Σ_i (e_i − mean e)²,    e_i = β ln π(y_i|x)/π_anchor(y_i|x) − r_i

It vanishes if e is the same for all completions, that is for π ∝ π_anchor exp(r/β), whatever the constant: no V̂* is
needed, the group's mean replaces it. Since Σ (e_i − mean e) = 0, the gradient through the mean vanishes, and with it
the difference between these published losses:

    VarGrad (Trajectory Balance with Asynchrony: Bartoldson et al., 2025, arXiv:2503.18929)   anchor π_ref
    AGRO (Tang et al., 2025, arXiv:2503.19612)    anchor π_ref, times ½
    GVPO (Zhang et al., 2025, arXiv:2504.19599)   anchor π_old, times ½
    REBEL (rebel.py)                              anchor π_old, K = 2, times 2

Without a factor, its gradient is A*-PO's with the mean of the other completions' residuals in place of V̂*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from stage2_train.batch import Batch, TokenLogprobs


class CentredResidual(Section):
    """VarGrad, AGRO and GVPO, by `anchor` and `group_size`."""

    name: Literal["centred_residual"]
    beta: Annotated[float, Field(gt=0)] = 1e-3
    anchor: Literal["reference", "old"] = "reference"
    """π_ref, or the policy that the completions were drawn from."""
    group_size: Annotated[int, Field(ge=2)] = 2
    """Completions of each prompt."""

    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["group"]] = "group"
    least_judged: ClassVar[int] = 2

    @property
    def allows_staleness(self) -> bool:
        """With a fixed anchor the minimiser is the same whatever distribution completions come from."""
        return self.anchor == "reference"

    def needs(self, steps: int) -> frozenset[Column]:
        """ln π_ref; or ln π_old, if it differs from ln π."""
        if self.anchor == "reference":
            return frozenset({"reference"})
        return frozenset({"old"} if steps > 1 else ())

    def credit(self, batch: Batch) -> Batch:
        """Rewards are compared in the loss, with the log-ratios."""
        return batch

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The variance of each group's residuals, averaged over the step."""
        of_anchor = self.anchor == "reference"
        anchor_K = batch.reference_K if of_anchor else batch.before_update(policy.logprobs_K)
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - anchor_K)
        variance_G = group_variance(self.beta * log_ratio_B - batch.rewards_B, batch)
        return Loss(
            variance_G.sum() / batch.totals.groups, {"regression": variance_G.detach()[batch.group_of_B]}
        )


def group_variance(values_B: Tensor, batch: Batch) -> Tensor:
    """The unbiased variance (n − 1) of each group's values, shape (G,), for groups of two or more."""
    centred_B = values_B - batch.mean_by_group(values_B)
    return batch.sum_by_group(centred_B**2) / (batch.sizes_G - 1)
