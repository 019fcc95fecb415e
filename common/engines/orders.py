"""What a fleet of engines tells a worker, what a worker replies, and the weights between them as files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import SamplingParams
from common.rollout import Completion, SampleRequest

if TYPE_CHECKING:
    import torch

BYTES_A_FILE = 2**30


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


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Replace the weights by those in the folder, as `write_weights` left them."""

    folder: Path


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


def write_weights(folder: Path, named_tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
    """Write tensors to files of about a GiB, so that little more than that is in memory twice."""
    import torch
    from safetensors.torch import save_file

    part: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in named_tensors:
        # A copy, since safetensors refuses tensors that share memory, as tied ones do.
        part[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += tensor.nbytes
        if size >= BYTES_A_FILE:
            save_file(part, folder / f"{number:05d}.safetensors")
            part, size, number = {}, 0, number + 1
    save_file(part, folder / f"{number:05d}.safetensors")


def read_weights(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors, one at a time; those of a file in the order of their names, which keeps a layer's together."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                yield name, weights.get_tensor(name)
