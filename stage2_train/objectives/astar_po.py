"""A*-PO: least-squares regression of the log-ratio on the optimal advantage (Algorithm 1, line 10).

    ℓ(π) = Σ over (x, y) of ( β2 ln π(y|x)/π_ref(y|x) − (r(x, y) − V̂*(x)) )²

divided by the number of completions in the step. No critic, no group, no old policy, no clipping; the minimiser is
π* ∝ π_ref exp(r/β2) whatever distribution the completions come from.
"""

from dataclasses import dataclass

from torch import Tensor

from stage2_train.batch import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class AStarPO:
    """The objective of A*-PO. Shapes: _B sequence, _K completion token of the micro-batch."""

    beta2: float

    def advantages(self, rewards_B: Tensor, vstar_B: Tensor) -> Tensor:
        """The optimal advantage A*(x, y) = r(x, y) − V̂*(x)."""
        return rewards_B - vstar_B

    def loss(self, logprobs_K: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The squared residual of each sequence, averaged over the step."""
        log_ratio_B = batch.sum_by_sequence(logprobs_K - batch.reference_logprobs_K)
        squared_residual_B = (self.beta2 * log_ratio_B - batch.advantages_B) ** 2
        return squared_residual_B.sum() / batch.step_sequences, squared_residual_B.detach()
