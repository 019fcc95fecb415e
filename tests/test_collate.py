"""Rollouts to an iteration's batch and steps: groups, completions that could not be judged, rewards of steps."""

from array import array
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from common.grading import Grade, Outcome
from common.rollout import Completion, Prompt, Rollout
from stage2_train.batch import Totals
from stage2_train.collate import Collated, Collator, Cutter, quantile, rewards_by_token
from stage2_train.config import TrainConfig
from stage2_train.objectives import ObjectiveConfig
from stage2_train.ranks import ALONE

CRASH = Outcome.VERIFIER_CRASH


class Renderer:
    """A token is a letter."""

    eos_token_ids = (1,)
    pad_token_id = 0

    def decode(self, token_ids: Any) -> str:
        return "".join(chr(token) for token in token_ids if token not in self.eos_token_ids)


def rollout(prompt: int, text: str, reward: float, outcome: Outcome = Outcome.WRONG, **grade: Any) -> Rollout:
    return Rollout(
        prompt=Prompt(
            id=f"{prompt}", text="", answer="", token_ids=array("i", range(1, 2 + prompt)), token_hash=""
        ),
        completion=Completion(key=None, token_ids=tuple(map(ord, text)), text=text, truncated=False),
        grade=Grade(outcome=outcome, reward=reward, **grade),
    )


def collated(objective: dict[str, Any], rollouts: list[Rollout], **train: Any) -> Collated:
    config = TrainConfig(objective=TypeAdapter(ObjectiveConfig).validate_python(objective), **train)
    renderer: Any = Renderer()
    values = {"vstar_B": lambda one: float(one.prompt.id)}
    collate = Collator(config, values, renderer, Cutter(config, renderer, ALONE), ALONE)
    size = config.objective.group_size
    groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
    return collate(groups, range(len(groups)))


def four_groups(*unjudged: int) -> list[Rollout]:
    """Pairs of four prompts, whose rewards are their numbers; some of the rollouts were not judged."""
    return [
        rollout(
            number // 2,
            "abcdefgh"[: number + 1],
            float(number),
            CRASH if number in unjudged else Outcome.WRONG,
        )
        for number in range(8)
    ]


PAIRS = {"name": "rebel"}
TWO_STEPS = {"batch_size": 4, "mini_batch_size": 2}


def test_a_prompts_completions_are_a_group_in_one_step() -> None:
    found = collated(PAIRS, four_groups(), **TWO_STEPS)
    assert found.rows == list(range(8))
    assert found.batch.rewards_B.tolist() == list(range(8))
    assert found.batch.group_of_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.batch.vstar_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.batch.totals == Totals(sequences=8, groups=4, tokens=36)
    assert [sorted(step.rows) for step in found.steps] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [step.totals for step in found.steps] == [
        Totals(sequences=4, groups=2, tokens=1 + 2 + 3 + 4),
        Totals(sequences=4, groups=2, tokens=5 + 6 + 7 + 8),
    ]


@pytest.mark.parametrize(
    ("objective", "left"),
    [
        (PAIRS, [0, 1, 4, 5]),
        ({"name": "grpo"}, [0, 1, 4, 5]),
        ({"name": "astar_po", "group_size": 2, "vstar": "group"}, [0, 1, 4, 5]),
        ({"name": "astar_po", "group_size": 2}, [0, 1, 3, 4, 5]),
    ],
    ids=["rebel", "grpo", "group's V̂*", "stage 1's V̂*"],
)
def test_a_group_with_too_few_judged_members_is_left_out_as_the_objective_says(
    objective: dict[str, Any], left: list[int]
) -> None:
    found = collated(objective, four_groups(2, 6, 7), **TWO_STEPS)
    assert found.rows == left
    assert found.batch.rewards_B.tolist() == left
    assert [found.rows[row] for step in found.steps for row in sorted(step.rows)] == left
    first, second = found.steps
    assert (first.totals.sequences, second.totals.sequences) == (len([n for n in left if n < 4]), 2)
    assert second.totals.groups == 1


