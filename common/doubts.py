"""Detect results of stage 1 that cannot be intended, and name the likeliest cause."""

import polars as pl

from common.grading import Outcome
from common.grading.outcome import UNJUDGED

SHORTEST = 1
"""Number of tokens of a completion that consists only of its end token."""
ALL_TRUNCATED = (
    "every completion was cut off at sampling.max_completion_tokens: raise it, or the model writes an EOS token that "
    "is no end here (eos_token_id in its generation_config.json), or it was not trained to stop, as a base model under "
    "a chat template: then name in sampling.stop the text that ends an answer"
)


def doubts(rows: pl.DataFrame) -> list[str]:
    """The problems of vstar.parquet's rows as a whole, the most telling first; empty if they look sound."""
    columns = ["rewards", "outcomes", "completion_tokens"]
    samples = rows.select(columns).explode(columns)
    if samples.is_empty():
        return []
    outcomes = samples["outcomes"]
    found = []
    if (samples["completion_tokens"] <= SHORTEST).all():
        found.append(
            "every completion is a single token: the model ends at once. Is the prompt's template right for it "
            "(data.template), does the prompt end in an EOS token, are its weights whole?"
        )
    elif (outcomes == Outcome.TRUNCATED).all():
        found.append(ALL_TRUNCATED)
    elif outcomes.is_in([outcome.value for outcome in UNJUDGED]).all():
        found.append("the grader failed on every completion: see grader.name, timeout_seconds and memory_gib")
    elif (
        equal_reward(rows) is not None
        and (outcomes.filter(outcomes != Outcome.TRUNCATED) == Outcome.UNPARSED).all()
    ):
        found.append(
            "no completion that ended holds an answer that the grader finds: the prompt has to ask for its format "
            "(data.template), grader.name has to be the one for these answers, and an instruct model needs its chat "
            'template (data.template = "chat")'
        )
    if (reward := equal_reward(rows)) is not None and not found:
        found.append(
            f"every completion has the reward {reward:g}: the prompts are "
            + (
                "too hard for this model, or their reference answers wrong"
                if reward <= 0
                else "too easy for it"
            )
            + ", or the grader does not tell right from wrong"
        )
    return found


def equal_reward(rows: pl.DataFrame) -> float | None:
    """The reward that all samples have in common, if they do: then there is nothing to learn."""
    rewards = rows["rewards"].explode()
    return float(rewards[0]) if rewards.n_unique() == 1 else None
