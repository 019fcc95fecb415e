"""Choose solutions of a prompt and cut them into states."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from common.data.prompts import token_hash
from common.grading import Outcome
from common.grading.outcome import UNJUDGED
from common.rollout import Prompt
from common.segments.files import state_id
from common.segments.split import StepCutter

TokenIds: TypeAlias = "array[int]"
"""Four bytes per token; as keys they are `tobytes()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A graded completion from a store. Its tokens begin with those of the state that it goes on from."""

    index: int
    token_ids: TokenIds
    outcome: str
    reward: float

    @property
    def is_judged(self) -> bool:
        return self.outcome not in UNJUDGED


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A prompt with the first steps of one or more solutions, which are given by their samples."""

    prompt: Prompt
    prefix: TokenIds
    step: int
    solutions: Sequence[Sample]
    is_terminal: bool
    """Whether it is a whole solution."""

    @property
    def id(self) -> str:
        return state_id(self.prompt.id, self.prefix)

    def as_prompt(self) -> Prompt:
        """What a completer goes on from."""
        tokens = token_hash(self.prompt.token_ids + self.prefix)
        return replace(self.prompt, id=self.id, prefix=self.prefix, token_hash=tokens)


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` different solutions, as many correct as wrong ones, or as nearly so as there are; the first of each kind.

    If one kind has too few, the other fills up. Solutions that were cut off count as wrong, and come last. Those that
    could not be judged are not chosen.
    """
    different = {sample.token_ids.tobytes(): sample for sample in reversed(samples) if sample.is_judged}
    ordered = sorted(
        different.values(), key=lambda sample: (sample.outcome == Outcome.TRUNCATED.value, sample.index)
    )
    correct = [sample for sample in ordered if sample.outcome == Outcome.CORRECT.value]
    wrong = [sample for sample in ordered if sample.outcome != Outcome.CORRECT.value]
    from_correct = min(len(correct), max((count + 1) // 2, count - len(wrong)))
    chosen = correct[:from_correct] + wrong[: count - from_correct]
    return sorted(chosen, key=lambda sample: sample.index)


def states_of(prompt: Prompt, solutions: Sequence[Sample], cutter: StepCutter) -> list[State]:
    """The states that these solutions go through, each once: the prompt first, whole solutions among the others."""
    through: dict[bytes, list[Sample]] = {}
    found: dict[bytes, tuple[TokenIds, int]] = {}
    for solution in solutions:
        ends = list(cutter.ends(solution.token_ids))
        if not ends or ends[-1] < len(solution.token_ids):
            ends.append(len(solution.token_ids))
        for step, end in enumerate([0, *ends]):
            prefix = solution.token_ids[:end]
            found[prefix.tobytes()] = prefix, step
            through.setdefault(prefix.tobytes(), []).append(solution)
    whole = {solution.token_ids.tobytes() for solution in solutions}
    states = [
        State(prompt=prompt, prefix=prefix, step=step, solutions=through[key], is_terminal=key in whole)
        for key, (prefix, step) in found.items()
    ]
    return sorted(states, key=lambda state: (state.step, state.solutions[0].index))
