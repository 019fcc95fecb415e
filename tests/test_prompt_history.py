"""SPO's history of prompts: what a visit does to a tally, by hand."""

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.grading import Grade, Outcome
from common.rollout import Completion, Prompt, Rollout
from stage2_train.batch import TokenBatch, TokenSequence, token_batches
from stage2_train.objectives.spo import SPO
from stage2_train.prompt_history import PromptHistory
from stage2_train.ranks import ALONE

KEPT = 0.96
"""Of what is remembered where the policy has not moved."""


class Policy:
    """Gives each token the same log-prob."""

    def __init__(self) -> None:
        self.logprob = -1.0

    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        return [torch.full((int(batch.is_completion_BT.sum()),), self.logprob) for batch in batches]


def cut(units: Sequence[Sequence[TokenSequence]]) -> list[TokenBatch]:
    return list(token_batches(units, 8, 0))


def rollout(prompt: str, reward: float, *, tokens: int = 3, outcome: Outcome = Outcome.WRONG) -> Rollout:
    return Rollout(
        prompt=Prompt(id=prompt, text="", answer="", token_ids=array("i", [7]), token_hash=""),
        completion=Completion(key=None, token_ids=tuple(range(1, 1 + tokens)), text="", truncated=False),
        grade=Grade(outcome=outcome, reward=reward),
    )


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def history(policy: Policy) -> PromptHistory:
    rewards: dict[str, Any] = {"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0, 0.0]}
    return PromptHistory(SPO(name="spo"), rewards, policy, cut, ALONE)


def test_a_first_visit_counts_the_reward_and_forgets_least(history: PromptHistory) -> None:
    history.visit([rollout("a", 1.0), rollout("b", 0.0, tokens=9)])
    assert history.expected("a") == pytest.approx((4 * KEPT + 1) / (8 * KEPT + 1))
    assert history.expected("b") == pytest.approx(4 * KEPT / (8 * KEPT + 1))


@pytest.mark.parametrize(("moved", "kept"), [(0.0, 0.96), (0.009, 2 ** -(0.009 / 0.06)), (0.5, 0.875)])
def test_a_later_visit_forgets_by_how_far_the_policy_has_moved(
    history: PromptHistory, policy: Policy, moved: float, kept: float
) -> None:
    history.visit([rollout("a", 1.0)])
    policy.logprob += moved
    history.visit([rollout("a", 0.0, tokens=5)])
    solved, failed = 4 * KEPT + 1, 4 * KEPT
    assert history.expected("a") == pytest.approx(solved * kept / ((solved + failed) * kept + 1), rel=1e-5)


def test_a_prompt_that_comes_twice_counts_twice(history: PromptHistory) -> None:
    history.visit([rollout("a", 1.0), rollout("a", 1.0)])
    assert history.expected("a") == pytest.approx(((4 * KEPT + 1) * KEPT + 1) / ((8 * KEPT + 1) * KEPT + 1))


def test_what_could_not_be_judged_is_no_visit(history: PromptHistory) -> None:
    history.visit([rollout("a", 0.0, outcome=Outcome.VERIFIER_CRASH)])
    assert history.expected("a") == 0.5
    assert history.table()["token_ids"].is_null().all()


def test_a_reward_outside_0_to_1_stops_the_run(history: PromptHistory) -> None:
    with pytest.raises(
        UserError, match=r"prompt a earned 1\.5, but the objective expects rewards from 0 to 1"
    ):
        history.visit([rollout("a", 1.5)])


def test_a_history_goes_through_a_checkpoint_unchanged(history: PromptHistory, policy: Policy) -> None:
    history.visit([rollout("a", 1.0)])
    other = PromptHistory(SPO(name="spo"), {"a": [0.0], "b": [0.0]}, policy, cut, ALONE)
    other.resume(history.table())
    assert other.table().equals(history.table())
    for each in (history, other):
        each.visit([rollout("a", 0.0), rollout("b", 1.0)])
    assert other.table().equals(history.table())
