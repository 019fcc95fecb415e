"""A user's own reward: `"package.module:function"`, in one of the conventions of conventions.py.

It runs where the built-in rules run, so it may loop, crash or exhaust memory without harm to the run.
"""

import hashlib
import importlib
import importlib.util
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.grading.conventions import Judged, RewardFunction, recognise
from common.grading.outcome import Grade, Outcome, graded

WRONG_TYPE = "wrong type: "
"""The beginning of a grade's reason if the function returned something that is never a reward."""

ADVICE = "docs/rewards.md lists the functions that can be called"


def version(name: str, convention: str | None) -> str:
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
    called_as = f" as {convention}" if convention else ""
    return f"{name}@{hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]}{called_as}"


@cache
def load(name: str, convention: str | None = None) -> RewardFunction:
    """The function. Raises UserError unless it can be imported, and called in a convention."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # the module's own code runs here
        raise UserError(f"grader.name = {name!r} cannot be loaded: {_describe(error)}") from error
    try:
        return recognise(found, convention)
    except (TypeError, ValueError) as error:
        raise UserError(f"grader.name = {name!r} {error}; {ADVICE}") from error


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def grade(function: RewardFunction, judged: Judged) -> Grade:
    """Keeps the function's reward."""
    return _grade_of(function, function.call(judged), judged)


async def grade_async(function: RewardFunction, judged: Judged) -> Grade:
    """The same of a function whose reward has to be waited for."""
    try:
        returned = function.call(judged)
        if inspect.isawaitable(returned):
            returned = await returned
    except (SystemExit, KeyboardInterrupt) as error:  # which asyncio would let end the process
        raise RuntimeError(_describe(error)) from error
    return _grade_of(function, returned, judged)


def _grade_of(function: RewardFunction, returned: Any, judged: Judged) -> Grade:
    try:
        return function.grade(returned, judged.completion)
    except TypeError as error:
        return graded(Outcome.VERIFIER_CRASH, reason=f"{WRONG_TYPE}{error}")
    except ValueError as error:
        return graded(Outcome.VERIFIER_CRASH, reason=str(error))
