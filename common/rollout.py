"""The nouns that cross module boundaries.

A prompt is a question with its reference answer. A completion is what an engine sampled for it. A rollout is
a completion with its grade. Nothing here knows about files, engines or training.
"""

import math
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from common.grading import Grade, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question x and its reference answer.

    `id` is a content hash of text and answer, never a row position, so that the same prompt has the same id in
    every data set, shard and run. `token_ids` is what the model reads: the text in its template, tokenised, in an
    array of four bytes per token; `token_hash` is a hash of them.

    A state of a solution is a prompt with a `prefix`: the tokens with which each of its completions begins. Its id and
    hash are of prompt and prefix together.
    """

    id: str
    text: str
    answer: str
    token_ids: "array[int]"
    token_hash: str
    prefix: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One completion to sample. With a seed the sample does not depend on the other requests of its batch.

    `prefix` is the beginning of the completion, which is given: only the rest is sampled.
    """

    key: Hashable
    prompt_token_ids: tuple[int, ...]
    seed: int
    prefix: tuple[int, ...] = ()
    with_logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A sampled completion y. `token_ids` includes what ended it, if it was not truncated; `text` does not.

    Both begin with the prefix that was given, if any. `sampled_logprobs` are those of the sampling distribution
    (temperature, min-p, top-k and top-p applied), if requested; requests with a prefix cannot ask for them.
    """

    key: Hashable
    token_ids: tuple[int, ...]
    text: str
    truncated: bool
    sampled_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt, a completion of it and the completion's grade.

    If the prompt is a state of a solution and the completion its next step, there may be no grade, but an advantage
    that was computed before.
    """

    prompt: Prompt
    completion: Completion
    grade: Grade | None = None
    advantage: float | None = None

    @property
    def graded(self) -> Grade:
        """The grade of a whole completion."""
        assert self.grade is not None, "a step has no grade"
        return self.grade

    @property
    def reward(self) -> float:
        """The reward; nan without a grade."""
        return math.nan if self.grade is None else self.grade.reward

    @property
    def is_judged(self) -> bool:
        """Whether the grader did not fail."""
        return self.grade is None or self.grade.is_judged

    @property
    def is_solved(self) -> bool:
        return self.grade is not None and self.grade.outcome == Outcome.CORRECT
