"""The GSM8K rule: the number after the last `####`, compared exactly.

No fallback to "the last number anywhere": the marker is the format that the reference solutions teach,
and two stages that read different formats regress to different rewards.
"""

import re
from decimal import Decimal

from common.errors import UserError
from common.grading.outcome import Grade, Outcome, graded

VERSION = "gsm8k/3"
MARKER = "####"
MAX_COMPLETION_CHARACTERS = 65_536

# Possessive digits: linear on any text. A number that goes on as a fraction, power, time, range, calculation or
# another number is not the answer it begins with.
_MONEY = r"(?:(?:US)?\\?\$|[€£¥₹]) ?"
_NUMBER = (
    rf"((?:[-+]?(?:{_MONEY})?|{_MONEY}[-+])(?:[0-9][0-9,]*+(?:\.[0-9]++)?+|\.[0-9]++))"
    r"(?!\s?[/^=:+×÷]|\s?\\(?:times|cdot|div|frac)|\s?[-*]\s?[0-9]|[ \t]*\.?[0-9]|[eE][-+]?[0-9]"
    r"|_[0-9]|[½¼¾⅐-⅞²³¹⁰-⁹]|k(?![a-z])|\s?(?:hundred|thousand|million|billion|dozen)|\s(?:or|to)\s\$?[0-9])"
)
_LEADING_NUMBER = re.compile(rf"(?:\\(?:boxed|fbox|text|mathbf|textbf)\{{|\\[(\[]|[\s:$*_`{{])*{_NUMBER}")
_BARE_NUMBER = re.compile(rf"[\s$]*{_NUMBER}[\s.]*")
_NOT_IN_NUMBERS = re.compile(r"[^-+0-9.]")
# Minus signs and dashes, the full-width forms and their comma and full stop.
_ASCII = str.maketrans(
    dict.fromkeys("−–﹣－", "-")
    | {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F) if chr(code) not in "-#"}
    | {"\u00a0": " "}
)


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
    found = _LEADING_NUMBER.match(rest.translate(_ASCII)) if marker else None
    if not found:
        return graded(Outcome.UNPARSED)
    return graded(Outcome.CORRECT if _number(found[1]) == gold else Outcome.WRONG, found[1])


def _gold_number(answer: str) -> Decimal | None:
    match = _BARE_NUMBER.fullmatch(answer.translate(_ASCII))
    return _number(match[1]) if match else None


def _number(text: str) -> Decimal:
    return Decimal(_NOT_IN_NUMBERS.sub("", text))
