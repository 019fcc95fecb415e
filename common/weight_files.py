"""The safetensors files of a model's folder: which they are, what is in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, as transformers and vLLM choose them.

    A folder may hold the same weights once more under other names, such as consolidated.safetensors. Raises UserError.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {index}: {error}; download the model again") from error
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{folder} lacks {', '.join(absent)} of {INDEX}; download the model again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors weights; convert the model to safetensors first")
    return files


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors by name, from the files' headers. Raises UserError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        with _opened(file, "numpy") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


def stored_weights(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """The stored tensors by name, one at a time. Raises UserError."""
    for file in weight_files(folder):
        with _opened(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping, its keys() is all it has)
                yield name, weights.get_tensor(name)


def _opened(file: Path, framework: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework)
    except (OSError, MemoryError, SafetensorError) as error:
        raise UserError(
            f"cannot read {file}, no whole safetensors file ({str(error) or type(error).__name__}); download the "
            "model again"
        ) from error
