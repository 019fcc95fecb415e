"""A user's own reward: `"package.module:function"`, called as function(prompt, completion, answer) -> float.

It runs where the built-in rules run, so it may loop, crash or exhaust memory without harm to the run.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.grading.outcome import Grade, Outcome, graded


def version(name: str) -> str:
    """The dotted path with a hash of the module's source: an edited reward is another grader."""
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # noqa: BLE001  a parent package's own code runs here
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(f"grader {name!r}: no module {module!r} with a source file on sys.path")
    return f"{name}@{hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]}"


@cache
def load(name: str) -> Callable[[str, str, str], Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"grader {name!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise UserError(f"grader {name!r} is not a function (prompt, completion, answer) -> float")
    return found  # type: ignore[no-any-return]


def grade(name: str, prompt: str, completion: str, answer: str) -> Grade:
    """Keeps the function's reward; `correct` means a reward of at least 1."""
    reward = load(name)(prompt, completion, answer)
    if not isinstance(reward, Real):
        return graded(
            Outcome.VERIFIER_CRASH,
            reason=f"the reward is a {type(reward).__name__}, not a number",
        )
    reward = float(reward)
    if not math.isfinite(reward):
        return graded(Outcome.VERIFIER_CRASH, reason=f"the reward is {reward}")
    return Grade(outcome=Outcome.CORRECT if reward >= 1 else Outcome.WRONG, reward=reward)


def extract_gold(raw: str) -> str:
    return raw


def validate_gold(gold: str) -> str | None:
    return None
