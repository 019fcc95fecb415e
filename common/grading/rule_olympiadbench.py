r"""The OlympiadBench rule: several answers in any order, a tolerance, a unit; the rule "math" compares each answer.

A reference answer is {"answers": […], "tolerance": […], "unit": …} or a text. Answers are cut at commas outside of
brackets, and at `\pm` into two, on both sides; as many must be there, and each must have its own match. The comma of
`1,000` does not cut. Two real numbers may differ by the tolerance, 1e-8 if none is given. (He et al. 2024,
arXiv:2402.14008, and its own grader.)

No timeout of its own, as the rule "math"; powers too large to compute are compared as texts.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from common.grading import rule_math
from common.grading.math_text import clean, elements
from common.grading.math_words import PERCENTAGE, PLACEHOLDERS, contradict
from common.grading.outcome import Grade, Outcome, graded
from common.grading.rule_math import MAX_BOX_CHARACTERS, RELATIVE_TOLERANCE

VERSION = f"olympiadbench/2+{rule_math.VERSION}"
MAX_COMPLETION_CHARACTERS = rule_math.MAX_COMPLETION_CHARACTERS
BEGINNING = '{"answers": '
DEFAULT_TOLERANCE = Fraction(1, 10**8)
ROUNDING = Fraction(101, 100)
"""By which the tolerance is widened, since decimals were compared as floats."""
MOST_BOXES = 64
"""In a line; of a line with more, only the last is read."""
DIGITS = 60
"""To which expressions are evaluated."""
LARGEST_EXPONENT, MOST_DIGITS = 10_000, 20_000
"""Of a power of whole numbers that is computed."""

_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])\s*")
_POWER = re.compile(r"([0-9]+)\s*\^\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_THOUSANDS_BEFORE = re.compile(r"(?:.*[^0-9.,])?[1-9][0-9]{0,2}(?:,[0-9]{3})*", re.DOTALL)
_THOUSANDS_AFTER = re.compile(r"[0-9]{3}(?![0-9])")
_TIGHT_COMMA = re.compile(r"[0-9],[-+]?[0-9]")
_SET = re.compile(r"\\\{(.*)\\\}")
_NAME = re.compile(r"[^=<>]+=(?!=)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gold:
    """A reference answer as it is compared."""

    parts: tuple[str, ...]
    tolerances: tuple[Fraction | None, ...]
    """One per part, None where none is given."""
    is_percentage: bool
    """Whether the answers are in percent, with or without a sign."""


def reference_text(answers: list[str], tolerance: list[float], unit: str | None) -> str:
    """A reference answer as this rule reads it; `tolerance` is one for all answers, one for each, or empty."""
    return json.dumps({"answers": answers, "tolerance": tolerance, "unit": unit}, ensure_ascii=False)


def extract_gold(raw: str) -> str:
    """The reference answer of a worked solution, as the rule "math" finds it, or itself."""
    return raw if raw.startswith(BEGINNING) else rule_math.extract_gold(raw)


def validate_gold(gold: str) -> str | None:
    """The problem with a reference answer, or None. Answers in JSON may be prose, which only the same text matches."""
    if not gold.startswith(BEGINNING):
        return rule_math.validate_gold(gold)
    try:
        parts = _gold(gold).parts
    except ValueError as error:
        return str(error)
    if missing := [part for part in parts if part.strip(" .").casefold() in {"", *PLACEHOLDERS}]:
        return f"{missing[0]!r} stands for a missing answer"
    return None


def grade(prompt: str, completion: str, answer: str) -> Grade:
    try:
        gold = _gold(answer)
    except ValueError as error:
        return graded(Outcome.GOLD_UNPARSED, reason=str(error))
    completion = completion[-MAX_COMPLETION_CHARACTERS:]
    box = rule_math.last_box(completion)
    if not box:
        return graded(Outcome.UNPARSED, box)
    outcome = _verdict(answer, box)
    if outcome is not Outcome.CORRECT and len(gold.parts) > 1:
        boxes = ", ".join(_boxes_of_last_line(completion, box))
        if boxes != box and _verdict(answer, boxes) is Outcome.CORRECT:
            return graded(Outcome.CORRECT, boxes)
    return graded(outcome, box)


def _boxes_of_last_line(completion: str, last: str) -> list[str]:
    """The boxes in the line of the last one, where an answer each was put into a box."""
    line = next(line for line in reversed(completion.splitlines()) if "box" in line)
    if line.count("box") > MOST_BOXES:
        return [last]
    boxes = rule_math.all_boxes(line)
    return boxes if boxes and boxes[-1] == last else [last]


@lru_cache(maxsize=16_384)
def _gold(text: str) -> _Gold:
    """A reference answer, read. Raises ValueError for JSON that is none."""
    answers: list[str] = [text]
    tolerance: list[Fraction | None] = []
    unit = ""
    if text.startswith(BEGINNING):
        answers, tolerance, unit = _from_json(text)
    parts = [part for answer in answers for part in _parts(answer)]
    is_percentage = rule_math.read(f"1 {unit}").unit is PERCENTAGE
    if unit and not is_percentage:
        parts = [_with_unit(part, unit) for part in parts]
    if len(tolerance) not in (0, 1, len(parts)):
        raise ValueError(f"{len(tolerance)} tolerances for {len(parts)} answers")
    each = tolerance if len(tolerance) > 1 else (tolerance or [None]) * len(parts)
    return _Gold(parts=tuple(parts), tolerances=tuple(each), is_percentage=is_percentage)


def _from_json(text: str) -> tuple[list[str], list[Fraction | None], str]:
    try:
        document: Any = json.loads(text)
        answers = document["answers"]
        numbers = [Fraction(str(value)) for value in document.get("tolerance") or []]
        unit = document.get("unit") or ""
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not the JSON of a reference answer: {text[:80]!r}") from error
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers) or not answers:
        raise ValueError(f"its answers are not a list of texts: {text[:80]!r}")
    if not isinstance(unit, str) or any(value < 0 for value in numbers):
        raise ValueError(f"its unit is not a text, or a tolerance is below 0: {text[:80]!r}")
    if any(len(answer) > MAX_BOX_CHARACTERS for answer in answers):
        raise ValueError(f"an answer is longer than {MAX_BOX_CHARACTERS} characters: {text[:80]!r}")
    return answers, list(numbers), unit.strip(" $")


def _with_unit(answer: str, unit: str) -> str:
    return answer + unit if unit.startswith(("^", "\\")) else rf"{answer} \text{{{unit}}}"


def _parts(text: str, *, grouped: bool = True) -> list[str]:
    r"""The answers in a text, in its one spelling: between commas, and both of a `\pm`.

    If `grouped`, the commas of thousands are no such commas.
    """
    spelled = clean(text)
    parts = elements(spelled)
    if grouped:
        parts = _with_thousands(parts, spelled)
    return [both for part in parts for both in _both_signs(part)]


def _with_thousands(parts: list[str], text: str) -> list[str]:
    """The parts with `1,000` in one; as they are if the text also has a comma such as that of `1,2`."""
    joined = parts[:1]
    for part in parts[1:]:
        both = f"{joined[-1]},{part}"
        if both not in text or not _TIGHT_COMMA.search(joined[-1][-1:] + "," + part[:2]):
            joined.append(part)
        elif _THOUSANDS_BEFORE.fullmatch(joined[-1]) and _THOUSANDS_AFTER.match(part):
            joined[-1] = both
        else:
            return parts
    return joined


def _both_signs(text: str) -> list[str]:
    if not _PLUS_MINUS.search(text):
        return [text]
    signs = ({"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"})
    return [_PLUS_MINUS.sub(lambda found: sign[found[1]], text) for sign in signs]  # noqa: B023


@lru_cache(maxsize=16_384)
def _verdict(answer: str, box: str) -> Outcome:
    gold = _gold(answer)

    def is_match(place: int, claim: str) -> bool:
        return _compare(gold, place, claim) is Outcome.CORRECT

    if len(gold.parts) == 1:
        return _compare(gold, 0, box)
    if len(box) > MAX_BOX_CHARACTERS:
        return Outcome.CORRECT if clean(box) == clean(answer) else Outcome.UNPARSED
    spelled = clean(box)
    braces = _SET.fullmatch(spelled)
    inside = braces[1] if braces else spelled
    readings = (_parts(inside, grouped=grouped) for grouped in (True, False))
    claims = next((claims for claims in readings if len(claims) == len(gold.parts)), None)
    if claims is None:
        return Outcome.WRONG
    names = {found[0] for part in gold.parts if (found := _NAME.match(part))}
    if len(names) > 1 and not any("=" in claim for claim in claims):  # `2,1` is not x=1,y=2
        same = all(is_match(place, claim) for place, claim in enumerate(claims))
    else:
        same = _can_be_paired(claims, is_match)
    return Outcome.CORRECT if same else Outcome.WRONG


def _can_be_paired(claims: list[str], is_match: Callable[[int, str], bool]) -> bool:
    """Whether each claim can have an answer of its own."""
    claim_of: dict[int, int] = {}

    def place_for(claim: int, tried: set[int]) -> bool:
        for place in range(len(claims)):
            if place not in tried and is_match(place, claims[claim]):
                tried.add(place)
                if place not in claim_of or place_for(claim_of[place], tried):
                    claim_of[place] = claim
                    return True
        return False

    return all(place_for(claim, set()) for claim in range(len(claims)))


def _compare(gold: _Gold, place: int, claim: str) -> Outcome:
    answer, tolerance = gold.parts[place], gold.tolerances[place]
    if len(claim) > MAX_BOX_CHARACTERS:
        return rule_math.verdict(answer, claim)
    expected, claimed = rule_math.read(answer), rule_math.read(claim)
    if gold.is_percentage:
        expected, claimed = _percentage(expected), _percentage(claimed)
        answer, claim = expected.text, claimed.text
    if contradict(expected.unit, claimed.unit):
        return Outcome.WRONG
    if expected.key == claimed.key != "":
        return Outcome.CORRECT
    if _is_giant(expected.text) or _is_giant(claimed.text):
        return Outcome.WRONG
    values = _values(expected.text, claimed.text)
    if values is None:
        return rule_math.verdict(answer, claim)
    distance, size = abs(values[0] - values[1]), max(map(abs, values))
    within = distance <= (DEFAULT_TOLERANCE if tolerance is None else tolerance) * ROUNDING
    # A tiny number is not 0 unless the data set says so.
    is_near = tolerance is not None or distance <= Fraction(RELATIVE_TOLERANCE) * size
    return Outcome.CORRECT if within and is_near else Outcome.WRONG


def _percentage(answer: rule_math.Answer) -> rule_math.Answer:
    """An answer in percent, which may say so."""
    text, key = (each.removesuffix(r"\%").rstrip() for each in (answer.text, answer.key))
    return replace(answer, text=text, key=key, unit=answer.unit or PERCENTAGE)


def _values(gold: str, claim: str) -> tuple[Fraction, Fraction] | None:
    """Both as real numbers; a name before one or the same name before both is left out. None if one is none."""
    names = [found[0] if (found := _NAME.match(text)) else "" for text in (gold, claim)]
    if all(names) and names[0] != names[1]:
        return None
    expected = _value(gold[len(names[0]) :])
    claimed = None if expected is None else _value(claim[len(names[1]) :])
    return None if expected is None or claimed is None else (expected, claimed)


@lru_cache(maxsize=8_192)
def _value(text: str) -> Fraction | None:
    """A real number, exact or to DIGITS digits."""
    text = text.strip()
    if text.endswith(r"\%"):
        value = _value(text.removesuffix(r"\%"))
        return None if value is None else value / 100
    if (exact := rule_math.plain_number(text)) is not None:
        return exact
    if not text or ":" in text or "=" in text or rule_math.BASE.search(text):
        return None
    from sympy import Expr, Float

    parsed = rule_math.parsed(text, is_real=True)
    if not isinstance(parsed, Expr) or not parsed.is_number:
        return None
    found = parsed.evalf(DIGITS)
    # Of a larger one not enough digits are known to compare by a difference.
    return Fraction(str(found)) if isinstance(found, Float) and abs(found) < 10 ** (DIGITS // 2) else None


def _is_giant(text: str) -> bool:
    """Whether powers of whole numbers in it have too many digits to be computed, such as 10^{10^{10}}."""
    while power := _POWER.search(text):
        base, exponent = int(power[1]), int(power[2] or power[3])
        if exponent > LARGEST_EXPONENT or len(power[1]) * exponent > MOST_DIGITS:
            return True
        value = 1
        if text[: power.start()].rstrip(" {(+-").endswith("^"):
            value = base**exponent
            if value > LARGEST_EXPONENT:
                return True
        text = f"{text[: power.start()]}{value}{text[power.end() :]}"
    return False
