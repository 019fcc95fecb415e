"""The outcomes of grading a completion, and the one policy that turns an outcome into a reward.

Both stages import these nouns; neither assigns a reward of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_EXTRACTED_CHARACTERS = 512


class Outcome(StrEnum):
    """How grading one completion ended; the value is what the artifacts store."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"  # no answer found, or one that cannot be read
    GOLD_UNPARSED = "gold_unparsed"  # the reference answer itself cannot be read
    TRUNCATED = "truncated"  # cut at the token limit: never read, whatever it says
    VERIFIER_TIMEOUT = "verifier_timeout"
    VERIFIER_CRASH = "verifier_crash"


OUTCOMES = [outcome.value for outcome in Outcome]
"""As the artifacts store them."""

UNJUDGED = frozenset({Outcome.VERIFIER_TIMEOUT, Outcome.VERIFIER_CRASH})
"""Outcomes that say nothing about the completion: the grader failed."""

UNREAD = UNJUDGED | {Outcome.TRUNCATED}
"""Outcomes whose reward is 0 whatever the completion says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verdict on one completion; `reason` says why a grader crashed or a gold was refused, or what a sum is of."""

    outcome: Outcome
    reward: float
    extracted: str | None = None
    reason: str | None = None
    step_rewards: tuple[tuple[int, float], ...] | None = None
    """Per step, if the function gave rewards to steps: its end in characters of the completion, and its reward.

    The reward is their sum.
    """
    parts: tuple[tuple[str, float], ...] | None = None
    """Names and rewards of the parts, if the reward is a weighted sum."""
    judge_tokens: tuple[int, int] | None = None
    """Tokens of the judge's prompt and reply, if a judge model was asked."""

    @property
    def is_judged(self) -> bool:
        """Whether the outcome says anything about the completion: the grader did not fail."""
        return self.outcome not in UNJUDGED

    def as_tuple(self) -> tuple[Any, ...]:
        """Its values in order, as they are sent between processes; `Grade.of` reads them."""
        return (
            *(self.outcome.value, self.reward, self.extracted, self.reason),
            *(self.step_rewards, self.parts, self.judge_tokens),
        )

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> "Grade":
        """Reads the values that `as_tuple` gave."""
        outcome, *others = values
        names = ("reward", "extracted", "reason", "step_rewards", "parts", "judge_tokens")
        return cls(outcome=Outcome(outcome), **dict(zip(names, others, strict=True)))

    def columns(self) -> dict[str, str | float | None]:
        """As the artifacts store it."""
        return {
            "outcome": self.outcome.value,
            "extracted": self.extracted,
            "reward": self.reward,
            "reason": self.reason,
        }


def reward_of(outcome: Outcome) -> float:
    """1 for a correct answer, 0 for everything else (paper, appendix A.3).

    A truncated completion earns 0 in both stages even where its text already holds the right answer:
    without its end-of-text token it is not a finished completion y, so its log-probability is not the
    one the regression target is about. A custom reward replaces this table for what it did grade.
    """
    return 1.0 if outcome is Outcome.CORRECT else 0.0


def negative_rewards_warning(outcomes: Iterable[str], rewards: Iterable[float]) -> str | None:
    """A line for where 0, the reward of a completion that was not read or judged, is better than that of a bad one."""
    unread = total = 0
    lowest = 0.0
    for outcome, reward in zip(outcomes, rewards, strict=True):
        total += 1
        unread += outcome in UNREAD
        lowest = min(lowest, reward)
    if not unread or lowest == 0:
        return None
    return (
        f"warning: rewards go down to {lowest:g}, but the {unread:,} of {total:,} completions that were cut off or "
        "could not be judged have 0, which is better: completions that never end are rewarded; shift the rewards so "
        "that none is below 0 (docs/rewards.md)"
    )


def graded(outcome: Outcome, extracted: str | None = None, *, reason: str | None = None) -> Grade:
    """The grade that the policy gives to an outcome, its texts made fit for storage."""
    return Grade(
        outcome=outcome,
        reward=reward_of(outcome),
        extracted=storable(extracted),
        reason=storable(reason),
    )


def storable(text: str | None) -> str | None:
    """Bounded text without lone surrogates, which neither pyarrow nor polars can hold."""
    if text is None or (text.isascii() and len(text) <= MAX_EXTRACTED_CHARACTERS):
        return text
    return text[:MAX_EXTRACTED_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
