"""Shared by GRPO, PPO and SPO: PPO's clipped surrogate, the estimator of KL, the averages over a step.

Shapes: _B sequence, _K completion token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from stage2_train.batch import Batch

SMALLEST_DEVIATION = 1e-8
Average = Literal["sequence", "token"]
"""Each sequence counts alike (Shao et al., 2024), or each token (DAPO of Yu et al., 2025)."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The loss of each token, and whether the clip stops its gradient."""

    loss_K: Tensor
    is_clipped_K: Tensor


def clipped_surrogate(log_ratio_K: Tensor, advantages_K: Tensor, low: float, high: float) -> Surrogate:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) with ρ = π/π_old. (Schulman et al., 2017, arXiv:1707.06347, Eq. 7)"""
    ratio_K = log_ratio_K.exp()
    free_K, bounded_K = -ratio_K * advantages_K, -ratio_K.clamp(1 - low, 1 + high) * advantages_K
    return Surrogate(free_K.maximum(bounded_K), (bounded_K > free_K).detach())


def kl_penalty(logprobs_K: Tensor, reference_K: Tensor) -> Tensor:
    """π_ref/π − ln π_ref/π − 1: never negative, KL(π‖π_ref) on average over π. (Shao et al., Eq. 4; known as k3)"""
    log_ratio_K = reference_K - logprobs_K
    return log_ratio_K.exp() - log_ratio_K - 1


def averaged(values_K: Tensor, batch: Batch, average: Average) -> Tensor:
    """A slice's share of the step's average over tokens."""
    if average == "token":
        return values_K.sum() / batch.totals.tokens
    return batch.mean_by_sequence(values_K).sum() / batch.totals.sequences


def mean_and_deviation(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n − 1) of all ranks' values, in float64; a collective operation.

    In float32 the mean of equal values can be wrong in the last bit, which would then be their deviation.
    """
    exact = values.double()
    pair = exact.new_empty(2)
    pair[0], pair[1] = values.numel(), exact.sum()
    count, total = batch.sum_over_ranks(pair)
    mean = total / count.clamp(min=1)
    squares = batch.sum_over_ranks(((exact - mean) ** 2).sum())
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def whitened(values: Tensor, batch: Batch) -> Tensor:
    """All ranks' values minus their mean, divided by their standard deviation; 0 if they are all equal."""
    mean, deviation = mean_and_deviation(values, batch)
    return ((values - mean) / (deviation + SMALLEST_DEVIATION)).to(values.dtype)
