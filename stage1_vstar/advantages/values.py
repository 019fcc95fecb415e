"""The critic's values, kept in parts until the table is written: a job that was killed asks only for the others.

artifacts/<run>/critic_values/<hash of the critic and the states>.npy
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import atomic_path, discard
from common.remote.copies import fetched
from common.value import Floats

Score = Callable[[Iterable[Sequence[int]]], Sequence[float]]
"""From the tokens of states to the critic's values of them."""
LoadCritic = Callable[[Path], Score]
"""Loads the critic in a folder."""

STATES_A_PART = 16_384
"""States that are valued and kept together; so many are lost if the job is killed."""


class KeptValues:
    """The values that a critic gives. It is loaded once, and not before a value is missing."""

    def __init__(self, folder: Path, critic: Path, digest: str, load: LoadCritic) -> None:
        """`digest` identifies everything besides a state that its value depends on."""
        self._folder = fetched(folder, whole=True)
        self._critic = critic
        self._digest = digest
        self._load = load
        self._score: Score | None = None

    def __call__(self, states: Iterable["array[int]"], progress: Callable[[int], None]) -> Floats:
        """The values of states, in their order; `progress` gets the number of states of each part that is done.

        Raises UserError for a value that is not finite.
        """
        rest = iter(states)
        parts = [np.empty(0)]
        while some := list(islice(rest, STATES_A_PART)):
            parts.append(self._of_part(some))
            progress(len(some))
        return np.concatenate(parts)

    def _of_part(self, states: Sequence["array[int]"]) -> Floats:
        content = hashlib.sha256(self._digest.encode())
        for state in states:
            content.update(len(state).to_bytes(8) + state.tobytes())
        path = self._folder / f"{content.hexdigest()}.npy"
        if path.exists():
            return np.asarray(np.load(path), dtype=np.float64)
        if self._score is None:
            self._score = self._load(self._critic)
        values = np.asarray(self._score(states), dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._critic}: the critic's value of a state is not a number; train it again with a lower "
                "critic.learning_rate"
            )
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, values)
        return values

    def forget(self) -> None:
        """Remove what was kept: the table has it."""
        discard(self._folder)
