"""The A*-PO loss against arithmetic done by hand."""

import pytest
import torch
from torch import Tensor

from stage2_train.batch import MicroBatch
from stage2_train.config import AStarPOConfig
from stage2_train.objectives import AStarPO, build_objective

# Three completions of 2, 1 and 3 tokens. Their log-ratios are 0.2, −0.4 and 0.6 in all.
POLICY_K = [-1.0, -0.5, -2.0, -0.1, -0.2, -0.3]
REFERENCE_K = [-1.1, -0.6, -1.6, -0.3, -0.4, -0.5]
SEQUENCE_OF_K = [0, 0, 1, 2, 2, 2]
REWARDS_B = [1.0, 0.0, 1.0]
VSTAR_B = [0.5, 0.25, 0.75]
BETA2 = 0.5
# β2·log-ratio − (r − V̂*):  0.1 − 0.5 = −0.4,  −0.2 + 0.25 = 0.05,  0.3 − 0.25 = 0.05
RESIDUALS_B = [-0.4, 0.05, 0.05]
LOSS = (0.16 + 0.0025 + 0.0025) / 3
# 2 · residual · β2 / 3 for each token of a completion
GRADIENT_K = [-0.4 / 3, -0.4 / 3, 0.05 / 3, 0.05 / 3, 0.05 / 3, 0.05 / 3]


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole_batch(objective: AStarPO) -> MicroBatch:
    return MicroBatch(
        sequence_of_K=torch.tensor(SEQUENCE_OF_K),
        reference_logprobs_K=tensor(REFERENCE_K),
        advantages_B=objective.advantages(tensor(REWARDS_B), tensor(VSTAR_B)),
        step_sequences=3,
    )


def loss_and_gradient(objective: AStarPO, logprobs_K: Tensor, batch: MicroBatch) -> tuple[float, Tensor]:
    leaf_K = logprobs_K.clone().requires_grad_()
    loss, _ = objective.loss(leaf_K, batch)
    (gradient_K,) = torch.autograd.grad(loss, leaf_K)
    return float(loss.detach()), gradient_K


def test_the_config_builds_the_objective_with_its_beta2() -> None:
    assert build_objective(AStarPOConfig(beta2=0.125)) == AStarPO(beta2=0.125)


def test_the_advantage_is_the_reward_less_the_optimal_value() -> None:
    advantages_B = AStarPO(beta2=BETA2).advantages(tensor(REWARDS_B), tensor(VSTAR_B))
    assert advantages_B.tolist() == [0.5, -0.25, 0.25]


def test_loss_and_residuals_are_those_computed_by_hand() -> None:
    objective = AStarPO(beta2=BETA2)
    loss, squared_residual_B = objective.loss(tensor(POLICY_K).requires_grad_(), whole_batch(objective))
    assert float(loss.detach()) == pytest.approx(LOSS, abs=1e-15)
    assert squared_residual_B.tolist() == pytest.approx([value**2 for value in RESIDUALS_B], abs=1e-15)
    assert loss.requires_grad
    assert not squared_residual_B.requires_grad


def test_the_gradient_is_the_one_computed_by_hand() -> None:
    objective = AStarPO(beta2=BETA2)
    _, gradient_K = loss_and_gradient(objective, tensor(POLICY_K), whole_batch(objective))
    assert gradient_K.tolist() == pytest.approx(GRADIENT_K, abs=1e-15)


def test_the_gradient_agrees_with_finite_differences() -> None:
    objective = AStarPO(beta2=BETA2)
    batch = whole_batch(objective)
    assert torch.autograd.gradcheck(
        lambda logprobs_K: objective.loss(logprobs_K, batch)[0],
        (tensor(POLICY_K).requires_grad_(),),
        atol=1e-8,
    )


def test_at_the_optimum_loss_and_gradient_are_zero() -> None:
    objective = AStarPO(beta2=BETA2)
    batch = whole_batch(objective)
    advantage_K = batch.advantages_B[batch.sequence_of_K]
    tokens_K = torch.bincount(batch.sequence_of_K)[batch.sequence_of_K]
    optimal_K = batch.reference_logprobs_K + advantage_K / BETA2 / tokens_K
    loss, gradient_K = loss_and_gradient(objective, optimal_K, batch)
    assert loss == pytest.approx(0.0, abs=1e-28)
    assert gradient_K.abs().max() < 1e-15


@pytest.mark.parametrize(
    "split", [[[0], [1], [2]], [[2, 0], [1]], [[0, 1], [2]], [[1, 2, 0]], [[2], [0, 1]]], ids=str
)
def test_shares_of_any_split_add_up_to_the_loss_and_gradient_of_the_whole(split: list[list[int]]) -> None:
    objective = AStarPO(beta2=BETA2)
    advantages_B = whole_batch(objective).advantages_B
    leaf_K = tensor(POLICY_K).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for sequences in split:
        places = [place for sequence in sequences for place, of in enumerate(SEQUENCE_OF_K) if of == sequence]
        share, _ = objective.loss(
            leaf_K[places],
            MicroBatch(
                sequence_of_K=torch.tensor([sequences.index(SEQUENCE_OF_K[place]) for place in places]),
                reference_logprobs_K=tensor(REFERENCE_K)[places],
                advantages_B=advantages_B[sequences],
                step_sequences=3,
            ),
        )
        total = total + share
    (gradient_K,) = torch.autograd.grad(total, leaf_K)
    assert float(total.detach()) == pytest.approx(LOSS, abs=1e-15)
    assert gradient_K.tolist() == pytest.approx(GRADIENT_K, abs=1e-15)


def test_length_changes_nothing_but_the_sum_of_the_log_ratio() -> None:
    objective = AStarPO(beta2=BETA2)
    one, many = (
        objective.loss(
            tensor([0.7 / count] * count),
            MicroBatch(
                sequence_of_K=torch.zeros(count, dtype=torch.long),
                reference_logprobs_K=torch.zeros(count, dtype=torch.float64),
                advantages_B=tensor([0.25]),
                step_sequences=1,
            ),
        )[0]
        for count in (1, 700)
    )
    assert float(one) == pytest.approx(0.01, abs=1e-15)
    assert float(many) == pytest.approx(0.01, abs=1e-13)
