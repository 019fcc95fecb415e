"""Progress of sampling: samples, prompts and tokens."""

import numpy as np
from numpy.typing import NDArray

from common.terminal.console import Terminal
from common.terminal.progress import Advance


class SamplingProgress(Advance):
    """Counts samples, prompts and tokens, and shows them with the rate and the remaining time."""

    def __init__(self, missing_PN: NDArray[np.bool_], console: Terminal, prompts: str = "prompts") -> None:
        """`missing_PN` marks the samples to draw of each prompt; `prompts` says what these are."""
        self._name = prompts
        self._left_P: list[int] = missing_PN.sum(axis=1).tolist()
        self._all_prompts = sum(left > 0 for left in self._left_P)
        self._samples = sum(self._left_P)
        self._prompts = self._tokens = 0
        super().__init__(console, self._samples, self._counts)

    def add(self, place: int, tokens: int) -> None:
        """Count one sample of the prompt at this place."""
        self._tokens += tokens
        self._left_P[place] -= 1
        self._prompts += self._left_P[place] == 0
        self.by(1)
        if self.done == self._samples:
            self.show()

    def _counts(self, done: int) -> str:
        return (
            f"{self._prompts:,}/{self._all_prompts:,} {self._name}, {done:,}/{self._samples:,} samples, "
            f"{self._tokens / self.seconds:,.0f} tokens/s"
        )
