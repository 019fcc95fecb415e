"""The tokens of a solution whose steps come as texts, such as labelled steps of others."""

from collections.abc import Sequence

from common.data.rendering import PromptRenderer


def separator_of(separators: Sequence[str]) -> str:
    """What to put between steps that come without: the white space that the first separator ends with, or all of it."""
    first = separators[0]
    return first[len(first.rstrip()) :] or first


class StepTokeniser:
    """Turns the texts of a solution's steps into tokens, step by step, so that a step ends at a token."""

    def __init__(self, renderer: PromptRenderer, separators: Sequence[str]) -> None:
        """`separators` are the texts that end a step in this run."""
        self._renderer = renderer
        self.separator = separator_of(separators)

    def texts(self, steps: Sequence[str], *, is_whole: bool) -> list[str]:
        """The steps, each with the separator unless it ends with it; nothing follows the last of a whole solution."""
        last = len(steps) - 1
        return [
            step
            if step.endswith(self.separator) or (is_whole and number == last)
            else f"{step}{self.separator}"
            for number, step in enumerate(steps)
        ]

    def token_ids(self, texts: Sequence[str], *, is_whole: bool) -> list[tuple[int, ...]]:
        """The tokens of each step; a whole solution ends with the end token, as solutions that the policy draws do."""
        found = [tuple(ids) for ids in self._renderer.token_ids(list(texts))]
        if is_whole:
            found[-1] = (*found[-1], self._renderer.eos_token_ids[0])
        return found
