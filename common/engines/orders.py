"""What a fleet of engines tells a worker, and what a worker replies."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.config import SamplingParams
from common.rollout import Completion, SampleRequest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Begin:
    """Requests follow, which belong to one call of `generate`."""

    stream: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """Some requests of the call that has begun."""

    requests: tuple[SampleRequest, ...]


@dataclass(frozen=True, slots=True)
class End:
    """No further request of the call that has begun."""


class SharedWeights(Protocol):
    """Weights that processes elsewhere can read."""

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """The tensors with their names, one at a time, a layer's after each other."""
        ...

    def discard(self) -> None:
        """Free the memory; nobody reads them any more."""
        ...


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Replace the weights."""

    weights: SharedWeights


@dataclass(frozen=True, slots=True)
class Sleep:
    """Free memory until the next LoadWeights."""


Order = Begin | Draw | End | LoadWeights | Sleep


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is built."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Completions of a call of `generate`."""

    stream: int
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """An order to load weights or to sleep was carried out."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine is gone; final if another one would fail in the same way."""

    message: str
    is_final: bool


Reply = Ready | Drawn | Done | Failed
