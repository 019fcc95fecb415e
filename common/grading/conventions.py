"""The conventions of reward functions: how each library calls them, and what it takes for an answer.

A function is recognised by the names of its parameters and called as its own library calls it, for one completion at a
time. docs/rewards.md has the table for users.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from common.data.messages import turns_of
from common.grading.outcome import Grade, Outcome, storable
from common.grading.reference import Reference

PLAIN = "plain"
"""function(prompt, completion, answer, **columns) -> float, or a list of (end of a step, reward)."""

OF_TRL = (
    "prompts",
    "completions",
    "completion_ids",
    "completions_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""Arguments that TRL makes itself; one stored page of its documentation spells completions_ids."""

OF_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
OF_VERIFIERS = ("prompt", "completion", "answer", "state", "info", "task")
PARSER = "parser"
"""An argument of verifiers that nothing stands for here."""
ROW_OF_VERIFIERS = ("info", "task")

NOT_APPLICABLE = "None: the reward does not apply"
"""The reason of a grade that a function of TRL's convention leaves out."""

TOKEN_IDS = ("completion_ids", "completions_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One completion, as a reward function gets to see it."""

    prompt: str
    completion: str
    reference: Reference
    token_ids: Sequence[int] | None = None
    """The completion's, where they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The data that a reward function reads besides prompt, completion and answer."""

    columns: tuple[str, ...] = ()
    """Columns that it cannot be called without."""
    optional_columns: tuple[str, ...] = ()
    all_columns: bool = False
    """Whether it takes any column, as **kwargs."""
    as_in_file: bool = False
    """Whether it gets the answer, or prompts and completions, of the kind that the data set's file has."""
    token_ids: bool = False
    """Whether it cannot be called without the completion's token ids."""
    may_read_token_ids: bool = False

    @property
    def reads_row(self) -> bool:
        """Whether it reads anything of a row but the text of its answer."""
        return bool(self.columns or self.optional_columns or self.all_columns or self.as_in_file)

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            columns=tuple(dict.fromkeys((*self.columns, *other.columns))),
            optional_columns=tuple(dict.fromkeys((*self.optional_columns, *other.optional_columns))),
            all_columns=self.all_columns or other.all_columns,
            as_in_file=self.as_in_file or other.as_in_file,
            token_ids=self.token_ids or other.token_ids,
            may_read_token_ids=self.may_read_token_ids or other.may_read_token_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A function with the convention that it follows."""

    function: Callable[..., Any]
    convention: str
    parameters: tuple[str, ...]
    """The names that it can be called with."""
    required: frozenset[str]
    takes_any: bool
    """Whether it has **kwargs."""

    @property
    def is_async(self) -> bool:
        """Whether a call gives a coroutine."""
        of_its_class = type(self.function).__call__
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(of_its_class)

    @property
    def needs(self) -> Needs:
        """The data that must come with a completion."""
        own = {
            PLAIN: self.parameters[:3],
            "trl": OF_TRL,
            "verl": ("solution_str", "ground_truth"),
            "verifiers": tuple(name for name in OF_VERIFIERS if name not in ROW_OF_VERIFIERS),
        }[self.convention]
        others = [name for name in self.parameters if name not in own]
        never_missing = (*OF_VERL, *ROW_OF_VERIFIERS) if self.convention in ("verl", "verifiers") else ()
        required = [name for name in others if name in self.required and name not in never_missing]
        optional = [name for name in others if name not in required]
        if self.convention == "verifiers" and (self.takes_any or "state" in self.parameters):
            optional += [name for name in ROW_OF_VERIFIERS if name not in others]
        if self.convention == "verl" and self.takes_any:
            optional += [name for name in ("data_source", "extra_info") if name not in others]
        return Needs(
            columns=tuple(required),
            optional_columns=tuple(optional),
            all_columns=self.takes_any and self.convention in (PLAIN, "trl"),
            as_in_file=self.convention != PLAIN,
            token_ids=self.convention == "trl" and not {*TOKEN_IDS}.isdisjoint(self.parameters),
            may_read_token_ids=self.convention == "trl" and self.takes_any,
        )

    def call(self, judged: Judged) -> Any:
        """Calls the function for a completion; an async function returns its coroutine."""
        arguments = _ARGUMENTS[self.convention](judged)
        if self.convention == PLAIN:
            further = {name: value for name, value in arguments.items() if self._takes(name)}
            return self.function(judged.prompt, judged.completion, judged.reference.answer, **further)
        return self.function(**{name: value for name, value in arguments.items() if self._takes(name)})

    def _takes(self, name: str) -> bool:
        if self.convention == PLAIN and name in self.parameters[:3]:
            return False
        return self.takes_any or name in self.parameters

    def grade(self, returned: Any, completion: str) -> Grade:
        """The grade that is meant. Raises ValueError, or TypeError for what is no reward whatever the completion."""
        if self.convention == "trl":
            reward = _the_only_one(returned)
            if reward is None:
                raise ValueError(NOT_APPLICABLE)
            return _judged(_number(reward))
        if self.convention == "verl" and isinstance(returned, Mapping):
            return _of_verls_dict(returned)
        if self.convention == PLAIN and isinstance(returned, list | tuple):
            steps = _steps(returned, len(completion))
            return _judged(math.fsum(reward for _, reward in steps), steps)
        return _judged(_number(returned))


def recognise(function: Any, convention: str | None = None) -> RewardFunction:
    """A function with its convention: the one given, or the one that its parameters' names tell.

    Raises TypeError or ValueError, which says why it cannot be called.
    """
    if not callable(function):
        raise TypeError(f"is a {type(function).__name__}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError("is a generator, whose result is no number")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are not written in Python have none
        return RewardFunction(
            function=function,
            convention=convention or PLAIN,
            parameters=("prompt", "completion", "answer"),
            required=frozenset(),
            takes_any=False,
        )
    by_name = [each for each in signature.parameters.values() if each.kind in _BY_NAME]
    found = RewardFunction(
        function=function,
        convention=convention or _convention_of(signature),
        parameters=tuple(each.name for each in by_name),
        required=frozenset(each.name for each in by_name if each.default is each.empty),
        takes_any=any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()),
    )
    if problem := _why_not_callable(found, signature):
        raise ValueError(f"takes {signature} ({problem})")
    return found


_BY_NAME = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def _convention_of(signature: inspect.Signature) -> str:
    names = [each.name for each in signature.parameters.values() if each.kind in _BY_NAME]
    needs_parser = PARSER in names and signature.parameters[PARSER].default is inspect.Parameter.empty
    if "solution_strs" in names:
        raise ValueError(
            "takes a batch, as verl's batch reward manager gives it; give a function of one completion"
        )
    if "completions" in names:
        return "trl"
    if "solution_str" in names:
        return "verl"
    ours = ["prompt", "completion", "answer"]
    out_of_place = any(
        name in names and names[place : place + 1] != [name] for place, name in enumerate(ours)
    )
    if names[:3] == ours and (needs_parser or not {*names}.isdisjoint(("state", "info", "task"))):
        raise ValueError(
            f"takes {signature}, which may be ours, with texts, or verifiers', with messages; set grader.convention to "
            '"plain" or "verifiers"'
        )
    if out_of_place or needs_parser or (names != ours and names and {*names} <= {*OF_VERIFIERS}):
        return "verifiers"
    return PLAIN


def _why_not_callable(found: RewardFunction, signature: inspect.Signature) -> str | None:
    if found.convention != PLAIN:
        unnamed = [
            each.name
            for each in signature.parameters.values()
            if each.kind is each.POSITIONAL_ONLY and each.default is each.empty
        ]
        if unnamed:
            return f"called by name as {found.convention} does, it gets no {', '.join(unnamed)}"
    known = {"verl": OF_VERL, "verifiers": OF_VERIFIERS}.get(found.convention)
    if known is not None:
        unknown = sorted(found.required.difference(known))
        return f"called as {found.convention} does, it gets no {', '.join(unknown)}" if unknown else None
    if found.convention == PLAIN:
        further = dict.fromkeys(found.required.difference(found.parameters[:3]), "")
        try:
            signature.bind("", "", "", **further)
        except TypeError as error:
            return str(error)
    return None


def _of_plain(judged: Judged) -> dict[str, Any]:
    return judged.reference.columns


def _of_trl(judged: Judged) -> dict[str, Any]:
    """Lists of one."""
    prompt: Any = judged.prompt
    completion: Any = judged.completion
    if judged.reference.is_messages:
        prompt, completion = turns_of(judged.prompt), _assistant(judged.completion)
    token_ids = None if judged.token_ids is None else [list(judged.token_ids)]
    return {
        **{name: [cell] for name, cell in judged.reference.columns.items() if name not in OF_TRL},
        **({} if token_ids is None else dict.fromkeys(TOKEN_IDS, token_ids)),
        "prompts": [prompt],
        "completions": [completion],
        "trainer_state": None,
        "log_extra": _nothing_logged,
        "log_metric": _nothing_logged,
    }


def _nothing_logged(name: str, value: Any) -> None:
    """In place of what TRL logs to its trainer."""


def _of_verl(judged: Judged) -> dict[str, Any]:
    columns = judged.reference.columns
    return {
        "data_source": columns.get("data_source", ""),
        "solution_str": judged.completion,
        "ground_truth": judged.reference.given,
        "extra_info": columns.get("extra_info"),
    }


def _of_verifiers(judged: Judged) -> dict[str, Any]:
    prompt, completion = turns_of(judged.prompt), _assistant(judged.completion)
    columns = judged.reference.columns
    seen = {
        "prompt": prompt,
        "completion": completion,
        "answer": judged.reference.given,
        "info": _object(columns.get("info")),
        "task": columns.get("task", "default"),
    }
    return {**seen, "state": dict(seen)}


_ARGUMENTS: Mapping[str, Callable[[Judged], dict[str, Any]]] = {
    PLAIN: _of_plain,
    "trl": _of_trl,
    "verl": _of_verl,
    "verifiers": _of_verifiers,
}


def _assistant(completion: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": completion}]


def _object(cell: Any) -> dict[str, Any]:
    """A cell that is an object, or the JSON text of one; otherwise an empty one."""
    if isinstance(cell, str):
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    return cell if isinstance(cell, dict) else {}


def _the_only_one(returned: Any) -> Any:
    """The one reward of a list for one completion."""
    rewards = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(rewards, list | tuple):
        raise TypeError(f"a {type(returned).__name__}, not a list of rewards")
    if len(rewards) != 1:
        raise TypeError(f"{len(rewards)} rewards for 1 completion")
    return rewards[0]


def _of_verls_dict(returned: Mapping[str, Any]) -> Grade:
    """verl takes `score` for the reward and `acc`, where it is there, for what is correct: True, or at least 1."""
    if "score" not in returned:
        raise TypeError(f"a dict with {', '.join(map(str, returned)) or 'nothing'}, without score")
    grade = _judged(_number(returned["score"]))
    correct = (_judged(_number(returned["acc"])) if "acc" in returned else grade).outcome is Outcome.CORRECT
    predicted = returned.get("pred")
    return Grade(
        outcome=Outcome.CORRECT if correct else Outcome.WRONG,
        reward=grade.reward,
        extracted=None if predicted is None else storable(str(predicted)),
    )


def _judged(reward: float, steps: tuple[tuple[int, float], ...] | None = None) -> Grade:
    """The grade of a reward; `correct` means at least 1."""
    outcome = Outcome.CORRECT if reward >= 1 else Outcome.WRONG
    return Grade(outcome=outcome, reward=reward, step_rewards=steps)


def _steps(found: Sequence[Any], length: int) -> tuple[tuple[int, float], ...]:
    """The ends of steps and their rewards.

    Raises ValueError unless steps follow each other within the completion, TypeError if they are no steps.
    """
    steps: list[tuple[int, float]] = []
    for step in found:
        place = _plain(step[0]) if isinstance(step, list | tuple) and len(step) == 2 else None
        if not isinstance(place, Integral):
            raise TypeError(f"a step's reward is {step!r}, not (end of the step in characters, reward)")
        end = int(place)
        if not (steps[-1][0] if steps else 0) < end <= length:
            raise ValueError(
                f"a step ends at character {end} of {length}, after one that ends at {steps[-1][0] if steps else 0}"
            )
        steps.append((end, _number(step[1])))
    if not steps:
        raise ValueError("the reward is a list without a step")
    return tuple(steps)


def _number(reward: Any) -> float:
    if reward is None:
        raise ValueError("the reward is None")
    plain = _plain(reward)
    if not isinstance(plain, Real):
        raise TypeError(f"the reward is a {type(reward).__name__}, not a number")
    number = float(plain)
    if not math.isfinite(number):
        raise ValueError(f"the reward is {number}")
    return number


def _plain(value: Any) -> Any:
    """A scalar of NumPy, torch or their like as Python's own; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
