"""The GSM8K rule: the number after the last `####`, compared exactly.

No fallback to "the last number anywhere": the marker is the format that the reference solutions teach,
and two stages that read different formats regress to different rewards.
"""

import re
from decimal import Decimal

from common.errors import UserError
from common.grading.outcome import Grade, Outcome, graded

VERSION = "gsm8k/2"
MARKER = "####"
MAX_COMPLETION_CHARACTERS = 65_536

# Possessive digits: linear on any text. A number that goes on as a fraction, power, time, range, calculation or
# another number is not the answer it begins with.
_NUMBER = (
    r"([-+]?\$?(?:[0-9][0-9,]*+(?:\.[0-9]++)?+|\.[0-9]++))"
    r"(?!\s?[/^=:+×]|\s?[-*]\s?[0-9]|[ \t]*\.?[0-9]|[eE][-+]?[0-9])"
)
_LEADING_NUMBER = re.compile(r"[\s:$*]*" + _NUMBER)
_BARE_NUMBER = re.compile(r"[\s$]*" + _NUMBER + r"[\s.]*")


def extract_gold(raw: str) -> str:
    """The text after `####` in a dataset's solution; a bare number stands for itself."""
    gold = raw.rpartition(MARKER)[2].strip()
    if not gold:
        raise UserError(f"no reference answer after `{MARKER}` in {raw[-80:]!r}")
    return gold


def validate_gold(gold: str) -> str | None:
    return None if _gold_number(gold) is not None else f"not a number: {gold[:80]!r}"


def grade(prompt: str, completion: str, answer: str) -> Grade:
    gold = _gold_number(answer)
    if gold is None:
        return graded(Outcome.GOLD_UNPARSED)
    _, marker, rest = completion[-MAX_COMPLETION_CHARACTERS:].rpartition(MARKER)
    found = _LEADING_NUMBER.match(rest) if marker else None
    if not found:
        return graded(Outcome.UNPARSED)
    return graded(Outcome.CORRECT if _number(found[1]) == gold else Outcome.WRONG, found[1])


def _gold_number(answer: str) -> Decimal | None:
    match = _BARE_NUMBER.fullmatch(answer)
    return _number(match[1]) if match else None


def _number(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))
