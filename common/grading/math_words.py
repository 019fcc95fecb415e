r"""Words beside an answer: units, introductions, and what data sets write where they have no answer.

It says which words may be left out and which two units contradict each other; units are not converted. A hedge
(`5\text{ or more}`), a multiplier (`5\text{ million}`) and a time (`3\text{ p.m.}`) are no units.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

_ALIASES = {
    alias: unit
    for unit, aliases in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "nm": "nm nanometer nanometre",
        "in": "in inch inche",
        "ft": "ft foot feet",
        "yd": "yd yard",
        "mi": "mi mile",
        "au": "au",
        "ly": "ly lightyear",
        "pc": "pc parsec",
        "mg": "mg milligram",
        "g": "g gram gm",
        "kg": "kg kilogram",
        "lb": "lb pound",
        "oz": "oz ounce",
        "ton": "ton tonne",
        "ms": "ms millisecond",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "day": "day",
        "week": "week wk",
        "month": "month",
        "year": "year yr",
        "usd": "dollar buck usd",
        "cent": "cent ¢",
        "eur": "euro eur €",
        "gbp": "gbp £ pence sterling",
        "jpy": "yen ¥ 円",
        "cny": "yuan rmb 元",
        "inr": "rupee ₹",
        "deg": "degree deg °",
        "rad": "radian rad",
        "°C": "°C celsius",
        "°F": "°F fahrenheit",
        "K": "K kelvin",
        "J": "J joule",
        "kJ": "kJ",
        "N": "N newton",
        "W": "W watt",
        "kW": "kW",
        "V": "V volt",
        "A": "A amp ampere",
        "Pa": "Pa pascal",
        "kPa": "kPa",
        "atm": "atm",
        "Hz": "Hz hertz",
        "C": "C coulomb",
        "T": "T tesla",
        "eV": "eV",
        "mol": "mol mole",
        "ohm": "ohm Ω",
        "erg": "erg",
        "dyn": "dyn dyne",
        "L": "L l liter litre",
        "mL": "mL ml milliliter millilitre",
        "gal": "gal gallon",
        "acre": "acre",
        "unit": "unit",
    }.items()
    for alias in aliases.split()
}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_COMPOUNDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "sqft": "sq ft"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GLUED_UNITS = _words("mm cm km kg ft lb lbs mph mg inch inches feet foot degrees dollars cents")
_SHORT_WORDS = _words("m s h of in per men the all")
_HEDGES = _words(
    "or and nor not no non but if when where unless except than more less few fewer most least over under above below "
    "between within beyond about approximately approx around roughly nearly almost maybe perhaps possibly probably "
    "likely ish otherwise else was isnt wrong false true incorrect rejected extraneous invalid either neither only "
    "unknown undefined impossible unsure guess estimate estimated some another up down to from minimum maximum max "
    "infinity infinitely negative positive minus plus time mod modulo divided remainder with without bound lower upper "
    "opposite inverse reciprocal"
)
_QUANTITIES = _words(
    "hundred thousand million billion trillion dozen half halve third quarter fourth fifth sixth seventh eighth ninth "
    "tenth hundredth thousandth millionth double twice triple percent percentage pct zero one two three four five six "
    "seven eight nine ten eleven twelve twenty score pair factorial root"
)
_NO_UNITS = _HEDGES | _QUANTITIES | _words("so is are be for am pm noon midnight oclock bc ad")
_NO_CJK_UNITS = re.compile("[或和与不非以至到约半十百万亿多少左右零一二三四五六七八九]|千(?![克米瓦])")


_TAIL = re.compile(
    r"(?:\s|/|\\cdot(?![A-Za-z]))*(?:\\text\{[^{}]*\}|\^\{\\circ\}(?:\s*[CF](?![A-Za-z]))?|(?<=[0-9])\s?\\Omega)"
    r"(?:\s|/|\\cdot(?![A-Za-z])|\\text\{[^{}]*\}|\^\{-?[0-9]\}|\^\{\\circ\})*$"
)
_BARE_TAIL = re.compile(
    r"(?:(?<=[0-9})])|(?<=[0-9})] )) ?([^\W\d_]+\.?(?: [^\W\d_]+\.?){0,4}(?:/[a-z]+)?)(?:\^\{[0-9]\})?$"
)
_UNIT_FRACTION = re.compile(r"\\frac\{(\\text\{[^{}]*\})\}\{(\\text\{[^{}]*\}(?:\^\{[0-9]\})?)\}$")
_UNIT_TOKEN = re.compile(r"(°\s*[CF]?|[^\W\d_]+|[¢€£¥₹])\s*(?:\^\s*(-?[0-9]))?|(/)")
_MARKUP = re.compile(r"\\(?:text|cdot)(?![A-Za-z])|[{}]")

_MONEY = {
    r"\$": "usd",
    "€": "eur",
    "£": "gbp",
    "¥": "jpy",
    "₹": "inr",
    "¢": "cent",
    r"\pounds": "gbp",
    r"\euro": "eur",
}
_MONEY_SIGN = r"(\\\$|[€£¥₹¢]|\\pounds(?![A-Za-z])|\\euro(?![A-Za-z]))"
_MONEY_BEFORE = re.compile(rf"([-+]?)\s*(?:US\s*)?{_MONEY_SIGN}\s*")
_MONEY_AFTER = re.compile(rf"(?<=[0-9])\s*{_MONEY_SIGN}$")

_PERCENT = re.compile(
    r"\s*(?:\\text\{(?:percent|per cent|percentage|pct)\}|(?<=[0-9} ])(?:percent|per cent|pct|percentage))$",
    re.IGNORECASE,
)
_ORDINAL = re.compile(
    r"(?<=[0-9])\s*(?:\^?\{?\\text\{(?:st|nd|rd|th)\}\}?|\^\{(?:st|nd|rd|th)\}|(?:st|nd|rd|th))$"
)
_MULTIPLIERS = {
    "dozen": "12",
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "百": "10^{2}",
    "千": "10^{3}",
    "万": "10^{4}",
    "亿": "10^{8}",
}
_MULTIPLIER_WORD = rf"({'|'.join(_MULTIPLIERS)})(?![a-z克米瓦分])"
_MULTIPLIER = re.compile(rf"(?<=[0-9}}])\s*(?:\\text\{{{_MULTIPLIER_WORD}([^{{}}]*)\}}|{_MULTIPLIER_WORD})")


_INTRODUCTION = re.compile(
    r"\\text\{[^{}]*(?:\b(?:is|are|equals|be)(?=[ }:])|:)(?:\s*\}\s*:?)?"
    r"|\\text\{(?:答案|所以|因此|故|即|解得|综上)[^{}]*\}"
)
_BARE_INTRODUCTION = re.compile(
    r"(?:(?:so|thus|hence|therefore|and|the|final|correct|our),? ){0,4}(?:answer|result|solution|value|total)"
    r" ?(?:is equal to|is|equals|[:=]|(?= [^A-Za-z\\]))[: ]*|(?:最终)?答案(?:是|为)?[: ]*",
    re.IGNORECASE,
)
_MINERVA = re.compile(r".*[Tt]he final answer is (.+?)\.?(?: I hope it is correct)?", re.DOTALL)
PLACEHOLDERS = frozenset(
    [
        "nan",
        "none",
        "null",
        "nil",
        "n/a",
        "na",
        "notfound",
        "not found",
        "no answer",
        "proof",
        "see solution",
        "tbd",
    ]
)
"""Placeholders that data sets write instead of an answer."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The words beside a number; `known` if every one of them is a unit of measurement."""

    words: tuple[str, ...]
    known: bool


