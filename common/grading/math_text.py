r"""Answers in one spelling: Unicode, markdown and LaTeX's many ways to write a thing become plain ASCII LaTeX.

`clean` changes how an answer is written, never what it says; `math_words` takes units off, `rule_math` compares.
Words stay in `\text{…}`, so that a parser sees a name where a hedge or a unit stood.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

MAX_DEPTH = 60
"""Levels of nested braces; deeper text is left as it is."""
ELLIPSIS = r"\ldots"

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()", strict=True))
_GREEK = {
    letter: rf"\{name} "
    for names in (
        "α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi",
        "ρ rho σ sigma τ tau υ upsilon φ phi ϕ phi χ chi ψ psi ω omega",
        "Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega",
    )
    for letter, name in zip(names.split()[::2], names.split()[1::2], strict=True)
}
_SIGNS = {
    "−–—‒‐": "-",
    "×✕": r"\times ",
    "·⋅∙•": r"\cdot ",
    "÷": r"\div ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∞": r"\infty ",
    "≤≦⩽": r"\le ",
    "≥≧⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "°": r"^\circ ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∖": r"\setminus ",
    "∅⌀": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "⟨〈": r"\langle ",
    "⟩〉": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "△": r"\triangle ",
    "∣": r"\mid ",
    "∑": r"\sum ",
    "∏": r"\prod ",
    "∫": r"\int ",
    "→": r"\to ",
    "′’‘": "'",
    "″": "''",
    "⁄∕": "/",
    "、或和": ",",
    "。": ".",
    "\u200b\u200c\u200d\u2060\ufeff": "",
}
_TRANSLATION = str.maketrans(
    {sign: latex for signs, latex in _SIGNS.items() for sign in signs}
    | _GREEK
    | {
        sign: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄"))
        for sign in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    }
)
_SCRIPT = re.compile(rf"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_ROOT_SIGN = re.compile(r"([√∛])\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z]|(?=[({\\]))")

THOUSANDS = re.compile(r"(?<=[0-9])(?<![_^][0-9])(?:,\\!\s*|\{,\}|\\,|\\ |~|\s|')(?=[0-9]{3}(?![0-9/]))")
_FENCES = re.compile(r"\*\*(.+)\*\*|\*([^*]+)\*|__(.+)__|_([^_]+)_|`([^`]+)`", re.DOTALL)

_TEXT = re.compile(r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)?|[mh]box|math(?:rm|bf|it|sf|tt|normal))\s*(?=\{)")
_OLD_FONT = re.compile(r"\{\s*\\(?:rm|bf|it)(?![A-Za-z])\s*([^{}]*)\}")
_FONT_OF_ONE = re.compile(r"\\math(?:rm|bf|it|sf|tt)\s*([0-9]|(?<=\s)[A-Za-z])")
_SPACING_IN_TEXT = re.compile(r"\\[!,;:> ]|\\cdot|~|\s")
_EXPONENT_IN_TEXT = re.compile(r"\^-?[0-9]")
_MATHEMATICS_IN_TEXT = re.compile(r"[0-9=<>+\\]|\.{3}")
_WORDS_AND_DOTS = re.compile(r"([^0-9=<>+\\.]*[^\W\d_]) ?\.{3,}")
_JOINING = re.compile(r",?\s*(?:and|or)|,|;|&|或|和")
_CHOICES = re.compile(r"\(?[A-Z]\)?(?:\s*,\s*\(?[A-Z]\)?)+")

_ENVIRONMENT = re.compile(
    r"(?P<open>[(\[|]|\\\{)?\s*"
    r"\\begin\{(?P<name>cases|aligned|align\*?|equation\*?|gathered|split|array|(?:small)?matrix)\}(?:\s*\{[lcr| ]*\})?"
    r"(?P<body>.*?)\\end\{(?P=name)\}\s*(?P<close>[)\]|]|\\\})?",
    re.DOTALL,
)
_MATRICES = {"(": "pmatrix", "[": "bmatrix", "|": "vmatrix"}
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_ALIGNMENT = re.compile(r"&\s*(?==|<|>|\\le|\\ge)|(?<==)\s*&")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")  # `\\frac` of a text that was escaped twice
_STRETCH = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?")


def _command(names: str) -> str:
    return rf"\\(?:{names})(?![A-Za-z])"


_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in [
        # Marks around an answer, and what only moves or colours it.
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$", " "),
        (r"\\(?:text)?color\s*\{[^{}]*\}|" + _command("boxed|fbox|boldsymbol|bm|ensuremath|underline"), ""),
        (r"\\[hv]?(?:space\*?|phantom)\s*(?:\{[^{}]*\}|[-+0-9])|^\s*" + _command("approx"), " "),
        (
            _command("displaystyle|textstyle|(?:no)?limits|q?quad|enspace|thinspace|hfill|[lL]arge|[hH]uge"),
            " ",
        ),
        (r"(?<!\\)\\[!,;:> ]|(?<!\\)~|\s", " "),
        # Two names of one thing.
        (_command("[lc]?dots[bcimo]?") + r"|\.{3,}", rf"\{ELLIPSIS} "),
        (r"\{:\}|" + _command("colon"), ":"),
        (r"\{,\}", ","),
        (_command("[dtcs]frac|nicefrac"), r"\\frac"),
        (_command("[dt]binom"), r"\\binom"),
        (_command("textsuperscript"), "^"),
        (_command("varnothing|O"), r"\\emptyset "),
        (_command("leq|leqslant|le") + "|<=", r"\\le "),
        (_command("geq|geqslant|ge") + "|>=", r"\\ge "),
        (_command("neq") + "|(?<![0-9)])!=", r"\\ne "),
        (r"!=", "! ="),  # 5!=120
        (_command("lt"), "<"),
        (_command("gt"), ">"),
        (_command("lbrace"), r"\\{"),
        (_command("rbrace"), r"\\}"),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (_command("langle"), "("),
        (_command("rangle"), ")"),
        (_command("[lr]?vert"), "|"),
        (_command("ast"), "*"),
        (_command("imath"), "i"),
        (r"\\([RZNQ])(?![A-Za-z])", r"\\mathbb{\1}"),
        (
            rf"{_command('degree|textdegree')}|(?<=[0-9]){_command('deg')}|\^\s*\{{?\s*{_command('circ')}\s*\}}?",
            r"^{\\circ}",
        ),
        (r"(?<=[A-Za-z])(?:''|\^\s*\{\s*\\prime\s*\\prime\s*\})", r"^{\\prime\\prime}"),
        (r"(?<=[A-Za-z])(?:'|\^\s*\{\s*\\prime\s*\}|\^\s*\\prime(?![A-Za-z]))", r"^{\\prime}"),
        (r"\^\s*\{?\\text\{T\}\}?", "^{T}"),
        (r"_\s*\{?\s*\\text\{([A-Za-z0-9]+)\}\s*\}?", r"_{\1}"),
        (r"(?<!\\)%", r"\\%"),
        (r",(?:\s*,)+", ","),
        (r"(?:\\\\|\s)+$", ""),
        (r"(?<=[0-9])\.(?=[^0-9\\])", ""),  # -1./3
        (r"\*\*", "^"),
    ]
]

_REPEATING = re.compile(
    rf"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{{?([0-9]+)\}}?(?:\s*{re.escape(ELLIPSIS)}(?![A-Za-z]))?"
)
_E_NOTATION = re.compile(r"(?<![A-Za-z0-9_.\\])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([-+]?[0-9]+)(?![0-9A-Za-z.])")
_MIXED = re.compile(r"(?<![0-9.}^_] )(?<![0-9.}^_])([0-9]+)\s+([0-9]+)/([0-9]+)(?![0-9])")
_SET_BUILDER = re.compile(
    r"\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|:|\|)([^{}]*(?:[<>=]|\\[lgn]e)(?:[^{}]|\{[^{}]*\})*)\\\}"
)
_DEGREES_OF_ANGLE = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\{2\})?\s*[({]?\s*)([0-9]+(?:\.[0-9]+)?)\s*\^\{\\circ\}"
)
_FOR_ALL = re.compile(
    r",?\s*(?:\\text\{,?\s*for (?:all|every|any|each)(?: real)?(?: numbers?)?\}"
    r"|for (?:all|every|any)(?: real)?|\\forall)"
    r"\s*[a-z](?:\s*,\s*[a-z])*(?:\s*\\in\s*\\mathbb\{R\})?$"
)
_FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan ln log exp sqrt pi alpha beta gamma delta "
    "epsilon theta lambda mu rho sigma tau phi omega infty"
)
_NAMES = {name: rf"\{name}" for name in _FUNCTIONS.split()} | {
    "asin": r"\arcsin",
    "acos": r"\arccos",
    "atan": r"\arctan",
    "infinity": r"\infty",
    "abs": r"\abs",
    "floor": r"\operatorname{floor}",
    "ceil": r"\operatorname{ceil}",
}
_NAME = re.compile(
    r"\\(?:text|operatorname\*?|begin|end)\{[^{}]*\}|\\[A-Za-z]+"
    rf"|(?<![A-Za-z])(?:(?:np|math|sympy)\.)?({'|'.join(sorted(_NAMES, key=len, reverse=True))})(?![A-Za-z])"
)

_COMMAND = re.compile(r"\\[A-Za-z]+|\\.", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]+")
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
_INFIX = {r"\choose": r"\binom", r"\over": r"\frac"}


@lru_cache(maxsize=16_384)
def clean(text: str) -> str:
    """The answer in the one spelling that is compared and parsed."""
    if not text.isascii():
        text = _ascii(text)
    text = THOUSANDS.sub("", text).strip()
    if fenced := _FENCES.fullmatch(text):
        text = next(content for content in fenced.groups() if content is not None).strip()
    if not text.isdigit():
        text = _numbers(_spelled(text))
    return text.strip().rstrip(" .,;")


def _spelled(text: str) -> str:
    r"""One spelling for each command, environments as lists or matrices, fonts as `\text{…}`."""
    text = _STRETCH.sub("", text)
    text = _ENVIRONMENT.sub(_rows, text) if r"\begin" in text else _DOUBLED.sub(r"\\", text)
    text = _FONT_OF_ONE.sub(r"\\text{\1}", _OLD_FONT.sub(r"\\text{\1}", text))
    if _TEXT.search(text):
        text = _texts(text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text


def _numbers(text: str) -> str:
    """Numbers and functions as LaTeX writes them, then braces around every argument."""
    text = _REPEATING.sub(_fraction_of, text)
    text = _E_NOTATION.sub(_power_of_ten, text)
    text = _FOR_ALL.sub("", text)
    text = _NAME.sub(lambda name: rf"{_NAMES[name[1]]} " if name[1] else name[0], text)
    text = _braced(_MIXED.sub(r"\1\\frac{\2}{\3}", text))
    if condition := _SET_BUILDER.fullmatch(text):
        text = condition[2]
    text = _DEGREES_OF_ANGLE.sub(r"\1{\\frac{\2\\pi}{180}}", text)
    return " ".join(text.split())


def elements(text: str, separators: str = ",;") -> list[str]:
    """The parts between separators that stand outside all brackets."""
    depth, start, parts = 0, 0, []
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and character in separators:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def _ascii(text: str) -> str:
    text = _ROOT_SIGN.sub(_root, text)
    text = _SCRIPT.sub(_script, text).translate(_TRANSLATION)
    return unicodedata.normalize("NFKC", text).translate(_TRANSLATION)


def _root(sign: re.Match[str]) -> str:
    command = r"\sqrt" if sign[1] == "√" else r"\sqrt[3]"
    return command + (f"{{{sign[2]}}}" if sign[2] else "")


def _script(run: re.Match[str]) -> str:
    if run[1]:
        return "^{" + "".join(_SUPERSCRIPTS[sign] for sign in run[1]) + "}"
    return "_{" + "".join(_SUBSCRIPTS[sign] for sign in run[2]) + "}"


def _rows(environment: re.Match[str]) -> str:
    """A system of equations as a list, an array in brackets as a matrix; a function by cases stays."""
    opened, closed = environment["open"] or "", environment["close"] or ""
    if environment["name"].endswith(("array", "matrix")) and opened in _MATRICES:
        return rf"\begin{{{_MATRICES[opened]}}}{environment['body']}\end{{{_MATRICES[opened]}}}"
    rows = [_ALIGNMENT.sub("", row).strip().rstrip(",;") for row in _ROW_END.split(environment["body"])]
    if environment["name"].endswith("matrix") or any("&" in row for row in rows):
        return environment[0]
    inside = ", ".join(row for row in rows if row)
    return inside if opened == r"\{" and not closed else opened + inside + closed


def _texts(text: str) -> str:
    r"""Every font command as `\text{…}`; one that holds mathematics is opened."""
    pieces, position = [], 0
    while found := _TEXT.search(text, position):
        end = _closing(text, found.end())
        if end < 0:
            break
        pieces += [text[position : found.start()], _opened(text[found.end() + 1 : end])]
        position = end + 1
    return "".join(pieces) + text[position:]


def _opened(content: str) -> str:
    if _TEXT.search(content):
        content = _texts(content).replace(r"\text", "")
    content = re.sub(r"['{}]", "", content)
    content = " ".join(_SPACING_IN_TEXT.sub(" ", content).split())
    if not content:
        return " "
    if content in ("e", "i", "d"):
        return content
    if content in _NAMES:
        return f"{_NAMES[content]} "
    if _JOINING.fullmatch(content):
        return " , "
    if words := _WORDS_AND_DOTS.fullmatch(content):
        return rf"\text{{{words[1]}}}{ELLIPSIS} "
    if _MATHEMATICS_IN_TEXT.search(_EXPONENT_IN_TEXT.sub("", content)) or _CHOICES.fullmatch(content):
        return f" {content} "
    return rf"\text{{{content}}}"


def _closing(text: str, start: int) -> int:
    """The position at which the brace at `start` closes, or -1."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    return -1


