"""The GSM8K rule: the number after the last `####`, compared exactly.

No fallback to "the last number anywhere": the marker is the format that the reference solutions teach,
and two stages that read different formats regress to different rewards.
"""

import re
from decimal import Decimal

from common.errors import UserError
from common.grading.outcome import Grade, Outcome, graded

VERSION = "gsm8k/4"
MARKER = "####"
MAX_COMPLETION_CHARACTERS = 65_536

# Possessive: linear on any text. A number that goes on as a fraction, power, time, range, list, calculation or
# another number is not the answer it begins with; nor is one whose commas are not those of thousands.
_GROUP = r"(?:,(?:\\!)?|\{,\}|\\,|['’\u2007\u2009\u202f])[0-9]{3}(?![0-9])"
_DIGITS = rf"(?:[1-9][0-9]{{0,2}}(?:{_GROUP})++|[0-9]++)"
_MONEY = r"(?:(?:US)?\\?\$|[€£¥₹]) ?"
# What may stand between a number and its continuation: marks of the same line, and the braces of words.
_BETWEEN = (
    r"(?:[ \t\u2007\u2009\u202f,;&|~*_`'’{}$€£¥₹·⋅∙•∗—-]|[xX](?=[ \t]*[0-9])"
    r"|\\(?:[ ,:;!$]|(?:text[a-z]*|math[a-z]*|mbox)[ ]*\{|q?quad(?![A-Za-z])))*+"
)
_NUMBER_WORD = (
    r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:an? |one )?(?:half|third|quarter|fourth|hundred))(?![a-z])"
)
_CONNECTION = r"(?:and|or|to|plus|minus|times|(?:divided|multiplied) by|by|over|mod|point)(?![a-z])"
_COMMAND = (
    r"\\(?:(?:[cdst]|nice)?frac|[dt]?binom|sqrt|pi|times|cdots?|[dl]?dots|div|ast|pm|mp|[bp]?mod|over|approx|sim|to|cup)"
    r"(?![A-Za-z])"
)
# `2(3)` goes on; the bracket of `60 (12 * 5)` is a remark, as is any LaTeX command that is not named here.
_CONTINUATION = (
    rf"\([^A-Za-z0-9()]*+[0-9][^A-Za-z()]*+\)|{_BETWEEN}(?:\.?[0-9]|[½¼¾⅐-⅞²³¹⁰-⁹π√∛±≈]|{_COMMAND}"
    r"|(?:[kKMB]|[bm]n|mil)(?![A-Za-z&'’])"
    r"|(?i:hundred|thousand|million|billion|trillion|dozen|(?:squared|cubed)(?![ \t]*[a-z]))"
    rf"|(?i:{_CONNECTION}){_BETWEEN}(?:\.?[0-9]|[½¼¾⅐-⅞π√∛]|(?i:{_NUMBER_WORD})))"
)
_NUMBER = (
    rf"((?:[-+]?(?:{_MONEY})?|{_MONEY}[-+])(?:{_DIGITS}(?:\.[0-9]++)?+|\.[0-9]++))"
    rf"(?!\s?[/^=:+×÷]|\s?[-*]\s?[0-9]|[eE][-+]?[0-9]|{_CONTINUATION})"
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
