"""A result that nobody can have wanted is called that, with the likeliest cause; an ordinary one is left alone."""

from typing import Any

import polars as pl
import pytest

from common.doubts import doubts, equal_reward
from tests.fakes import rows_of_samples, sample_rows


def rows(outcomes: list[str], rewards: list[float] | None = None, tokens: int | None = None) -> pl.DataFrame:
    samples = sample_rows(
        {"a": outcomes, "b": outcomes}, rewards={"a": rewards, "b": rewards} if rewards else None
    )
    if tokens is not None:
        samples = samples.with_columns(pl.lit(tokens, dtype=pl.Int32).alias("completion_tokens"))
    return rows_of_samples(samples, num_samples=len(outcomes))


@pytest.mark.parametrize(
    "sound",
    [
        {"outcomes": ["correct", "wrong"]},
        {"outcomes": ["truncated", "wrong", "correct"]},
        {"outcomes": ["wrong", "wrong"], "rewards": [0.1, 0.2]},
        {"outcomes": ["unparsed", "verifier_timeout", "correct"]},
    ],
)
def test_rewards_that_differ_raise_no_doubt(sound: dict[str, Any]) -> None:
    assert doubts(rows(**sound)) == []
    assert equal_reward(rows(**sound)) is None


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            {"outcomes": ["truncated", "truncated"]},
            "every completion was cut off at sampling.max_completion_tokens",
        ),
        ({"outcomes": ["unparsed", "wrong"], "tokens": 1}, "every completion is a single token"),
        ({"outcomes": ["verifier_crash", "verifier_timeout"]}, "the grader failed on every completion"),
        ({"outcomes": ["unparsed", "unparsed"]}, "no completion that ended holds an answer that the grader"),
        ({"outcomes": ["unparsed", "truncated"]}, "no completion that ended holds an answer that the grader"),
        ({"outcomes": ["wrong", "truncated"]}, "every completion has the reward 0: the prompts are too hard"),
        ({"outcomes": ["correct", "correct"]}, "every completion has the reward 1: the prompts are too easy"),
        ({"outcomes": ["wrong", "wrong"], "rewards": [-1.0, -1.0]}, "every completion has the reward -1"),
    ],
)
def test_a_result_that_teaches_nothing_is_called_that(result: dict[str, Any], message: str) -> None:
    [line] = doubts(rows(**result))
    assert line.startswith(message)
    assert equal_reward(rows(**result)) is not None


def test_completions_of_one_token_are_doubtful_even_where_rewards_differ() -> None:
    [line] = doubts(rows(["correct", "wrong"], tokens=1))
    assert line.startswith("every completion is a single token")
