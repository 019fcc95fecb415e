"""Batches from files: what is trained on is there before training begins."""

from collections.abc import Sequence

from stage2_train.config import Config
from stage2_train.data import prompt_batch
from stage2_train.metrics import Metrics
from stage2_train.ranks import Ranks
from stage2_train.sources.batches import Group, Units, own_places


class OfflineSource:
    """A batch follows from the seed and the iteration alone, so nothing ever waits."""

    def __init__(self, config: Config, units: Units, ranks: Ranks) -> None:
        self._train, self._seed = config.train, config.seed
        self._units = units
        self._ranks = ranks

    def groups(self, number: int, last: int, metrics: Metrics) -> list[Group]:
        """This rank's share of iteration `number`."""
        size, count = self._train.batch_size, len(self._units)
        batch = prompt_batch(count, size, self._seed, number)
        before = (number - 1) * size
        return [
            self._units.group(batch[place], visit=(before + place) // count)
            for place in own_places(self._train, self._ranks)
        ]

    def waiting(self, version: int) -> list[list[Group]]:
        """No batches."""
        return []

    def resume(self, version: int, batches: Sequence[list[Group]]) -> None:
        """There is nothing to restore."""
        assert not batches, "no batches wait"

    def close(self) -> None:
        """There is nothing to end."""
