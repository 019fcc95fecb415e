"""Finds the tokens in which a text can end, so that the text of all tokens is looked at only after one of these."""

from collections.abc import Callable, Sequence

PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""The text of a token that holds only some bytes of a character."""


class TokenTexts:
    """The texts of single tokens, and whether any of some texts can end in a token."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._last_characters = {text[-1] for text in texts} | {PART_OF_A_CHARACTER}
        self._known: dict[int, str] = {}

    def may_complete(self, token: int) -> bool:
        """Whether the token can be the last of one of the texts."""
        return not self._last_characters.isdisjoint(self.of(token))

    def of(self, token: int) -> str:
        """Twice the text of a token: at the beginning of a text some lose a space."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._decode([token, token])
        return known
