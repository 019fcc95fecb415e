r"""The MATH rule: the content of the last `\boxed{}`, compared in four steps, cheapest first.

1. `math_text.clean` writes both answers in one spelling; `math_words` takes units and introductions off.
2. Equal texts, plain numbers (as exact fractions), times, numerals with a base, words and named values are decided.
3. `math_latex.parse` reads the rest, the box alone: extraction from prose reads `2007 + \frac\pi 2` as 2.
4. math-verify compares, behind guards for its known holes: see `_consistent` and `_same_scale`.

Every verdict is cached. No timeout of its own: the worker that runs the rule keeps the time.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from math import gcd
from typing import Any

from common.errors import UserError
from common.grading import math_latex
from common.grading.math_text import ELLIPSIS, THOUSANDS, clean, elements
from common.grading.math_words import PLACEHOLDERS, Unit, contradict, split_unit, without_introduction
from common.grading.outcome import Grade, Outcome, graded

VERSION = f"math/4+math-verify-{version('math-verify')}"
MAX_BOX_CHARACTERS = 512
MAX_COMPLETION_CHARACTERS = 65_536
# A float in either answer may be rounded: beyond this relative difference two numbers are different answers.
RELATIVE_TOLERANCE = 1e-4

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})*|[A-Za-z](?![A-Za-z]| [a-z])|-?[0-9]+(?:\.[0-9]+)?")
_USED_BOX = re.compile(rf"{_BOX.pattern}\s*+(?=\{{|{_TOKEN.pattern})")
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_SPACING = re.compile(
    r"(?:\\[!,;:> ]|\\quad|\\displaystyle|\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\$|~|\s)+"
)

_INTEGER = re.compile(r"[-+]?[0-9]+")
_DECIMAL = re.compile(r"[-+]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|[-+]?\.[0-9]+")
_POSITIVE = "(0*[1-9][0-9]*)"
_RATIO = re.compile(
    rf"([-+]?)([0-9]*)\s*\\frac\{{{_POSITIVE}\}}\{{{_POSITIVE}\}}|([-+]?)((?:[0-9]+\s+)?){_POSITIVE}/{_POSITIVE}"
)
_POWER_OF_TEN = re.compile(
    r"([-+]?)(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\{\+?(-?[0-9]{1,4})\}"
)
_NO_NUMBER = re.compile(r"[0-9]\s+[0-9]")
_CLOCK = re.compile(
    r"([0-9]{1,2})(?::([0-5][0-9]))?\s*(?:\\text\{)?\s*([ap])\.?\s?m\.?\}?|([0-9]{1,2}):([0-5][0-9])",
    re.IGNORECASE,
)
BASE = re.compile(
    r"(?<![A-Za-z])\(?(-?[0-9](?:[0-9.]*|[0-9A-Fa-f.]*(?=\)?_\{(?:1[1-6]|hex|sixteen))))\)?"
    r"_\{\s*\(?([0-9]+|[a-z]+)\)?\s*\}"
)
_BASES = {
    word: str(base)
    for base, word in enumerate(
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"], 2
    )
} | {"sixteen": "16", "binary": "2", "octal": "8", "decimal": "10", "hex": "16", "hexadecimal": "16"}
_NAMED = re.compile(
    r"(\\text\{[^{}]*\}|(?:\\[a-z]+ )?[A-Za-z]+(?:_\{[A-Za-z0-9]+\})?(?:\([^()=]*\))?|\\[a-z]+) ?= ?([^=<>]+)"
)
_NAMED_TUPLE = re.compile(r"\(([A-Za-z](?: ?, ?[A-Za-z])+)\) ?= ?\((.+)\)")
_PHRASE = re.compile(r"\\text\{([^{}]+)\}|\(?([A-Za-z][A-Za-z' -]*|[A-Za-z][a-z]{2,}\.? [0-9]{1,4})\)?")
_SHORT_WORDS = frozenset(["yes", "no", "odd", "even", "true", "false", "none", "nan", "null", "all", "both"])
_PROSE = re.compile(
    r"\\text\{[^{}]*\}|\\[A-Za-z]+|\{[a-z]+\}|(?<![A-Za-z])([A-Za-z]?[a-z]{3,}|is|are|of|an|the|we)(?![A-Za-z])"
)
_SENTENCE = frozenset(["is", "are", "the", "we", "that", "see"])
_NAME_BEFORE_BRACKETS = re.compile(r"^[A-Za-z](?:_\{[A-Za-z0-9]+\})? ?(?:=|\\in(?![A-Za-z])) ?")
_ROUNDED = re.compile(r"\\approx -?[0-9]*\.?[0-9]+ ?\\ldots(?= ?(?:[,;)]|$))")
_SERIES = re.compile(r"(?:^|(?<=,))[^,]*[^\s,] ?\\ldots[^,=]*=")
_QUOTED = re.compile(r"\s*[\[{(]\s*['\"]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer in its one spelling, without its unit."""

    text: str
    key: str  # without space
    unit: Unit | None