PERCENTAGE = Unit(("%",), known=True)


@lru_cache(maxsize=16_384)
def split_unit(text: str) -> tuple[str, Unit | None]:
    """A cleaned answer as what is measured and its unit; percent and multipliers belong to the former."""
    if text.isdigit():
        return text, None
    text = _PERCENT.sub(r"\\%", text)
    text = _ORDINAL.sub("", _MULTIPLIER.sub(_multiplied, text))
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    money = ""
    if sign := _MONEY_BEFORE.match(text):
        money, text = _MONEY[sign[2]], sign[1] + text[sign.end() :]
    elif sign := _MONEY_AFTER.search(text):
        money, text = _MONEY[sign[1]], text[: sign.start()]
    found = _TAIL.search(text)
    if not found and (found := _BARE_TAIL.search(text)) and not _are_words(found[1], found[0][0] != " "):
        found = None
    body, unit = text, _unit(money)
    if found and text[: found.start()].strip() and (whole := _unit(f"{money} {found[0]}")):
        body, unit = text[: found.start()].strip(), whole
    return body, PERCENTAGE if body.endswith(r"\%") else unit


def contradict(one: Unit | None, other: Unit | None) -> bool:
    """Whether two units cannot mean the same; a unit left out means whatever the other one says."""
    if one is None or other is None:
        return False
    if any(word.partition("^")[0] == "unit" for word in one.words + other.words):
        return False
    if one.known and other.known:
        return one.words != other.words
    return not set(one.words) & set(other.words)


