"""The graders by name: what each reads from a data set, how it grades, and the version that pins its verdicts."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from common.errors import UserError
from common.grading import rule_code, rule_custom, rule_gsm8k, rule_math
from common.grading.outcome import Grade

_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """A named rule. `warm_up` loads what the first grade would otherwise load on its own deadline.

    `own_seconds` is the time that it gives a completion itself.
    """

    name: str
    version: str
    grade: Callable[[str, str, str], Grade]
    extract_gold: Callable[[str], str]
    validate_gold: Callable[[str], str | None]
    warm_up: Callable[[], object]
    max_completion_characters: int | None = None
    own_seconds: float = 0.0


GRADERS: dict[str, Grader] = {
    "gsm8k": Grader(
        name="gsm8k",
        version=rule_gsm8k.VERSION,
        grade=rule_gsm8k.grade,
        extract_gold=rule_gsm8k.extract_gold,
        validate_gold=rule_gsm8k.validate_gold,
        warm_up=partial(rule_gsm8k.validate_gold, "1"),
        max_completion_characters=rule_gsm8k.MAX_COMPLETION_CHARACTERS,
    ),
    "math": Grader(
        name="math",
        version=rule_math.VERSION,
        grade=rule_math.grade,
        extract_gold=rule_math.extract_gold,
        validate_gold=rule_math.validate_gold,
        warm_up=partial(rule_math.grade, "", r"\boxed{x+1}", r"\frac{1}{2}"),
        max_completion_characters=rule_math.MAX_COMPLETION_CHARACTERS,
    ),
    "code": Grader(
        name="code",
        version=rule_code.VERSION,
        grade=rule_code.grade,
        extract_gold=rule_code.extract_gold,
        validate_gold=rule_code.validate_gold,
        warm_up=rule_code.warm_up,
        max_completion_characters=rule_code.MAX_COMPLETION_CHARACTERS,
        own_seconds=rule_code.SECONDS,
    ),
}


def is_grader_name(name: str) -> bool:
    return name in GRADERS or _DOTTED_PATH.fullmatch(name) is not None


def find_grader(name: str) -> Grader:
    """The built-in grader of that name, or the reward function at that dotted path."""
    if name in GRADERS:
        return GRADERS[name]
    if not is_grader_name(name):
        raise UserError(
            f"unknown grader {name!r}: use one of {', '.join(GRADERS)} or a function as 'package.module:function'"
        )
    return Grader(
        name=name,
        version=rule_custom.version(name),
        grade=partial(rule_custom.grade, name),
        extract_gold=rule_custom.extract_gold,
        validate_gold=rule_custom.validate_gold,
        warm_up=partial(rule_custom.load, name),
    )


def extract_gold(grader_name: str, raw: str) -> str:
    """The reference answer in a data set's own field; UserError where there is none, or not just one."""
    return find_grader(grader_name).extract_gold(raw)


def validate_gold(grader_name: str, gold: str) -> str | None:
    """What is wrong with a reference answer, found in this process; `GraderPool.validate_golds` is the safe way."""
    return find_grader(grader_name).validate_gold(gold)
