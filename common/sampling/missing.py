"""The samples that are still to be drawn, whether after an interruption, in a shard, or for a larger N."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.rollout import Prompt, SampleRequest
from common.seeds import derive_seed

Address = tuple[str, int]
"""A sample's prompt id and index."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The samples still to be drawn: prompts, and which samples of each, shape (P, N)."""

    prompts: Sequence[Prompt]
    samples_PN: NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.samples_PN.sum())

    def incomplete(self) -> "Missing":
        """The prompts that lack a sample."""
        return self._at(np.flatnonzero(self.samples_PN.any(axis=1)))

    def of(self, prompt_ids: Collection[str]) -> "Missing":
        """The same for these prompts only."""
        return self._at(
            np.array(
                [place for place, prompt in enumerate(self.prompts) if prompt.id in prompt_ids], dtype=np.intp
            )
        )

    def _at(self, places: NDArray[np.intp]) -> "Missing":
        return Missing([self.prompts[place] for place in places], self.samples_PN[places])

    def requests(self, seed: int) -> Iterator[SampleRequest]:
        """One request per sample, keyed by its address; a prompt's are adjacent, to share its prefix in the engine."""
        for prompt, samples_N in zip(self.prompts, self.samples_PN, strict=True):
            for index in np.flatnonzero(samples_N).tolist():
                yield SampleRequest(
                    key=(prompt.id, index),
                    prompt_token_ids=tuple(prompt.token_ids),
                    seed=derive_seed(seed, prompt.id, index),
                    prefix=tuple(prompt.prefix),
                )


def prompt_table(prompts: Iterable[Prompt]) -> pl.DataFrame:
    """The columns of vstar.parquet that are known before sampling, one row per prompt."""
    names = ("prompt_id", "prompt", "answer", "prompt_token_hash")
    rows = [(prompt.id, prompt.text, prompt.answer, prompt.token_hash) for prompt in prompts]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
