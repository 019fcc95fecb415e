"""Weights for the processes of this machine: files in its shared memory."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.files import writing_to
from common.lifetime import is_alive

SHARED_MEMORY = Path("/dev/shm")
BYTES_A_PART = 2**30

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def new_folder_in_memory(kind: str) -> Path:
    """A new folder: in shared memory, where there is one. Removes those of processes that were killed."""
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    ours = f"astar-po-{platform.node()}-"
    for folder in root.iterdir():
        process = folder.name.removeprefix(ours).partition("-")[0]
        if folder.name.startswith(ours) and process.isdecimal() and not is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{ours}{os.getpid()}-{kind}-", dir=root))


def in_parts(named_tensors: NamedTensors) -> Iterator[dict[str, torch.Tensor]]:
    """Copies in main memory, about a GiB at a time, so that little more than that is there twice.

    They share no memory, as tied weights do.
    """
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        part[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        size += tensor.nbytes
        if size >= BYTES_A_PART:
            yield part
            part, size = {}, 0
    if part:
        yield part


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """SharedWeights in a folder."""

    folder: Path

    @classmethod
    def write(cls, named_tensors: NamedTensors) -> Self:
        """Write weights to a new folder. Raises UserError if there is no room for them."""
        found = cls(new_folder_in_memory("weights"))
        try:
            with writing_to(found.folder):
                for number, part in enumerate(in_parts(named_tensors)):
                    save_file(part, found.folder / f"{number:05d}.safetensors")
        except BaseException:
            found.discard()
            raise
        return found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Like SharedWeights; those of a file in the order of their names."""
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                for name in sorted(weights.keys()):
                    yield name, weights.get_tensor(name)

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
