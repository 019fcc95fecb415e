"""Direct Advantage Policy Optimization: regression of the log-ratio of reasoning steps on their known advantages.

    ℓ(π) = mean over (s, a) of ½ ( Â(s, a)/β − ln π(a|s)/π_ref(a|s) )²

s is a prompt with the first steps of a solution, a the next step. Â is computed before training, from completions of
π_ref, and read from a file; nothing is drawn. (Liu et al., 2024, arXiv:2412.18279, Eq. 3.6; the authors call it DAPO,
the name of another method too.)

In the paper's exact setting the minimiser is worse than π_ref at no state, and better from the prompt on unless π_ref
is optimal (Theorem 3.2). It is not π_ref exp(Â/β), which is no distribution: its probabilities add up to more than 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.section import Section
from stage2_train.objectives.protocol import Column, Loss

if TYPE_CHECKING:
    from stage2_train.batch import Batch, TokenLogprobs


class DirectAdvantage(Section):
    """Direct Advantage Policy Optimization: the regression's temperature β, and how pairs share a batch."""

    name: Literal["direct_advantage"]
    beta: Annotated[float, Field(gt=0)] = 0.01
    """The paper uses 0.01 or 0.02."""
    state_wise: bool = True
    """All actions of a state are in one optimizer step; if not, each pair has a place of its own in the batches."""

    group_size: ClassVar[int] = 0
    """It draws no completions."""
    passes: ClassVar[int] = 1
    unit: ClassVar[Literal["sequence"]] = "sequence"
    least_judged: ClassVar[int] = 1
    allows_staleness: ClassVar[bool] = False

    def needs(self, steps: int) -> frozenset[Column]:
        """Â and ln π_ref."""
        return frozenset({"advantage", "reference"})

    def credit(self, batch: Batch) -> Batch:
        """The advantages came with the batch."""
        return batch

    def loss(self, policy: TokenLogprobs, batch: Batch) -> Loss:
        """Half the squared residual of each pair, averaged over the step's pairs."""
        log_ratio_B = batch.sum_by_sequence(policy.logprobs_K - batch.reference_K)
        loss_B = (batch.advantages_B / self.beta - log_ratio_B) ** 2 / 2
        return Loss(loss_B.sum() / batch.totals.sequences, {"regression": loss_B.detach()})
