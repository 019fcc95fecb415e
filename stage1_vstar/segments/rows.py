"""Rows of segments.parquet from the completions of a prompt's states."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.segments.files import standard_error
from common.segments.split import StepCutter
from stage1_vstar.segments.states import Sample, State, TokenIds

Decode = Callable[[Sequence[int]], str]


@dataclass(slots=True, kw_only=True)
class Tally:
    """Rewards between 0 and 1 that are added up."""

    total: float = 0.0
    count: int = 0

    def add(self, other: "Tally") -> None:
        self.total += other.total
        self.count += other.count

    @property
    def mean(self) -> float:
        return self.total / self.count

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Tally":
        return cls(total=sum(sample.reward for sample in samples), count=len(samples))


@dataclass(slots=True, kw_only=True)
class Action:
    """A next step of a state, and the completions that begin with it."""

    token_ids: TokenIds
    ends: bool
    """Whether the completion ends with it."""
    samples: list[Sample] = field(default_factory=list)


def rows_of(
    states: Sequence[State], completions: Mapping[str, Sequence[Sample]], cutter: StepCutter, decode: Decode
) -> list[dict[str, Any]]:
    """The rows of a prompt's states; `completions` by state id. States without a judged completion are left out."""
    judged = {
        state.prefix.tobytes(): [sample for sample in completions.get(state.id, ()) if sample.is_judged]
        for state in states
        if not state.is_terminal
    }
    rows = []
    for state in states:
        own = [state.solutions[0]] if state.is_terminal else list(completions.get(state.id, ()))
        tally = Tally.of(own if state.is_terminal else judged[state.prefix.tobytes()])
        if not tally.count:
            continue
        actions = [] if state.is_terminal else actions_of(state, judged[state.prefix.tobytes()], cutter)
        rows.append(
            {
                **_described(state, decode),
                "num_completions": len(own),
                "rewards": [sample.reward for sample in own],
                "outcomes": [sample.outcome for sample in own],
                "completion_tokens": [len(sample.token_ids) - len(state.prefix) for sample in own],
                "value": tally.mean,
                "value_se": 0.0 if state.is_terminal else standard_error(tally.total, tally.count),
                **_columns(state, actions, judged, decode),
            }
        )
    return rows


def actions_of(state: State, samples: Sequence[Sample], cutter: StepCutter) -> list[Action]:
    """The different next steps of a state's completions, in the order in which they were first drawn."""
    actions: dict[bytes, Action] = {}
    for sample in samples:
        rest = sample.token_ids[len(state.prefix) :]
        step = rest[: cutter.first_end(rest)]
        action = actions.setdefault(step.tobytes(), Action(token_ids=step, ends=len(step) == len(rest)))
        action.samples.append(sample)
    return list(actions.values())


def _described(state: State, decode: Decode) -> dict[str, Any]:
    return {
        "state_id": state.id,
        "prompt_id": state.prompt.id,
        "prompt": state.prompt.text,
        "answer": state.prompt.answer,
        "prompt_token_hash": state.prompt.token_hash,
        "prefix": decode(state.prefix),
        "prefix_token_ids": list(state.prefix),
        "step": state.step,
        "solutions": [solution.index for solution in state.solutions],
        "is_terminal": state.is_terminal,
    }


def _columns(
    state: State, actions: Sequence[Action], judged: Mapping[bytes, Sequence[Sample]], decode: Decode
) -> dict[str, Any]:
    """The columns of a state's actions. An action that leads to a state of the table has that state's rewards too."""
    before = decode(state.prefix)
    tallies = []
    for action in actions:
        tally = Tally.of(action.samples)
        tally.add(Tally.of(judged.get((state.prefix + action.token_ids).tobytes(), ())))
        tallies.append(tally)
    return {
        "action_texts": [_text(state.prefix + action.token_ids, before, decode) for action in actions],
        "action_token_ids": [list(action.token_ids) for action in actions],
        "action_counts": [len(action.samples) for action in actions],
        "action_ends": [action.ends for action in actions],
        "action_values": [tally.mean for tally in tallies],
        "action_samples": [tally.count for tally in tallies],
    }


def _text(token_ids: TokenIds, before: str, decode: Decode) -> str:
    """The text that the last tokens add."""
    return decode(token_ids)[len(before) :]
