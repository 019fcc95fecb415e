r"""LaTeX to sympy by latex2sympy, with what it reads wrongly put right where it reads.

`R` and `r` are two letters, only `2\frac34` is a mixed number (it adds the digits of `3(4)` too), `i` is the
imaginary unit and `I` a letter. A percent sign stands after more than a decimal: `\frac13\%`.
"""

import re
from functools import cache, lru_cache
from typing import Any

_LETTER = re.compile(r"\\text\{[^{}]*\}|\\(hbar|odot|oplus)(?![A-Za-z])|\\[A-Za-z]+|(I|[Ee](?=_))")
_SHORT_SCRIPT = re.compile(r"([_^])\{([0-9A-Za-z])\}(?!\s*[0-9A-Za-z{])")  # each brace costs the parser time
_IMAGINARY = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|(i)")
_INDEXED = re.compile(r"\\(?:sum|prod)(?![A-Za-z])|_\{?i")
_PROPER = re.compile(r"\\frac\{([0-9]+)\}\{([0-9]+)\}")
_PERCENT_OF_RATIO = re.compile(r"([0-9]+)/([0-9]+)\s*\\%")
_PERCENT_OF_GROUP = re.compile(r"(?<=[})])\s*\\%")
_COMPLEX = re.compile(
    r"\\mathbb\{C\}|\\(?:det|arg|Re|Im|imath)(?![A-Za-z])|\\operatorname\{(?:tr|rank|Re|Im)\}"
)


def is_complex(latex: str) -> bool:
    """Whether the letters in it may stand for complex numbers."""
    return _COMPLEX.search(latex) is not None


@lru_cache(maxsize=8_192)
def parse(latex: str, *, is_real: bool) -> Any:
    """latex2sympy's reading of cleaned LaTeX; None where it has none."""
    from latex2sympy2_extended.latex2sympy2 import normalize_latex

    imaginary = "i" in _IMAGINARY.findall(latex) and not _INDEXED.search(latex)
    latex = _LETTER.sub(_as_letter, latex)
    latex = _PERCENT_OF_RATIO.sub(r"\\frac{\1}{\2}\\%", latex)
    latex = _PERCENT_OF_GROUP.sub(r"\\cdot 1\\%", latex)
    latex = _SHORT_SCRIPT.sub(r"\1\2", latex)
    try:
        return _converter()(normalize_latex(latex, _normalization()), imaginary, is_real)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  its parser raises bare Exceptions, its conversions whatever they meet
        return None


def _as_letter(found: re.Match[str]) -> str:
    r"""`I` and `E_1` are letters here, no numbers, and `\hbar`, `M_\odot` are names."""
    name = found[1] or found[2]
    return rf"\text{{{name}}}" if name else found[0]


@cache
def _normalization() -> Any:
    from latex2sympy2_extended import NormalizationConfig

    return NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )


@cache
def _converter() -> Any:
    """Made on first use: this module is imported where sympy is not."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
    from sympy import Expr, I, Integer, MatrixBase, Pow, Symbol

    class Converter(_Latex2Sympy):  # type: ignore[misc]
        imaginary = False

        def convert_atom_expr(self, atom_expr: Any) -> Any:
            name = super().convert_atom_expr(atom_expr)
            if isinstance(name, Pow) and isinstance(name.base, Symbol):
                return Pow(self._named(name.base), name.exp, evaluate=False)
            return self._named(name) if isinstance(name, Symbol) else name

        def _named(self, symbol: Any) -> Any:
            """Capitals get a mark: math-verify compares the names of symbols in lower case."""
            if symbol.name == "i" and self.imaginary:
                return I
            marked = re.sub("[A-Z]", lambda letter: f"^{letter[0]}", symbol.name)
            return symbol if marked == symbol.name else Symbol(marked, real=self.is_real)

        def parse_number(self, text: str) -> Any:
            """Whole numbers directly: the library asks sympy's own parser, a millisecond each."""
            digits = text.replace(",", "")
            return Integer(int(digits)) if digits.isdigit() else super().parse_number(text)

        def convert_postfix_list(self, postfixes: list[Any], start: int = 0) -> Any:
            if start + 1 == len(postfixes) or _is_mixed(postfixes[start : start + 3]):
                return super().convert_postfix_list(postfixes, start)
            first = self.convert_postfix(postfixes[start])
            if not isinstance(first, Expr | MatrixBase):  # a derivative
                return super().convert_postfix_list(postfixes, start)
            rest = self.convert_postfix_list(postfixes, start + 1)
            has_matrix = getattr(first, "is_Matrix", False) or getattr(rest, "is_Matrix", False)
            return self.mat_mul_flat(first, rest) if has_matrix else self.mul_flat(first, rest)

    def _is_mixed(postfixes: list[Any]) -> bool:
        whole, part, *more = (postfix.getText() for postfix in postfixes)
        fraction = _PROPER.fullmatch(part)
        return whole.isdigit() and not more and fraction is not None and int(fraction[1]) < int(fraction[2])

    def convert(latex: str, imaginary: bool, is_real: bool) -> Any:
        converter = Converter(is_real=is_real or None, config=ConversionConfig(lowercase_symbols=False))
        converter.imaginary = imaginary
        return converter.parse(latex)

    return convert
