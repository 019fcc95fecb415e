"""The samples that are still to be drawn. Resume, shards and a larger N are this one question."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.rollout import Prompt, SampleRequest
from common.seeds import derive_seed

Address = tuple[str, int]
"""A sample's prompt id and index."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The samples still to be drawn: prompts, and for each which of its samples, shape (P, N)."""

    prompts: Sequence[Prompt]
    samples_PN: NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.samples_PN.sum())

    def incomplete(self) -> "Missing":
        """The prompts that lack a sample."""
        return self._at(np.flatnonzero(self.samples_PN.any(axis=1)))

    def of(self, prompt_ids: Collection[str]) -> "Missing":
        """These prompts alone."""
        return self._at(
            np.array(
                [place for place, prompt in enumerate(self.prompts) if prompt.id in prompt_ids], dtype=np.intp
            )
        )

    def _at(self, places: NDArray[np.intp]) -> "Missing":
        return Missing([self.prompts[place] for place in places], self.samples_PN[places])

    def requests(self, seed: int) -> Iterator[SampleRequest]:
        """Each prompt's samples together, so that they share its prefix in the engine. The key is its address."""
        for prompt, samples_N in zip(self.prompts, self.samples_PN, strict=True):
            for index in np.flatnonzero(samples_N).tolist():
                yield SampleRequest(
                    key=(prompt.id, index),
                    prompt_token_ids=tuple(prompt.token_ids),
                    seed=derive_seed(seed, prompt.id, index),
                )
