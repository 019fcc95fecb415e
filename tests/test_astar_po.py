"""A*-PO's loss against arithmetic done by hand."""

import math

import pytest
import torch
from torch import Tensor

from stage2_train.batch import Batch
from stage2_train.objectives import AStarPO
from tests.batches import batch_of, loss_and_gradient, loss_and_gradient_in_slices, loss_of, policy, tensor

# Three completions of 2, 1 and 3 tokens. Their log-ratios are 0.2, −0.4 and 0.6 in all.
POLICY_K = tensor([-1.0, -0.5, -2.0, -0.1, -0.2, -0.3])
REFERENCE_K = tensor([-1.1, -0.6, -1.6, -0.3, -0.4, -0.5])
LENGTHS = [2, 1, 3]
REWARDS = [1.0, 0.0, 1.0]
VSTAR = [0.5, 0.25, 0.75]
BETA2 = 0.5
# β2·log-ratio − (r − V̂*):  0.1 − 0.5 = −0.4,  −0.2 + 0.25 = 0.05,  0.3 − 0.25 = 0.05
RESIDUALS = [-0.4, 0.05, 0.05]
LOSS = (0.16 + 0.0025 + 0.0025) / 3
# 2 · residual · β2 / 3 for each token of a completion
GRADIENT_K = [-0.4 / 3, -0.4 / 3, 0.05 / 3, 0.05 / 3, 0.05 / 3, 0.05 / 3]
OBJECTIVE = AStarPO(beta2=BETA2)


@pytest.fixture
def batch() -> Batch:
    return batch_of(LENGTHS, REWARDS, vstar_B=tensor(VSTAR), reference_K=REFERENCE_K)


def test_the_advantage_is_the_reward_less_the_optimal_value(batch: Batch) -> None:
    assert OBJECTIVE.credit(batch).advantages_B.tolist() == [0.5, -0.25, 0.25]


def test_loss_and_residuals_are_those_computed_by_hand(batch: Batch) -> None:
    loss = loss_of(OBJECTIVE, POLICY_K.clone().requires_grad_(), batch)
    assert float(loss.share.detach()) == pytest.approx(LOSS, abs=1e-15)
    squared_residual_B = loss.figures["regression"]
    assert squared_residual_B.tolist() == pytest.approx([value**2 for value in RESIDUALS], abs=1e-15)
    assert loss.share.requires_grad
    assert not squared_residual_B.requires_grad


def test_the_gradient_is_the_one_computed_by_hand(batch: Batch) -> None:
    _, gradient_K = loss_and_gradient(OBJECTIVE, POLICY_K, batch)
    assert gradient_K.tolist() == pytest.approx(GRADIENT_K, abs=1e-15)


def test_the_gradient_agrees_with_finite_differences(batch: Batch) -> None:
    def loss(logprobs_K: Tensor) -> Tensor:
        return loss_of(OBJECTIVE, logprobs_K, batch).share

    assert torch.autograd.gradcheck(loss, (POLICY_K.clone().requires_grad_(),), atol=1e-8)


def test_at_the_optimum_loss_and_gradient_are_zero(batch: Batch) -> None:
    credited = OBJECTIVE.credit(batch)
    per_token_K = (credited.advantages_B / BETA2 / credited.lengths_B)[credited.sequence_of_K]
    loss, gradient_K = loss_and_gradient(OBJECTIVE, REFERENCE_K + per_token_K, batch)
    assert loss == pytest.approx(0.0, abs=1e-28)
    assert gradient_K.abs().max() < 1e-15


@pytest.mark.parametrize(
    "split", [[[0], [1], [2]], [[2, 0], [1]], [[0, 1], [2]], [[1, 2, 0]], [[2], [0, 1]]], ids=str
)
def test_shares_of_any_split_add_up_to_the_loss_and_gradient_of_the_whole(
    batch: Batch, split: list[list[int]]
) -> None:
    loss, gradient_K = loss_and_gradient_in_slices(OBJECTIVE, POLICY_K, batch, split)
    assert loss == pytest.approx(LOSS, abs=1e-15)
    assert gradient_K.tolist() == pytest.approx(GRADIENT_K, abs=1e-15)


def test_length_changes_nothing_but_the_sum_of_the_log_ratio() -> None:
    one, many = (
        OBJECTIVE.loss(
            policy(tensor([0.7 / count] * count)),
            batch_of(
                [count],
                [0.0],
                reference_K=torch.zeros(count, dtype=torch.float64),
                advantages_B=tensor([0.25]),
            ),
        ).share
        for count in (1, 700)
    )
    assert float(one) == pytest.approx(0.01, abs=1e-15)
    assert float(many) == pytest.approx(0.01, abs=1e-13)


# V̂* from the group instead of stage 1.


def test_the_groups_vstar_is_that_of_the_other_completions() -> None:
    objective = AStarPO(beta2=BETA2, group_size=3, vstar="group", beta1=0.5)
    batch = batch_of([1] * 6, [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], group_size=3)
    one_of_two = 0.5 * math.log((1 + math.exp(2)) / 2)
    assert objective.credit(batch).advantages_B.tolist() == pytest.approx(
        [1.0, -one_of_two, -one_of_two, 0.0, 0.0, 0.0], abs=1e-12
    )


def test_the_groups_vstar_goes_from_the_best_to_the_mean_of_the_others() -> None:
    batch = batch_of([1] * 3, [1.0, 0.0, 0.5], group_size=3)
    for beta1, vstar in ((0.0, [0.5, 1.0, 1.0]), (math.inf, [0.25, 0.75, 0.5])):
        objective = AStarPO(group_size=3, vstar="group", beta1=beta1)
        found = batch.rewards_B - objective.credit(batch).advantages_B
        assert found.tolist() == pytest.approx(vstar, abs=1e-12)


def test_a_group_of_one_has_no_other_completions() -> None:
    with pytest.raises(ValueError, match="group_size 1; choose 2 or more"):
        AStarPO(vstar="group")


def test_stage_one_has_a_beta1_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"set vstar\.beta1, or rescore"):
        AStarPO(beta1=0.5)
