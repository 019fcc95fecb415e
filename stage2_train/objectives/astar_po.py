"""A*-PO: least-squares regression of the log-ratio on the optimal advantage (Algorithm 1, line 10).

    ℓ(π) = mean over (x, y) of ( β2 ln π(y|x)/π_ref(y|x) − (r(x, y) − V̂*(x)) )²

No critic, no group, no old policy, no clipping; the minimiser is π* ∝ π_ref exp(r/β2) whatever distribution the
completions come from. (Brantley et al., 2025, arXiv:2505.20686)

The ablation that the paper's reviewers asked for, `vstar = "group"`, does without stage 1: V̂* of a completion is
β1 ln mean exp(r/β1) over the other completions of its prompt, which come from the current policy and not from π_ref.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from common.config import Beta1
from common.section import Section
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from stage2_train.batch import Batch, TokenLogprobs


class AStarPO(Section):
    """A*-PO: the regression's temperature β2, and the source of V̂*."""

    name: Literal["astar_po"] = "astar_po"
    beta2: Annotated[float, Field(gt=0)] = 1e-3
    group_size: Annotated[int, Field(ge=1)] = 1
    """Completions of each prompt in an iteration; the paper draws one."""
    vstar: Literal["stage1", "group"] = "stage1"
    beta1: Beta1 | None = None
    """β1 of the group's V̂*, 0.5 by default; stage 1 has its own β1."""

    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"

    @model_validator(mode="after")
    def _vstar_has_what_it_needs(self) -> AStarPO:
        if self.vstar == "group" and self.group_size == 1:
            raise ValueError(
                'vstar = "group" estimates V̂* from the other completions of the prompt, found group_size 1; '
                "choose 2 or more"
            )
        if self.vstar == "stage1" and self.beta1 is not None:
            raise ValueError(
                'beta1 is for vstar = "group"; set vstar.beta1, or rescore, for the V̂* of stage 1'
            )
        return self

    @property
    def least_judged(self) -> int:
        """2 if V̂* comes from the other completions of the group."""
        return 2 if self.vstar == "group" else 1

    @property
    def allows_staleness(self) -> bool:
        """Not allowed if completions also give V̂*."""
        return self.vstar == "stage1"

    def needs(self, steps: int) -> frozenset[Column]:
        """V̂* and ln π_ref."""
        return frozenset({"vstar", "reference"} if self.vstar == "stage1" else {"reference"})

    def credit(self, batch: Batch) -> Batch:
        """The optimal advantage A*(x, y) = r(x, y) − V̂*(x)."""
        vstar_B = batch.vstar_B if self.vstar == "stage1" else self._vstar_of_others(batch)
        return batch.with_columns(advantages_B=batch.rewards_B - vstar_B)

    def _vstar_of_others(self, batch: Batch) -> Tensor:
        import numpy as np

        from common.value import estimate_vstar

        members: dict[int, list[int]] = {}
        for row, group in enumerate(batch.group_of_B.tolist()):
            members.setdefault(group, []).append(row)
        others = [[other for other in group if other != row] for group in members.values() for row in group]
        if not others:
            return batch.rewards_B
        rows = [row for group in members.values() for row in group]
        rewards = batch.rewards_B.double().cpu().numpy()
        estimate = estimate_vstar(
            rewards[[other for group in others for other in group]],
            np.array([len(group) for group in others]),
            0.5 if self.beta1 is None else self.beta1,
        )
        vstar_B = batch.rewards_B.new_empty(len(rows))
        vstar_B[rows] = vstar_B.new_tensor(estimate.vstar_P)
        return vstar_B

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The squared residual of each sequence, averaged over the step."""
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - batch.reference_K)
        squared_residual_B = (self.beta2 * log_ratio_B - batch.advantages_B) ** 2
        return Loss(
            squared_residual_B.sum() / batch.totals.sequences, {"regression": squared_residual_B.detach()}
        )