def test_a_step_of_which_nothing_was_judged_has_a_filler_and_nothing_else() -> None:
    found = collated(PAIRS, four_groups(0, 1, 2, 3), **TWO_STEPS)
    first, second = found.steps
    assert list(first.slices) == []
    assert first.totals == Totals(sequences=0, groups=0, tokens=0)
    assert first.filler.input_ids_BT.numel() > 0
    assert second.totals.sequences == 4


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_a_group_is_split_over_micro_batches_only_where_the_objective_allows_it(budget: int) -> None:
    for objective, may_split in ((PAIRS, False), ({"name": "grpo"}, True)):
        found = collated(objective, four_groups(), **TWO_STEPS, tokens_per_micro_batch=budget)
        slices = [tokens.rows for step in found.steps for tokens in step.slices]
        whole = all((row ^ 1) in rows for rows in slices for row in rows)
        assert whole or may_split
        if budget == 1:
            assert whole != may_split


def test_engine_log_probs_are_a_column_where_some_were_asked_for() -> None:
    first, *others = four_groups()
    completion = Completion(key=None, token_ids=(97,), text="a", truncated=False, sampled_logprobs=(-0.5,))
    asked = Rollout(prompt=first.prompt, completion=completion, grade=first.grade)
    column_K = collated(PAIRS, [asked, *others], **TWO_STEPS).batch.sampled_K
    assert column_K[0] == -0.5
    assert column_K[1:].isnan().all()
    assert collated(PAIRS, four_groups(), **TWO_STEPS).batch.sampled_K is None


# Rewards of tokens.


def ended(one: Rollout) -> Rollout:
    """The rollout with the token that ends a completion, which adds nothing to its text."""
    completion = replace(one.completion, token_ids=(*one.completion.token_ids, Renderer.eos_token_ids[0]))
    return replace(one, completion=completion)


def test_a_reward_without_steps_falls_to_the_last_token_which_ends_the_completion() -> None:
    one = rollout(0, "abcd", 0.5)
    assert rewards_by_token(one, Renderer().decode) == [0.0, 0.0, 0.0, 0.5]
    assert rewards_by_token(ended(one), Renderer().decode) == [0.0, 0.0, 0.0, 0.0, 0.5]
    assert rewards_by_token(ended(rollout(0, "", 0.5)), Renderer().decode) == [0.5]


def test_a_completion_without_tokens_has_no_token_to_reward() -> None:
    assert rewards_by_token(rollout(0, "", 0.5), Renderer().decode) == []


def test_a_steps_reward_falls_to_the_token_that_ends_it() -> None:
    one = rollout(0, "abcd", 1.75, step_rewards=((2, 0.25), (3, 0.5), (4, 1.0)))
    assert rewards_by_token(one, Renderer().decode) == [0.0, 0.25, 0.5, 1.0]
    assert rewards_by_token(ended(one), Renderer().decode) == [0.0, 0.25, 0.5, 0.0, 1.0]


def test_the_tokens_of_a_stop_string_are_in_no_step_and_the_last_of_them_ends_the_completion() -> None:
    """Of "abcd" the text ends before the stop string "cd"."""
    one = rollout(0, "abcd", 0.75, step_rewards=((1, 0.25), (2, 0.5)))
    one = replace(one, completion=replace(one.completion, text="ab"))
    assert rewards_by_token(one, Renderer().decode) == [0.25, 0.0, 0.0, 0.5]


def test_a_token_that_ends_several_steps_gets_all_of_their_rewards() -> None:
    one = rollout(0, "abcd", 1.75, step_rewards=((1, 0.25), (2, 0.5), (4, 1.0)))

    def two_letters_a_token(token_ids: Any) -> str:
        return Renderer().decode(token_ids) * 2  # the first token says "aa", all four eight letters

    assert rewards_by_token(one, two_letters_a_token) == [0.75, 0.0, 0.0, 1.0]


def test_step_rewards_reach_ppo_and_no_other_objective() -> None:
    rollouts = [rollout(0, "abcd", 1.5, step_rewards=((2, 0.5), (4, 1.0))), rollout(1, "ab", 1.0)]
    one_step = {"batch_size": 2, "mini_batch_size": 2}
    found = collated({"name": "ppo"}, rollouts, **one_step).batch
    assert found.rewards_K.tolist() == [0.0, 0.5, 0.0, 1.0, 0.0, 1.0]
    assert collated({"name": "astar_po"}, rollouts, **one_step).batch.rewards_K is None


def test_the_quantile_is_the_share_of_rewards_that_are_no_greater() -> None:
    rewards = [0.0, 0.5, 0.5, 2.0]
    assert [quantile(value, rewards) for value in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0.0, 0.25, 0.75, 0.75, 1.0]
