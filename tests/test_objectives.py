"""Properties of every objective: shares that add up, gradients, its needs, the point where its gradient vanishes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from stage2_train.batch import Batch
from stage2_train.objectives import ObjectiveConfig
from stage2_train.objectives.protocol import Objective
from tests.batches import batch_of, loss_and_gradient, loss_and_gradient_in_slices, loss_of, policy

SECTIONS: dict[str, dict[str, Any]] = {
    "A*-PO": {"name": "astar_po", "beta2": 0.5},
    "A*-PO, two completions": {"name": "astar_po", "beta2": 0.5, "group_size": 2},
    "A*-PO, the group's V̂*": {"name": "astar_po", "beta2": 0.5, "group_size": 3, "vstar": "group"},
    "GRPO": {"name": "grpo", "kl": 0.1, "entropy": 0.2},
    "GRPO, groups of 3, by token": {"name": "grpo", "group_size": 3, "average": "token", "scale": "none"},
    "GRPO, scaled by the batch": {"name": "grpo", "scale": "batch", "kl": 0.0},
    "REBEL": {"name": "rebel", "eta": 2.0},
    "PPO": {"name": "ppo", "kl": 0.1, "entropy": 0.2, "discount": 0.9, "gae_lambda": 0.8},
    "VarGrad": {"name": "centred_residual", "beta": 0.5, "group_size": 3},
    "GVPO": {"name": "centred_residual", "beta": 0.5, "group_size": 3, "anchor": "old"},
    "PMD-mean": {"name": "pmd_mean", "tau": 0.5, "group_size": 3},
    "SPO": {"name": "spo"},
    "QRPO": {"name": "qrpo", "beta": 0.5},
    "Direct Advantage": {"name": "direct_advantage", "beta": 0.5},
}
LENGTHS = [2, 1, 3, 4, 1, 2, 3, 1, 2, 5, 1, 3]
SEQUENCES, TOKENS = len(LENGTHS), sum(LENGTHS)


def objective_of(name: str) -> Objective:
    objective: Objective = TypeAdapter(ObjectiveConfig).validate_python(SECTIONS[name])
    return objective


def random(count: int, seed: int, *, low: float = -0.3, high: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, dtype=torch.float64, generator=generator)


POLICY_K = random(TOKENS, 0, low=-2.0, high=-0.1)
ENTROPY_K = random(TOKENS, 9, low=0.5, high=1.5)


def step_of(objective: Objective) -> Batch:
    """A whole step with every column that the objective may need."""
    rewards_B = random(SEQUENCES, 1, low=0.0, high=1.0)
    rewards_K = torch.zeros(TOKENS, dtype=torch.float64)
    rewards_K[torch.tensor(LENGTHS).cumsum(0) - 1] = rewards_B
    columns = {
        "vstar_B": random(SEQUENCES, 2, low=0.0, high=1.0),
        "quantile_B": random(SEQUENCES, 3, low=0.0, high=1.0),
        "expected_B": random(SEQUENCES, 4, low=0.0, high=1.0),
        "rewards_K": rewards_K,
        "reference_K": POLICY_K + random(TOKENS, 5),
        "old_K": POLICY_K + random(TOKENS, 6),
        "values_K": random(TOKENS, 7),
        "advantages_B": random(SEQUENCES, 8, low=-0.5, high=0.5),
    }
    needed = {name for name in columns if {name[:-2], name[:-3]} & objective.needs(2)}
    return batch_of(
        LENGTHS,
        rewards_B,
        group_size=objective.group_size or 1,
        **{name: column for name, column in columns.items() if name in needed},
    )


@pytest.fixture(params=SECTIONS)
def objective(request: pytest.FixtureRequest) -> Objective:
    return objective_of(request.param)


def test_no_objective_loads_torch_before_it_is_used() -> None:
    script = "import sys, stage2_train.objectives; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert found.stdout == "False\n"


def test_shares_of_any_split_add_up_to_the_loss_and_gradient_of_the_whole(objective: Objective) -> None:
    batch = step_of(objective)
    loss, gradient_K = loss_and_gradient(objective, POLICY_K, batch)
    units = [[row] for row in range(SEQUENCES)]
    if objective.unit == "group":
        size = objective.group_size
        units = [list(range(start, start + size)) for start in range(0, SEQUENCES, size)]
    backward = units[::-1]
    for split in (
        units,
        [[row for unit in units[:2] for row in unit], [row for unit in units[2:] for row in unit]],
        [[row for unit in backward[::2] for row in unit], [row for unit in backward[1::2] for row in unit]],
    ):
        share, part_K = loss_and_gradient_in_slices(objective, POLICY_K, batch, split)
        assert share == pytest.approx(loss, abs=1e-12)
        torch.testing.assert_close(part_K, gradient_K, rtol=1e-10, atol=1e-14)


def test_the_gradient_agrees_with_finite_differences(objective: Objective) -> None:
    credited = objective.credit(step_of(objective))

    def loss(logprobs_K: Tensor, entropy_K: Tensor) -> Tensor:
        return objective.loss(policy(logprobs_K, entropy_K), credited).share + 0.0 * entropy_K.sum()

    leaves = (POLICY_K.clone().requires_grad_(), ENTROPY_K.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves, atol=1e-7)


def test_figures_are_a_number_per_sequence_without_gradient(objective: Objective) -> None:
    loss = loss_of(objective, POLICY_K.clone().requires_grad_(), step_of(objective))
    assert loss.share.requires_grad
    assert loss.figures
    for values_B in loss.figures.values():
        assert values_B.shape == (SEQUENCES,)
        assert not values_B.requires_grad


@pytest.mark.parametrize("name", ["GRPO", "REBEL", "GVPO", "PMD-mean", "SPO"])
def test_in_an_iteration_of_one_step_the_old_policy_is_the_policy_itself(name: str) -> None:
    """So no forward pass is spent on it, and nothing else changes."""
    objective = objective_of(name)
    assert objective.needs(2) - objective.needs(1) == {"old"}
    batch = step_of(objective)
    with_column = loss_and_gradient(objective, POLICY_K, batch.with_columns(old_K=POLICY_K))
    without = loss_and_gradient(objective, POLICY_K, batch.with_columns(old_K=None))  # type: ignore[arg-type]
    assert without[0] == with_column[0]
    assert torch.equal(without[1], with_column[1])


EQUAL_REWARDS = {
    "GRPO": {"name": "grpo", "kl": 0.0, "entropy": 0.0, "group_size": 3},
    "GRPO, unscaled": {"name": "grpo", "kl": 0.0, "entropy": 0.0, "group_size": 3, "scale": "none"},
    "REBEL": SECTIONS["REBEL"],
    "VarGrad": SECTIONS["VarGrad"],
    "PMD-mean": SECTIONS["PMD-mean"],
}


@pytest.mark.parametrize("name", EQUAL_REWARDS)
def test_a_group_of_equal_rewards_gives_a_policy_that_has_not_moved_no_gradient(name: str) -> None:
    objective: Objective = TypeAdapter(ObjectiveConfig).validate_python(EQUAL_REWARDS[name])
    rewards_B = torch.arange(SEQUENCES // objective.group_size).double()
    batch = batch_of(
        LENGTHS,
        rewards_B.repeat_interleave(objective.group_size),
        group_size=objective.group_size,
        old_K=POLICY_K,
        reference_K=POLICY_K,
    )
    _, gradient_K = loss_and_gradient(objective, POLICY_K, batch)
    assert gradient_K.abs().max() < 1e-12


def optimum_of_differences(beta: float, rewards_B: Tensor, anchor_K: Tensor, group_size: int) -> Tensor:
    """Log-probs with β ln π/π_anchor = r + a constant of the group's own."""
    constants_B = random(SEQUENCES // group_size, 8).repeat_interleave(group_size)
    lengths_B = torch.tensor(LENGTHS)
    per_token_B = (rewards_B + constants_B) / beta / lengths_B
    return anchor_K + per_token_B.repeat_interleave(lengths_B)


OPTIMA: dict[str, tuple[str, Callable[[Batch], Tensor]]] = {
    "REBEL": (
        "REBEL",
        lambda batch: optimum_of_differences(1 / 2.0, batch.rewards_B, batch.old_K, 2),
    ),
    "VarGrad": (
        "VarGrad",
        lambda batch: optimum_of_differences(0.5, batch.rewards_B, batch.reference_K, 3),
    ),
    "GVPO": ("GVPO", lambda batch: optimum_of_differences(0.5, batch.rewards_B, batch.old_K, 3)),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_at_the_optimum_of_differences_loss_and_gradient_are_zero(name: str) -> None:
    section, optimum = OPTIMA[name]
    objective = objective_of(section)
    batch = step_of(objective)
    loss, gradient_K = loss_and_gradient(objective, optimum(batch), batch)
    assert loss == pytest.approx(0.0, abs=1e-24)
    assert gradient_K.abs().max() < 1e-12
