"""Ends a training job in which a rank hangs, and says which rank that is and what it was doing.

A rank that waits for another one in a collective operation, or for its engine, would wait for ever. Each rank therefore
notes what it is doing, and since when, in the store by which the ranks have found each other.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from common.terminal.messages import leave
from stage2_train.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Phase:
    """What a rank is doing, and since when, in seconds of the epoch."""

    name: str
    since: float

    def __str__(self) -> str:
        return f"{self.name}, for {(time.time() - self.since) / 60:.1f} minutes"


class _Phases:
    """The phases that this process is in, each inside the one before. When one ends, that around it begins anew."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self.current: Phase | None = None

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self._names.append(name)
        self.current = Phase(name, time.time())
        try:
            yield
        finally:
            self._names.pop()
            self.current = Phase(self._names[-1], time.time()) if self._names else None


_PHASES = _Phases()
in_phase = _PHASES.inside
"""A context in which this process is doing something, by its name for people."""


class Watchdog:
    """Watches over this rank in a thread of its own, inside a context."""

    def __init__(self, ranks: Ranks, limit: timedelta) -> None:
        """`limit` is the longest that a phase may take."""
        self._ranks = ranks
        self._limit = limit.total_seconds()
        self._ends = threading.Event()
        self._store: Any = None
        if ranks.world_size > 1:
            distributed: Any = dist
            store = distributed.distributed_c10d._get_default_store()
            self._store = distributed.PrefixStore("watchdog", store)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()

    def _watch(self) -> None:
        while not self._ends.wait(min(10.0, self._limit / 10)):
            phase = _PHASES.current
            if phase is None:
                continue
            if self._store is not None:
                with suppress(RuntimeError):  # it is gone, with the node of the main rank
                    self._store.set(str(self._ranks.rank), json.dumps([phase.name, phase.since]))
            if time.time() - phase.since > self._limit:
                self._end(phase)

    def _known(self) -> dict[int, Phase]:
        """The phases of all ranks that have noted one; {} without a store."""
        ranks = [str(rank) for rank in range(self._ranks.world_size)] if self._store is not None else []
        with suppress(RuntimeError):
            return {
                int(rank): Phase(*json.loads(self._store.get(rank)))
                for rank in ranks
                if self._store.check([rank])
            }
        return {}

    def _end(self, phase: Phase) -> NoReturn:
        """End the process. The rank whose phase began first is the one that the others wait for."""
        known = self._known() or {self._ranks.rank: phase}
        first = min(known, key=lambda rank: known[rank].since)
        others = [f"rank {rank} in {each}" for rank, each in known.items() if rank != first]
        waiting = f" ({'; '.join(others[:8])}{', …' if len(others) > 8 else ''})" if others else ""
        leave(
            1,
            f"error: rank {first} hangs in {known[first]}{waiting}; the limit is {self._limit / 60:g} minutes "
            "(train.hang_minutes). The same command continues from the last checkpoint",
            unless_said=True,
        )