def extract_gold(raw: str) -> str:
    r"""The content of a reference solution's only `\boxed{}`; a text without any box is the answer itself.

    UserError where there is none, or several that differ.
    """
    if not _BOX.search(raw):
        if not raw.strip():
            raise UserError("the reference answer is empty")
        if len(raw) > MAX_BOX_CHARACTERS:
            raise UserError(rf"no \boxed{{}} in the reference solution that ends in {raw[-80:]!r}")
        return raw.strip()
    boxes = list(dict.fromkeys(all_boxes(raw)))
    if not boxes or not all(boxes):
        raise UserError(
            rf"an empty or unclosed \boxed{{}} in the reference solution that ends in {raw[-80:]!r}"
        )
    if len(boxes) > 1 and len({_spelling(box) for box in boxes}) > 1:
        raise UserError(f"several different boxes in the reference solution: {', '.join(boxes)[:160]}")
    return boxes[-1]


def _spelling(box: str) -> Fraction | str:
    if len(box) > MAX_BOX_CHARACTERS:
        return _normalised(box)
    answer = read(box)
    return plain_number(answer.text) or answer.key


def validate_gold(gold: str) -> str | None:
    """Why a reference answer cannot be used, or None."""
    if not gold.strip():
        return "the reference answer is empty"
    return _problem(gold)