def _multiplied(found: re.Match[str]) -> str:
    rest = rf" \text{{{found[2].strip()}}}" if found[2] and found[2].strip() else ""
    return rf"\times {_MULTIPLIERS[found[1] or found[3]]}{rest}"


def _are_words(text: str, glued: bool) -> bool:
    r"""Whether letters outside of `\text{…}` are words and not a product of variables."""
    if glued:
        return text in _GLUED_UNITS or not text.isascii()
    words = re.split(r"\W+", text.strip("."))
    if "/" in text and all(map(_canonical, words)):
        return True
    return any(len(word) > 1 or not word.isascii() for word in words) and all(map(_is_word, words))


def _is_word(word: str) -> bool:
    if not word.isascii() or word in _GLUED_UNITS or word.lower() in _POWERS:
        return True
    if len(word) < 3 or word in "abcdefghijklmnopqrstuvwxyz":
        return word in _SHORT_WORDS
    return len(word) > 3 or _canonical(word) is not None or word in _SHORT_WORDS


def _unit(text: str) -> Unit | None:
    """None where a word is a hedge, a number or a time: then it belongs to the answer."""
    text = _MARKUP.sub(" ", text.replace(r"^{\circ}", "°").replace(r"\Omega", " ohm"))
    text = re.sub("[A-Za-z]+", lambda word: _COMPOUNDS.get(word[0].lower(), word[0]), text)
    words: list[str] = []
    known, sign, power = True, 1, 1
    for word, exponent, slash in _UNIT_TOKEN.findall(text):
        lower = word.lower()
        if slash or lower == "per":
            sign = -1
        elif lower in _POWERS and lower.endswith("ed") and words:
            words[-1] += f"^{_POWERS[lower]}"
        elif lower in _POWERS:
            power = _POWERS[lower]
        elif {lower, _stem(word)} & _NO_UNITS or _NO_CJK_UNITS.search(word):
            return None
        else:
            unit = _canonical(word)
            if unit is None and len(word) < 3 and word.isascii() and lower not in _SHORT_WORDS:
                return None
            known = known and unit is not None
            exponent = sign * power * int(exponent or 1)
            words.append((unit or _stem(word)) + (f"^{exponent}" if exponent != 1 else ""))
            power = 1
    if "deg" in words and {"°C", "°F"} & set(words):
        words.remove("deg")
    return Unit(tuple(words), known) if words else None


def _canonical(word: str) -> str | None:
    word = word.replace(" ", "")
    for spelling in (word, word.lower() if len(word) > 1 else word, _stem(word)):
        if spelling in _ALIASES:
            return _ALIASES[spelling]
    return None


def _stem(word: str) -> str:
    word = word.lower()
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def without_introduction(text: str) -> str:
    r"""The answer without the words that announce it: `\text{The answer is }5`, `Answer: 5`, Minerva's closing line."""
    if minerva := _MINERVA.fullmatch(text):
        return minerva[1]
    found = _INTRODUCTION.match(text) or _BARE_INTRODUCTION.match(text)
    if not found or found.end() == len(text):
        return text
    if (_HEDGES | _QUANTITIES) & set(re.findall("[a-z]+", found[0].lower())):
        return text
    rest = text[found.end() :].strip()
    if found[0].startswith("\\text") and not found[0].rstrip().endswith("}"):
        return rf"\text{{{rest}"
    return rest
