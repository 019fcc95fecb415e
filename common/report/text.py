"""Make model output fit to be shown: bounded, and without invisible characters that have an effect.

The template escapes HTML. This module handles characters that escaping leaves alone: control characters, marks that
reverse the reading direction, and characters without a glyph.
"""

import unicodedata
from dataclasses import dataclass

from markupsafe import Markup

CHARACTERS_SHOWN = 4000

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_LAYOUT = "\n\t"


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a text, and the length of the whole."""

    text: str
    characters: int

    @classmethod
    def of(cls, text: str) -> "Excerpt":
        """A text's first CHARACTERS_SHOWN characters."""
        return cls(text[:CHARACTERS_SHOWN], len(text))

    @property
    def is_cut(self) -> bool:
        return self.characters > len(self.text)


def visible(text: str) -> Markup:
    """A text as HTML in which each invisible character is replaced by its marked code, such as U+202E."""
    parts: list[str] = []
    start = 0
    for place, character in enumerate(text):
        if character not in _LAYOUT and unicodedata.category(character) in _UNSEEN:
            sign = Markup('<span class="unseen">U+{:04X}</span>').format(ord(character))
            parts += (Markup.escape(text[start:place]), sign)
            start = place + 1
    return Markup("").join([*parts, Markup.escape(text[start:])])
