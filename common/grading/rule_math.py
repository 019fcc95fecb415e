r"""The MATH rule: the content of the last `\boxed{}`, compared with math-verify.

Cheap first: a cache of verdicts, equal normalised strings, plain numbers as exact fractions, then LaTeX parsing
with the gold's parse cached over the N samples of a prompt. math-verify is asked about the box alone (its
extraction from prose reads `2007 + \frac\pi 2` as 2) and its known holes are closed here: see `_consistent`,
`_same_scale`, `_without_unit` and `_same_base`. No timeout of its own: the worker that runs the rule keeps the time.
"""

import re
from fractions import Fraction
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any

from common.errors import UserError
from common.grading.outcome import Grade, Outcome, graded

VERSION = f"math/2+math-verify-{version('math-verify')}"
MAX_BOX_CHARACTERS = 512
MAX_COMPLETION_CHARACTERS = 65_536
# A float in either answer may be rounded: beyond this relative difference two numbers are different answers.
RELATIVE_TOLERANCE = 1e-4

_BOX = r"\boxed"
_INTEGER = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"(-?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+))(\.[0-9]+)?")
_POSITIVE = "(0*[1-9][0-9]*)"
_RATIO = re.compile(
    rf"(-?)([0-9]*)\s*\\[dt]?frac\{{{_POSITIVE}\}}\{{{_POSITIVE}\}}|(-?)((?:[0-9]+\s+)?){_POSITIVE}/{_POSITIVE}"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\\[A-Za-z]+|[^\s$]")
_SPACING = re.compile(
    r"(?:\\[!,;:> ]|\\quad|\\displaystyle|\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\$|~|\s)+"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\,|\\ |~|\s)(?=[0-9]{3}(?![0-9/]))")
_NO_NUMBER = re.compile(r"(?<!frac)(?<!frac )(?<![0-9])[0-9]+(?:\s|~|\\[,;:> ]|\\quad)+[0-9]")  # `1 2`
_BARE_FRACTION = re.compile(r"\\frac\s*(\\pi)\s*([0-9])")  # `\frac\pi 2`
_TEXT_UNIT = re.compile(
    r"(?:\\[ ,;!]|~|\s)*\\(?:text|mbox|textnormal|textbf|textrm|mathrm|mathbf|textit)\s*"
    r"\{([^{}]*)\}(?:\^\{?\d\}?)?$"
)
_BARE_UNIT = re.compile(
    r"(?<=[\d}\s])\s*(?:cm|mm|km|kg|ft|lbs?|mph|inch(?:es)?|foot|feet|yards?|miles?|met(?:er|re)s?|dollars?|"
    r"cents?|degrees?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|units?|points?|square units)$"
)
_ONE_LETTER_UNITS = frozenset("mgshL")
_BASE = re.compile(r"(-?[0-9][0-9A-Fa-f.]*)_(?:\{?(?:\\text\{)?\s*([0-9]+|[a-z]+)\s*\}{0,2})")


def extract_gold(raw: str) -> str:
    r"""The content of a reference solution's only `\boxed{}`; a text without any box is the answer itself."""
    if _BOX not in raw:
        if not raw.strip():
            raise UserError("the reference answer is empty")
        if len(raw) > MAX_BOX_CHARACTERS:
            raise UserError(rf"no \boxed{{}} in the reference solution that ends in {raw[-80:]!r}")
        return raw.strip()
    boxes = list(dict.fromkeys(_all_boxes(raw)))
    if not boxes or not all(boxes):
        raise UserError(
            rf"an empty or unclosed \boxed{{}} in the reference solution that ends in {raw[-80:]!r}"
        )
    if len({_normalised(box) for box in boxes}) > 1:
        raise UserError(f"several different boxes in the reference solution: {', '.join(boxes)[:160]}")
    return boxes[-1]


def validate_gold(gold: str) -> str | None:
    if not gold.strip():
        return "the reference answer is empty"
    return None if _parsed_gold(gold) is not None else f"math-verify cannot parse {gold[:80]!r}"


def grade(prompt: str, completion: str, answer: str) -> Grade:
    box = last_box(completion[-MAX_COMPLETION_CHARACTERS:])
    if not box:
        return graded(Outcome.UNPARSED, box)
    return graded(_verdict(answer, box), box)


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed`, braces counted; None where there is none or it never closes."""
    start = text.rfind(_BOX)
    return None if start < 0 else _box_at(text, start)


def _all_boxes(text: str) -> list[str]:
    return [_box_at(text, match.start()) or "" for match in re.finditer(re.escape(_BOX), text)]


def _box_at(text: str, start: int) -> str | None:
    start += len(_BOX)
    while start < len(text) and text[start].isspace():
        start += 1
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
def _verdict(answer: str, box: str) -> Outcome:
    expected, claimed = _normalised(answer), _normalised(box)
    if expected == claimed != "":
        return Outcome.CORRECT
    if verdict := _plain_verdict(answer, box):
        return verdict
    gold = _parsed_gold(answer)
    if gold is None:
        return Outcome.GOLD_UNPARSED
    predicted = _parsed(box)
    if predicted is None:
        return Outcome.UNPARSED
    return Outcome.CORRECT if _equal(answer, gold, box, predicted) else Outcome.WRONG


def _plain_verdict(answer: str, box: str) -> Outcome | None:
    """The verdict where both sides are plain numbers, as math-verify and `_same_scale` would give it; else None."""
    expected, claimed = _plain_number(answer), _plain_number(box)
    if expected is None or claimed is None:
        return None
    if expected == claimed:
        return Outcome.CORRECT
    distance, size = abs(expected - claimed), max(abs(expected), abs(claimed))
    if "." in answer + box and distance <= max(1e-5, 1e-9 * size):
        return None  # math-verify rounds decimals to six places
    return Outcome.WRONG


def _plain_number(text: str) -> Fraction | None:
    """The value of an integer, a decimal, a fraction or a mixed number; None for any other text."""
    if len(text) > MAX_BOX_CHARACTERS:
        return None
    if integer := _INTEGER.fullmatch(_normalised(text)):
        return Fraction(integer[0])
    text = _THOUSANDS.sub("", text).strip().rstrip(" .,;")
    if number := _DECIMAL.fullmatch(text):
        return Fraction(number[0].replace(",", ""))
    if ratio := _RATIO.fullmatch(text):
        sign, whole, above, below = (part for part in ratio.groups() if part is not None)
        value = int(whole or 0) + Fraction(int(above), int(below))
        return -value if sign else value
    return None


def _equal(answer: str, gold: Any, box: str, predicted: Any) -> bool:
    from math_verify import verify

    if not (_same_base(answer, box) and _consistent(predicted)):
        return False
    if "%" not in answer + box and not _same_scale(gold, predicted):
        return False  # before math-verify is asked: it would try to simplify the difference to 0
    return bool(verify([gold], [predicted], timeout_seconds=None))


def _normalised(text: str) -> str:
    text = _SPACING.sub(_closed_up, _THOUSANDS.sub("", text))
    return text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").rstrip(".,;")


def _closed_up(space: re.Match[str]) -> str:
    """Space means nothing, except between digits: `2 3/4` is not `23/4`."""
    before, after = space.string[: space.start()][-1:], space.string[space.end() :][:1]
    return " " if before.isdigit() and after.isdigit() else ""


@lru_cache(maxsize=4_096)
def _parsed_gold(answer: str) -> Any:
    return _parsed(answer)


def _parsed(latex: str) -> Any:
    """math-verify's reading of a piece of LaTeX; None where it has none."""
    if len(latex) > MAX_BOX_CHARACTERS:
        return None
    from math_verify import parse

    latex = " ".join(re.sub(r"(?<!\\)\$", "", latex).split()).rstrip(" .,;")
    latex = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", _THOUSANDS.sub("", latex))
    latex = _BASE.sub(r"\1", _without_unit(latex))
    if _NO_NUMBER.search(latex):
        return None  # math-verify would multiply them
    found = parse(
        f"${latex}$",
        extraction_config=_extraction(),
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found[0] if found else None


@cache
def _extraction() -> tuple[Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    return (LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization),)


def _without_unit(latex: str) -> str:
    r"""`15\mbox{ cm}^2` is 15, but `4t` stays a product: math-verify would drop the t as tonnes."""
    unit = _TEXT_UNIT.search(latex)
    if unit:
        word = unit[1].strip()
        if (len(word) != 1 or word in _ONE_LETTER_UNITS) and unit.start() > 0:
            return latex[: unit.start()]
    return _BARE_UNIT.sub("", latex) or latex


def _same_base(answer: str, box: str) -> bool:
    """Digits with a base are another number than the same digits without: `43_5` is not 43."""
    claimed = [base for _, base in _BASE.findall(box) if base != "10"]
    return not claimed or claimed == [base for _, base in _BASE.findall(answer)]


def _consistent(predicted: Any) -> bool:
    """Every equation between plain numbers must hold: math-verify reads `4=5` as its right-hand side."""
    from math_verify import verify
    from sympy import Basic, Eq, preorder_traversal

    if not isinstance(predicted, Basic) or not predicted.has(Eq):
        return True
    equations = [node for node in preorder_traversal(predicted) if isinstance(node, Eq)]
    return all(
        verify([equation.lhs], [equation.rhs], timeout_seconds=None)
        for equation in equations
        if not equation.free_symbols
    )


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
