"""What models write, made fit to be shown: bounded, and with nothing in it that acts unseen.

Escaping for HTML is the template's work; this is about characters that no escaping touches: controls, marks that
reverse the reading direction, what has no glyph.
"""

import unicodedata
from dataclasses import dataclass

from markupsafe import Markup

CHARACTERS_SHOWN = 4000

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_LAYOUT = "\n\t"


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of a text, and how long the whole is."""

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
    """A text as HTML in which each unseen character stands as its code, such as U+202E, marked."""
    parts: list[str] = []
    start = 0
    for place, character in enumerate(text):
        if character not in _LAYOUT and unicodedata.category(character) in _UNSEEN:
            sign = Markup('<span class="unseen">U+{:04X}</span>').format(ord(character))
            parts += (Markup.escape(text[start:place]), sign)
            start = place + 1
    return Markup("").join([*parts, Markup.escape(text[start:])])
