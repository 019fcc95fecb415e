"""Cut a solution into steps, at tokens.

A step ends with the first token after which the text holds a separator, such as a line break, outside of code,
displayed formulas and LaTeX environments. Whether a step ends is decided by the text so far alone, as the policy sees
it. Only the last step can be blank: separators that follow each other belong to one end, or to the beginning of the
next step.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from common.token_texts import PART_OF_A_CHARACTER, TokenTexts

_BLOCKS = re.compile(
    r"\\[\\$]|```|\$\$|\\\[|\\\]|\\begin\{(?P<begin>[^{}]+)\}|\\end\{(?P<end>[^{}]+)\}",
)
"""What opens or closes a block. A double backslash, LaTeX's line break, and an escaped dollar do neither."""


def is_open(text: str) -> bool:
    """Whether the text ends inside a block: a fence of code, a displayed formula or a LaTeX environment."""
    stack: list[str] = []
    for match in _BLOCKS.finditer(text):
        mark = match[0]
        inside = stack[-1] if stack else ""
        if inside == "```":
            if mark == "```":
                stack.pop()
        elif mark == "```" or (mark == "$$" and inside != "$$"):
            stack.append(mark)
        elif mark == "$$" or (mark == r"\]" and inside == r"\["):
            stack.pop()
        elif mark == r"\[" or match["begin"] is not None:
            stack.append(match["begin"] or mark)
        elif match["end"] is not None and inside == match["end"]:
            stack.pop()
    return bool(stack)


class StepCutter:
    """Finds the ends of steps among tokens."""

    def __init__(self, separators: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        """`separators` are texts that end a step."""
        self._separators = separators
        self._decode = decode
        self._tokens = TokenTexts(separators, decode)

    def ends(self, token_ids: Sequence[int]) -> Iterator[int]:
        """The number of tokens up to the end of each step; what follows the last is a step that goes on."""
        start = 0
        for place, token in enumerate(token_ids, start=1):
            if self._tokens.may_complete(token) and self._is_end(token_ids[start:place]):
                yield place
                start = place

    def first_end(self, token_ids: Sequence[int]) -> int:
        """The number of tokens of the first step; all of them if it does not end before."""
        return next(self.ends(token_ids), len(token_ids))

    def _is_end(self, step: Sequence[int]) -> bool:
        """Whether a separator becomes complete in the last token, outside of blocks and after something not blank."""
        text, before = self._decode(step), self._decode(step[:-1]).rstrip(PART_OF_A_CHARACTER)
        begun = len(text) - len(text.lstrip())
        ends = (
            end
            for separator in self._separators
            for end in _ends_of(separator, text, max(begun, len(before) - len(separator) + 1))
        )
        return any(not is_open(text[:end]) for end in ends) and not is_open(text)


def _ends_of(separator: str, text: str, start: int) -> Iterator[int]:
    """Where the separators end that begin at `start` or later."""
    while (place := text.find(separator, start)) >= 0:
        yield place + len(separator)
        start = place + 1