def _fraction_of(decimal: re.Match[str]) -> str:
    whole, fixed, period = decimal[1] or "0", decimal[2], decimal[3]
    value = Fraction(
        int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1)
    )
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _power_of_ten(number: re.Match[str]) -> str:
    return rf"{number[1].rstrip('.')}\times 10^{{{int(number[2])}}}"


def _braced(text: str) -> str:
    r"""Arguments in braces, as TeX takes them: `\frac a b`, `x^\frac12`, `\sqrt2`, `{5\choose 2}`, `x^(n+1)`."""
    try:
        return _Braces(text).group("")
    except _Unbalanced:
        return text


class _Unbalanced(Exception):
    """A bracket that never closes, or more of them in each other than anybody writes."""


class _Braces:
    """Reads a text once from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    def group(self, closing: str) -> str:
        """All up to the closing sign, which is left out, or to the end."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unbalanced
        pieces: list[str] = []
        infix: tuple[str, int] | None = None
        while self.position < len(self.text) and not (closing and self.text[self.position] == closing):
            if closing == ")" and self.text[self.position] == "(":
                self.position += 1
                pieces.append(f"({self.group(')')})")
                continue
            piece = self.piece(pieces)
            if piece in _INFIX and infix is None:
                infix = piece, len(pieces)
            pieces.append(piece)
        if closing and self.position == len(self.text):
            raise _Unbalanced
        self.position += 1
        self.depth -= 1
        if infix:
            command, at = infix
            above, below = "".join(pieces[:at]).strip(), "".join(pieces[at + 1 :]).strip()
            return f"{_INFIX[command]}{{{above}}}{{{below}}}"
        return "".join(pieces)

    def piece(self, before: list[str]) -> str:
        """The next command with its arguments, group, script or single sign."""
        sign = self.text[self.position]
        if sign == "\\":
            return self.command()
        self.position += 1
        if sign == "{":
            inside = self.group("}")
            return f"{{{inside}}}"
        if sign in "^_":
            return sign + self.argument(log="".join(before).rstrip().endswith(r"\log"), numbers=True)
        return sign

    def command(self) -> str:
        found = _COMMAND.match(self.text, self.position)
        if found is None:  # a backslash at the very end
            self.position += 1
            return "\\"
        self.position = found.end()
        name = found[0]
        if name in (r"\text", r"\operatorname", r"\begin", r"\end") and self.text.startswith(
            "{", self.position
        ):
            end = _closing(self.text, self.position)
            if end > 0:
                start, self.position = self.position, end + 1
                return name + self.text[start : end + 1]
        if name == r"\abs":
            return f"|{self.argument(bracket=True)[1:-1]}|"
        if name not in _ARGUMENTS:
            return name
        option = ""
        if name == r"\sqrt" and self.text.startswith("[", self.position):
            self.position += 1
            option = f"[{self.group(']')}]"
        return (
            name + option + "".join(self.argument(bracket=name == r"\sqrt") for _ in range(_ARGUMENTS[name]))
        )

    def argument(self, *, log: bool = False, numbers: bool = False, bracket: bool = False) -> str:
        """One argument in braces; a whole number, if `numbers`, is one argument of a script."""
        while self.position < len(self.text) and self.text[self.position] == " ":
            self.position += 1
        if self.position == len(self.text):
            return ""
        number = _NUMBER.match(self.text, self.position) if numbers else None
        if number:
            digits = number[0] if not log or number[0] == "10" else number[0][0]
            self.position += len(digits)
            return f"{{{digits}}}"
        sign = self.text[self.position]
        if sign == "(" and (numbers or bracket):
            self.position += 1
            return f"{{{self.group(')')}}}"
        if sign in "}])":
            return ""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unbalanced
        inside = self.piece([])
        self.depth -= 1
        return inside if inside.startswith("{") else f"{{{inside}}}"
