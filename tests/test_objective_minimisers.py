"""Each regression objective reaches its own minimiser, on the policies of test_theory.py that can be written down.

Its loss over all pairs of completions is minimised through the objective's code, and through the formula written out.

Shapes: _P prompt, _Y and _Z completion.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from stage2_train.batch import Batch
from stage2_train.objectives import ObjectiveConfig
from stage2_train.objectives.protocol import Objective
from tests.batches import batch_of, loss_of, minimising_logits
from tests.test_theory import (
    BETA,
    COMPLETIONS,
    PROMPTS,
    Problem,
    kl,
    random,
    sequence_logprobs,
    token_logprobs,
)

PAIRS = [
    (prompt, completion)
    for prompt in range(PROMPTS)
    for left in range(len(COMPLETIONS))
    for right in range(len(COMPLETIONS))
    for completion in (left, right)
]
"""All ordered pairs of completions of each prompt, one pair after the other."""

Formula = Callable[[Tensor, Tensor], Tensor]
"""The loss of pairs from (ln π/π_anchor, r) of both: tensors of shape (P, Y, Z) from those of shape (P, Y)."""

LOG_Z = math.log(BETA) + 1 / BETA + math.log(-math.expm1(-1 / BETA))


def left(values_PY: Tensor) -> Tensor:
    return values_PY[:, :, None]


def right(values_PY: Tensor) -> Tensor:
    return values_PY[:, None, :]


def difference(ratio_PY: Tensor, rewards_PY: Tensor) -> Tensor:
    return (BETA * (left(ratio_PY) - right(ratio_PY)) - (left(rewards_PY) - right(rewards_PY))) ** 2


def reward_centred(ratio_PY: Tensor, rewards_PY: Tensor, *, share: float) -> Tensor:
    """Both residuals, with the reward less `share` of the pair's difference from it."""
    gap_PYZ = share * (left(rewards_PY) - right(rewards_PY))
    return (BETA * left(ratio_PY) - gap_PYZ) ** 2 + (BETA * right(ratio_PY) + gap_PYZ) ** 2


def quantile_of(rewards_PY: Tensor) -> Tensor:
    return (right(rewards_PY) <= left(rewards_PY)).double().mean(-1)


def quantiles(ratio_PY: Tensor, rewards_PY: Tensor) -> Tensor:
    residual_PY = BETA * ratio_PY - (quantile_of(rewards_PY) - BETA * LOG_Z)
    return left(residual_PY) ** 2 + right(residual_PY) ** 2


CASES: dict[str, tuple[dict[str, Any], Formula]] = {
    "VarGrad": ({"name": "centred_residual", "beta": BETA}, difference),
    "GVPO": ({"name": "centred_residual", "beta": BETA, "anchor": "old"}, difference),
    "REBEL": ({"name": "rebel", "eta": 1 / BETA}, difference),
    "PMD-mean": (
        {"name": "pmd_mean", "tau": BETA, "group_size": 2},
        lambda ratio, rewards: reward_centred(ratio, rewards, share=0.5),
    ),
    "A*-PO, the group's V̂*": (
        {"name": "astar_po", "beta2": BETA, "group_size": 2, "vstar": "group"},
        lambda ratio, rewards: reward_centred(ratio, rewards, share=1.0),
    ),
    "QRPO": ({"name": "qrpo", "beta": BETA, "group_size": 2}, quantiles),
}
REACH_THE_OPTIMAL_POLICY = ("VarGrad", "GVPO", "REBEL")


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Rewards of many values."""
    return Problem(random(PROMPTS, len(COMPLETIONS), seed=7), random(PROMPTS, 3, 3, seed=0))


def logprobs_of_all(logits: Tensor) -> Tensor:
    """ln π of the tokens of all pairs, in their order."""
    each = {pair: token_logprobs(logits, *pair) for pair in dict.fromkeys(PAIRS)}
    return torch.cat([each[pair] for pair in PAIRS])


def batch_of_all(problem: Problem, objective: Objective) -> Batch:
    at = tuple(torch.tensor(PAIRS).T)
    anchor_K = logprobs_of_all(problem.reference)
    return batch_of(
        [len(COMPLETIONS[completion]) for _, completion in PAIRS],
        problem.rewards_PY[at],
        group_size=objective.group_size,
        reference_K=anchor_K,
        old_K=anchor_K,
        quantile_B=quantile_of(problem.rewards_PY)[at],
    )


def minimised(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The log-probs, shape (P, Y), of the policy that minimises a loss of its logits."""
    return sequence_logprobs(minimising_logits(loss, start))


@pytest.mark.parametrize("name", CASES)
def test_an_objective_reaches_the_minimiser_of_its_formula(problem: Problem, name: str) -> None:
    section, formula = CASES[name]
    objective: Objective = TypeAdapter(ObjectiveConfig).validate_python(section)
    batch = batch_of_all(problem, objective)
    reference_PY = sequence_logprobs(problem.reference)

    def by_the_objective(logits: Tensor) -> Tensor:
        return loss_of(objective, logprobs_of_all(logits), batch).share

    def by_the_formula(logits: Tensor) -> Tensor:
        return formula(sequence_logprobs(logits) - reference_PY, problem.rewards_PY).mean()

    ours, theirs = (minimised(loss, problem.reference) for loss in (by_the_objective, by_the_formula))
    assert kl(reference_PY, theirs) > 1e-2
    assert kl(theirs, ours) < 1e-9
    assert kl(ours, theirs) < 1e-9
    if name in REACH_THE_OPTIMAL_POLICY:
        assert kl(ours, problem.optimal_PY) < 1e-9
