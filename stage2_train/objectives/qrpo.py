"""QRPO: regression on the reward's quantile, for rewards of many values. (Matrenok et al., 2025, arXiv:2507.08068)

    ℓ(π) = mean over (x, y) of ( β ln π(y|x)/π_ref(y|x) − (F(r) − β ln Z) )²,    ln Z = ln β + 1/β + ln(1 − exp(−1/β))

F(r) is the share of the prompt's rewards in stage 1 that do not exceed r. For a continuous reward it is uniform under
π_ref, so Z is known and no V̂* has to be estimated. Rewards of 0 and 1 tie, and are refused. (The authors' code leaves
out the last term of ln Z, which is below 1e-4 for β ≤ 0.1.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from stage2_train.batch import Batch, TokenLogprobs


class QRPO(Section):
    """QRPO: the regression's temperature β."""

    name: Literal["qrpo"]
    beta: Annotated[float, Field(gt=0)] = 3e-3
    group_size: Annotated[int, Field(ge=1)] = 1
    """Completions of each prompt in an iteration."""

    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 1
    allows_staleness: ClassVar[bool] = True

    def needs(self, steps: int) -> frozenset[Column]:
        """F(r) and ln π_ref."""
        return frozenset({"quantile", "reference"})

    def credit(self, batch: Batch) -> Batch:
        """F(r) − β ln Z."""
        scaled_log_z = self.beta * (math.log(self.beta) + math.log(-math.expm1(-1 / self.beta))) + 1
        return batch.with_columns(advantages_B=batch.quantile_B - scaled_log_z)

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """The squared residual of each sequence, averaged over the step."""
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - batch.reference_K)
        squared_residual_B = (self.beta * log_ratio_B - batch.advantages_B) ** 2
        return Loss(
            squared_residual_B.sum() / batch.totals.sequences, {"regression": squared_residual_B.detach()}
        )
