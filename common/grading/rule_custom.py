"""A user's own reward: `"package.module:function"`, called as function(prompt, completion, answer) -> float.

It may also give a reward to each step, as a list of (end of the step in characters of the completion, reward): the
completion's reward is their sum. It runs where the built-in rules run, so it may loop, crash or exhaust memory without
harm to the run.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.grading.outcome import Grade, Outcome, graded

WRONG_TYPE = "wrong type: "
"""How the reason of a grade begins whose function returned what is no reward, whatever the completion."""


def version(name: str) -> str:
    """The dotted path with a hash of the module's source: an edited reward is another grader."""
    module, reason = name.partition(":")[0], ""
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a parent package's own code runs here
        spec, reason = None, f" ({_describe(error)})"
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(
            f"grader.name = {name!r}: no module {module!r} with a source file on sys.path{reason}; put it into the "
            "checkout, or its folder on PYTHONPATH"
        )
    return f"{name}@{hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]}"


@cache
def load(name: str) -> Callable[[str, str, str], Any]:
    """The function. Raises UserError unless it can be imported, and called as function(prompt, completion, answer)."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # the module's own code runs here
        raise UserError(f"grader.name = {name!r} cannot be loaded: {_describe(error)}") from error
    if problem := _no_reward_function(found):
        raise UserError(
            f"grader.name = {name!r} {problem}; it must be a function (prompt, completion, answer) -> float"
        )
    return found  # type: ignore[no-any-return]


def _no_reward_function(found: Any) -> str | None:
    """Why it cannot be called for a reward, as far as can be told without a call."""
    if not callable(found):
        return f"is a {type(found).__name__}"
    if inspect.iscoroutinefunction(found) or inspect.isgeneratorfunction(found):
        return "is a coroutine or a generator, whose result is no number"
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some functions that are not written in Python have none
        return None
    try:
        signature.bind("", "", "")
    except TypeError as error:
        return f"takes {signature} ({error})"
    return None


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def refuse_wrong_type(name: str, grade: Grade) -> None:
    """Raise UserError where the function returned what is no reward whatever it is given.

    An exception, None, a number that is not finite or a wrong step may be about one completion alone.
    """
    if not grade.is_judged and grade.reason and grade.reason.startswith(WRONG_TYPE):
        raise UserError(
            f"grader.name = {name!r} returns what is no reward: {grade.reason.removeprefix(WRONG_TYPE)}; "
            "it must be a function (prompt, completion, answer) -> float"
        )


def grade(name: str, prompt: str, completion: str, answer: str) -> Grade:
    """Keeps the function's reward; `correct` means a reward of at least 1."""
    found = load(name)(prompt, completion, answer)
    try:
        if isinstance(found, list | tuple):
            steps = _steps(found, len(completion))
            return _judged(math.fsum(reward for _, reward in steps), steps)
        return _judged(_number(found))
    except TypeError as error:
        return graded(Outcome.VERIFIER_CRASH, reason=f"{WRONG_TYPE}{error}")
    except ValueError as error:
        return graded(Outcome.VERIFIER_CRASH, reason=str(error))


def _judged(reward: float, steps: tuple[tuple[int, float], ...] | None = None) -> Grade:
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


def extract_gold(raw: str) -> str:
    return raw


def validate_gold(gold: str) -> str | None:
    return None