def grade(prompt: str, completion: str, answer: str) -> Grade:
    box = last_box(completion[-MAX_COMPLETION_CHARACTERS:])
    if not box:
        return graded(Outcome.UNPARSED, box)
    return graded(verdict(answer, box), box)


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed` or `\fbox`, braces counted; None where there is none or it never closes.

    `\boxed` before a word is talked about, not used.
    """
    end = len(text)
    while True:
        start = text.rfind(r"\boxed", 0, end)
        start = max(start, text.rfind(r"\fbox", max(start, 0), end))
        if start < 0:
            return None
        if command := _USED_BOX.match(text, start):
            return _box_at(text, command.end())
        end = start


def all_boxes(text: str) -> list[str]:
    """The contents of all boxes in order, of a box in a box too; empty for one that never closes."""
    return [_box_at(text, command.end()) or "" for command in _USED_BOX.finditer(text)]


def _box_at(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        token = _TOKEN.match(text, start)
        return token[0] if token else None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return _unwrapped(text[start + 1 : brace.start()].strip())
    return None


def _unwrapped(content: str) -> str:
    """Content without braces around the whole of it."""
    while len(content) <= MAX_BOX_CHARACTERS and content.startswith("{"):
        depth = 0
        for brace in _BRACE.finditer(content):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                break
        if depth or brace.end() != len(content):
            break
        content = content[1:-1].strip()
    return content


@lru_cache(maxsize=16_384)
def verdict(answer: str, box: str) -> Outcome:
    """The outcome of a box's content beside the reference answer."""
    if len(answer) > MAX_BOX_CHARACTERS or len(box) > MAX_BOX_CHARACTERS:
        if _normalised(answer) == _normalised(box):
            return Outcome.CORRECT
        return Outcome.GOLD_UNPARSED if len(answer) > MAX_BOX_CHARACTERS else Outcome.UNPARSED
    gold, claim = read(answer), read(box)
    if contradict(gold.unit, claim.unit):
        return Outcome.WRONG
    if gold.key == claim.key != "":
        return Outcome.GOLD_UNPARSED if ELLIPSIS in gold.text and _problem(answer) else Outcome.CORRECT
    for decide in (_as_numbers, _as_times, _as_ratios, _as_numerals, _as_words, _as_named_values):
        if decided := decide(gold.text, claim.text):
            return decided
    decided = _as_mathematics(gold.text, claim.text)
    if decided is Outcome.WRONG and _is_percent_left_out(gold.text, claim.text):
        return verdict(*(text.removesuffix(r"\%") for text in (gold.text, claim.text)))
    return decided


@lru_cache(maxsize=16_384)
def read(text: str) -> Answer:
    """An answer as it is compared."""
    body = without_introduction(clean(text))
    unit = None
    if not _CLOCK.fullmatch(body):
        body, unit = split_unit(body)
        if r"\text" in body or r"\$" in body:
            body = ", ".join(split_unit(part)[0] for part in elements(body, ","))
    body = _unwrapped(body)
    if body.endswith(ELLIPSIS) and _phrase(words := body.removesuffix(ELLIPSIS).rstrip()):
        body = words
    return Answer(text=body, key=_SPACE.sub("", body), unit=unit)


def _as_numbers(gold: str, claim: str) -> Outcome | None:
    """The verdict where both sides are plain numbers, as math-verify and `_same_scale` would give it."""
    expected, claimed = plain_number(gold), plain_number(claim)
    if expected is None or claimed is None:
        return None
    if expected == claimed:
        return Outcome.CORRECT
    distance, size = abs(expected - claimed), max(abs(expected), abs(claimed))
    if "." in gold + claim and distance <= max(Fraction(1, 10**5), size / 10**9):
        return None  # math-verify rounds decimals to six places
    return Outcome.WRONG


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed number or power of ten; None for any other text."""
    if _INTEGER.fullmatch(text):
        return Fraction(text)
    if _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    if ratio := _RATIO.fullmatch(text):
        sign, whole, above, below = (part for part in ratio.groups() if part is not None)
        part = Fraction(int(above), int(below))
        if whole.strip() and part >= 1:
            return None  # a product: the fraction of a mixed number is less than 1
        value = int(whole or 0) + part
        return -value if sign == "-" else value
    if power := _POWER_OF_TEN.fullmatch(text):
        value = Fraction(power[2] or 1) * Fraction(10) ** int(power[3])
        return -value if power[1] == "-" else value
    return None


def _is_percent_left_out(*texts: str) -> bool:
    """Whether one side alone says percent; `0.5` is a half, and not half a percent."""
    if "".join(texts).count("%") != 1 or not any(text.endswith(r"\%") for text in texts):
        return False
    values = [plain_number(text.removesuffix(r"\%").rstrip()) for text in texts]
    return all(value is None or abs(value) > 1 for value in values)


def _as_times(gold: str, claim: str) -> Outcome | None:
    """Times of a day; `2:3`, and what could be a ratio in lowest terms, is a ratio."""
    expected, claimed = _clock(gold), _clock(claim)
    if expected is None or claimed is None:
        said = expected or claimed
        return Outcome.WRONG if said and said[1] else None
    if expected[1] is None and claimed[1] is None and _could_be_ratio(gold):
        return None
    same_half = expected[1] == claimed[1] or None in (expected[1], claimed[1])
    return Outcome.CORRECT if expected[0] == claimed[0] and same_half else Outcome.WRONG


def _clock(text: str) -> tuple[int, str | None] | None:
    """Minutes since twelve, and `a` or `p` where that is said."""
    time = _CLOCK.fullmatch(text)
    if not time:
        return None
    hour, minute, half = int(time[1] or time[4]), int(time[2] or time[5] or 0), time[3]
    if hour > (12 if half else 24):
        return None
    if not half and (hour > 12 or hour == 0):
        half = "p" if 12 < hour < 24 else "a"
    return hour % 12 * 60 + minute, half and half.lower()


def _could_be_ratio(text: str) -> bool:
    hour, minute = text.split(":")
    return gcd(int(hour), int(minute)) == 1 and not minute.startswith("0")


def _as_ratios(gold: str, claim: str) -> Outcome | None:
    """`1:2:3`, which math-verify divides to 1/6."""
    expected, claimed = (
        [plain_number(term.strip()) for term in text.split(":")] if ":" in text else []
        for text in (gold, claim)
    )
    if max(len(expected), len(claimed)) < 3:
        return None
    if len(expected) != len(claimed):
        return Outcome.WRONG
    first, other = expected[0], claimed[0]
    if first is None or other is None:
        return None
    same = all(
        mine is not None and theirs is not None and mine * other == theirs * first
        for mine, theirs in zip(expected, claimed, strict=True)
    )
    return Outcome.CORRECT if same else Outcome.WRONG


def _as_numerals(gold: str, claim: str) -> Outcome | None:
    """Digits with a base, which the answer may leave out: `43_5` is not 43, and 43 for `43_5` is read as it."""
    expected, claimed = BASE.fullmatch(gold), BASE.fullmatch(claim)
    if expected and claimed:
        same = expected[1].upper() == claimed[1].upper() and _base(expected) == _base(claimed)
        return Outcome.CORRECT if same else Outcome.WRONG
    if expected and re.fullmatch("[0-9A-Fa-f]+", claim):
        return Outcome.CORRECT if expected[1].upper() == claim.upper() else Outcome.WRONG
    return None


def _base(numeral: re.Match[str]) -> str:
    return _BASES.get(numeral[2], numeral[2])


def _as_words(gold: str, claim: str) -> Outcome | None:
    """Names and phrases, which a parser would take for products of letters: `LQSX` is not `XSQL`."""
    expected, claimed = _phrase(gold), _phrase(claim)
    if expected is None:
        return None
    if claimed is None:
        return Outcome.WRONG if len(expected) > 1 else None
    if len(expected) > 1:
        expected, claimed = expected.casefold(), claimed.casefold()
    return Outcome.CORRECT if expected == claimed else Outcome.WRONG


def _phrase(text: str) -> str | None:
    """The letters of a text in words; None for mathematics, a product such as `xy` or `ABcd` included."""
    found = _PHRASE.fullmatch(text)
    if not found:
        return None
    words = re.findall(r"[^\W_]+", found[1] or found[2])
    if len(words) > 1 and words[0] in ("a", "an", "the", "Option", "Choice"):
        words = words[1:]
    if found[2] and not any(
        len(word) > 4 or word.isdigit() or (len(word) > 2 and word.isupper()) or word.lower() in _SHORT_WORDS
        for word in words
    ):
        return words[0] if len(words) == 1 and len(words[0]) == 1 else None
    if found[2] and any(len(word) == 1 and word.isalpha() for word in words):
        return None
    return "".join(words) or None


def _as_named_values(gold: str, claim: str) -> Outcome | None:
    """`x=1,y=2` by the names, or in the gold's order where the claim has none: `2,1` is not it."""
    wanted = _named_values(gold)
    if wanted is None or max(map(len, wanted)) < 2:
        return None
    given = _named_values(claim)
    if given is None:
        if "=" in claim or len(wanted) != 1:
            return None
        inner = claim[1:-1] if claim[:1] + claim[-1:] == "()" else claim
        values = elements(inner)
        if len(values) != len(wanted[0]):
            return Outcome.WRONG
        given = [dict(zip(wanted[0], values, strict=True))]
    if len(given) != len(wanted):
        return Outcome.WRONG
    for group in wanted:
        match = next((each for each in given if _same_values(group, each)), None)
        if match is None:
            return Outcome.WRONG
        given.remove(match)
    return Outcome.CORRECT


def _named_values(text: str) -> list[dict[str, str]] | None:
    """Values by name; a name that comes again begins a new group."""
    if pair := _NAMED_TUPLE.fullmatch(text):
        names, values = elements(pair[1]), elements(pair[2])
        return [dict(zip(names, values, strict=True))] if len(names) == len(values) else None
    groups: list[dict[str, str]] = [{}]
    for part in elements(text):
        named = _NAMED.fullmatch(part)
        if not named:
            return None
        if named[1] in groups[-1]:
            groups.append({})
        groups[-1][named[1]] = named[2]
    return groups


def _same_values(wanted: dict[str, str], given: dict[str, str]) -> bool:
    return wanted.keys() == given.keys() and all(
        verdict(value, given[name]) is Outcome.CORRECT for name, value in wanted.items()
    )


def _as_mathematics(gold: str, claim: str) -> Outcome:
    real = not (math_latex.is_complex(gold) or math_latex.is_complex(claim))
    expected = parsed(gold, is_real=real)
    if expected is None:
        return Outcome.GOLD_UNPARSED
    claimed = parsed(claim, is_real=real)
    if claimed is None:
        return Outcome.UNPARSED
    return Outcome.CORRECT if _equal(gold, expected, claim, claimed) else Outcome.WRONG


def parsed(text: str, *, is_real: bool) -> Any:
    r"""The expression; of an equation whose left side cannot be read (`\angle A = 30`), its right side.

    So too of `1+\ldots+n = n(n+1)/2`; and `\approx 0.333\ldots` behind a value is left out.
    """
    if ELLIPSIS in text:
        text = _SERIES.sub("", _ROUNDED.sub("", text)).strip()
    text = ", ".join(map(_both_signs, elements(text, ","))) if r"\pm" in text else text
    text = BASE.sub(r"\1", text)
    if _NO_NUMBER.search(text) or ELLIPSIS in text:
        return None  # it would multiply the numbers, and leave the ellipsis out
    found = math_latex.parse(text, is_real=is_real)
    if found is None and "=" in text:
        found = math_latex.parse(text.partition("=")[2], is_real=is_real)
    return found


def _both_signs(text: str) -> str:
    if text.count(r"\pm") != 1 or text.startswith(r"\pm"):
        return text
    plus, minus = (
        text.replace(r"\pm", "+").replace(r"\mp", "-"),
        text.replace(r"\pm", "-").replace(r"\mp", "+"),
    )
    return f"{plus}, {minus}"


@lru_cache(maxsize=4_096)
def _problem(gold: str) -> str | None:
    """Why an answer cannot be read."""
    if gold.strip(" .$").casefold() in PLACEHOLDERS:
        return f"{gold.strip()!r} stands for a missing answer"
    if _QUOTED.match(gold):
        return f"a list or dict written as text: {gold[:80]!r}"
    if len(gold) > MAX_BOX_CHARACTERS:
        return f"longer than {MAX_BOX_CHARACTERS} characters: {gold[:80]!r}"
    text = read(gold).text
    words = [word for word in _PROSE.findall(text) if word]
    if len(words) > 1 and (not _phrase(text) or _SENTENCE & set(words)):
        return f"prose, not an answer: {gold[:80]!r}"
    if plain_number(text) is not None or _clock(text) or _phrase(text):
        return None
    if _named_values(text) and ELLIPSIS not in text:
        return None
    if parsed(text, is_real=not math_latex.is_complex(text)) is None:
        return f"math-verify cannot parse {gold[:80]!r}"
    return None


def _equal(gold: str, expected: Any, claim: str, claimed: Any) -> bool:
    from math_verify import verify

    if _are_set_and_tuple(gold, claim) or not (_same_base(gold, claim) and _consistent(claimed)):
        return False
    expected, claimed = _ascending(expected), _ascending(claimed)
    expected, claimed = _as_region(expected, claimed), _as_region(claimed, expected)
    if _is_value_of_function(expected) and not _is_relation(claimed):
        expected = expected.rhs
    if "%" not in gold + claim and not _same_scale(expected, claimed):
        return False  # before math-verify is asked: it would try to simplify the difference to 0
    return bool(verify([expected], [claimed], allow_set_relation_comp=True, timeout_seconds=None))


def _are_set_and_tuple(*texts: str) -> bool:
    r"""Whether one is a set in braces and the other a point or an interval, such as `\{2,3\}` and `(2,3)`.

    `[1,2,3]` and `[(1,2),(3,4)]` are lists.
    """
    bare = [_NAME_BEFORE_BRACKETS.sub("", text) for text in texts]
    return any(map(_is_set, bare)) and any(map(_is_tuple, bare))


def _is_set(text: str) -> bool:
    whole = text.startswith(r"\{") and text.endswith(r"\}") and len(elements(text)) == 1
    return whole and len(elements(text[2:-2])) > 1


def _is_tuple(text: str) -> bool:
    whole = text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(elements(text)) == 1
    parts = elements(text[1:-1])
    is_list = text[:1] + text[-1:] == "[]" and (len(parts) > 2 or parts[0].startswith("("))
    return whole and len(parts) > 1 and not is_list


def _same_base(gold: str, claim: str) -> bool:
    """Digits with a base are another number than the same digits without: `43_5` is not 43."""
    claimed = [_base(numeral) for numeral in BASE.finditer(claim) if _base(numeral) != "10"]
    return not claimed or claimed == [_base(numeral) for numeral in BASE.finditer(gold)]


def _consistent(predicted: Any) -> bool:
    """Every equation between plain numbers must hold: math-verify reads `4=5` as its right-hand side."""
    from math_verify import verify
    from sympy import Basic, Eq, preorder_traversal
    from sympy.core.function import AppliedUndef

    if not isinstance(predicted, Basic) or not predicted.has(Eq):
        return True
    equations = [node for node in preorder_traversal(predicted) if isinstance(node, Eq)]
    return all(
        verify([equation.lhs], [equation.rhs], timeout_seconds=None)
        for equation in equations
        if not equation.free_symbols and not equation.has(AppliedUndef)
    )


def _is_relation(expression: Any) -> bool:
    from math_verify.grader import is_relation

    return bool(is_relation(expression))


def _is_value_of_function(expression: Any) -> bool:
    from sympy import Eq
    from sympy.core.function import AppliedUndef

    return isinstance(expression, Eq) and isinstance(expression.lhs, AppliedUndef)


def _ascending(expression: Any) -> Any:
    """`3>x>1` as `1<x<3`, and `2=x` as `x=2`."""
    from latex2sympy2_extended.logic import And
    from sympy import Eq, GreaterThan, Ne, StrictGreaterThan

    if isinstance(expression, And):
        parts = expression._unsorted_args
        if all(isinstance(part, GreaterThan | StrictGreaterThan) for part in parts):
            return And(*(part.reversed for part in reversed(parts)))
    elif isinstance(expression, Eq | Ne) and expression.rhs.is_Symbol and not expression.lhs.free_symbols:
        return expression.func(expression.rhs, expression.lhs, evaluate=False)
    elif isinstance(expression, GreaterThan | StrictGreaterThan):
        return expression.reversed
    return expression


def _as_region(expression: Any, other: Any) -> Any:
    """`x<1, x>3` as a union of intervals, where the other side is one."""
    from sympy import Eq, FiniteSet, Or, Set

    if not isinstance(other, Set) or isinstance(other, FiniteSet) or not isinstance(expression, FiniteSet):
        return expression
    if not all(_is_relation(part) and not part.has(Eq) for part in expression.args):
        return expression
    return Or(*expression.args).as_set()


def _same_scale(gold: Any, predicted: Any) -> bool:
    """Tiny numbers differ by their ratio: math-verify rounds 1/2^98 - 1/2^99 to 0."""
    from sympy import Eq, Expr, Number

    if isinstance(gold, Eq) and isinstance(predicted, Eq) and gold.lhs != predicted.lhs:
        return True  # an equation turned round, not two values of one thing

    gold, predicted = (side.rhs if isinstance(side, Eq) else side for side in (gold, predicted))
    if (
        not (isinstance(gold, Expr) and isinstance(predicted, Expr))
        or gold.free_symbols | predicted.free_symbols
    ):
        return True
    exact, claimed = gold.evalf(30), predicted.evalf(30)
    distance, *sizes = (abs(value).evalf() for value in (exact - claimed, exact, claimed))
    if not all(isinstance(value, Number) and value.is_finite for value in (distance, *sizes)):
        return True
    return bool(distance <= RELATIVE_TOLERANCE * max(sizes))


def _normalised(text: str) -> str:
    """For texts too long to read."""
    return _SPACING.sub("", THOUSANDS.sub("", text)).rstrip(".,;")
