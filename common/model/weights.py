"""A model's weights as files: which are loaded, their headers and hashes, and whether all numbers are finite."""

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.files import FILES_AT_A_TIME, file_digest, joint_hash, write_text

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
AGAIN = "download the model again"
POINTER = b"version https://git-lfs"
"""The first bytes of a Git LFS pointer."""

EXPONENT = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}
"""By safetensors' name of a number format, its size as an integer type and the bits that NaN and infinity set."""
NUMBERS_AT_A_TIME = 2**22
MOST_HEADERS = 512
"""Number of cached headers; one command reads the same ones many times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The contents of the headers of a model's safetensors files, tensors by name."""

    files: tuple[Path, ...]
    unread: tuple[Path, ...]
    """Other safetensors files in the folder, which are not part of the model, such as Mistral's consolidated ones."""
    shapes: Mapping[str, tuple[int, ...]]
    formats: Mapping[str, str]
    """Number formats as safetensors names them, such as BF16."""

    def count(self, *, tied: bool) -> int:
        """The number of parameters; an output layer that is tied to the embedding counts once."""
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if not (tied and name.endswith("lm_head.weight"))
        )


def read_weights(folder: Path) -> Weights:
    """Read the headers of the weights in `folder`, of the files that transformers and vLLM load.

    Raises UserError if there are none; if one is missing, cut off or not a safetensors file; or if the two libraries
    would load different files.
    """
    files = _files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    formats: dict[str, str] = {}
    for file in files:
        for name, entry in _header(file).items():
            shapes[name] = tuple(entry["shape"])
            formats[name] = entry["dtype"]
    _refuse_missing_tensors(folder, shapes)
    unread = tuple(sorted(set(folder.glob("*.safetensors")) - set(files)))
    return Weights(files=files, unread=unread, shapes=shapes, formats=formats)


def _files(folder: Path) -> tuple[Path, ...]:
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if single.is_file():
            return (single,)
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        found = f" that can be loaded: no {INDEX} names {', '.join(others[:3])}" if others else ""
        raise UserError(
            f"{folder} holds no *.safetensors weights{found}; convert the model to safetensors first "
            f"(save_pretrained), or {AGAIN}"
        )
    names = sorted(set(_weight_map(index).values()))
    if single.is_file() and SINGLE not in names:
        raise UserError(
            f"{folder} holds {SINGLE} and an {INDEX} that names other files, so transformers and vLLM would load "
            "different weights; remove the one that does not belong there"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        shown = ", ".join([*missing[:3], *(["…"] if len(missing) > 3 else [])])
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files that {INDEX} names: {shown}; {AGAIN}"
        )
    return tuple(folder / name for name in names)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a list of weight files; {AGAIN}") from error
    sound = isinstance(mapping, dict) and all(
        isinstance(name, str) and Path(name).name == name for name in mapping.values()
    )
    if not sound or not mapping:
        raise UserError(f"{index} is not a list of weight files; {AGAIN}")
    return dict(mapping)


def _refuse_missing_tensors(folder: Path, shapes: Mapping[str, object]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    if missing := sorted(set(_weight_map(index)) - set(shapes)):
        raise UserError(
            f"{folder}: its weight files lack {len(missing)} tensors that {INDEX} names, such as {missing[0]}; {AGAIN}"
        )


def _header(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """A file's tensors by name, after checking that its header agrees with its length."""
    try:
        return _header_of(file, _state(file))
    except OSError as error:
        raise UserError(f"{file} {_fault(file, error)}") from error


def _state(file: Path) -> tuple[int, int, int]:
    """The state of a file, by which a change is noticed.

    It consists of the size in bytes and, in ns, the times of the last change of the contents, which archives and
    `touch` may set to any value, and of the file.
    """
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=MOST_HEADERS)
def _header_of(file: Path, state: tuple[int, int, int]) -> Mapping[str, Mapping[str, Any]]:
    try:
        with safe_open(file, framework="numpy"):  # checks that the tensors fill the file
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            document: dict[str, dict[str, Any]] = json.loads(stream.read(length))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} {_fault(file, error)}") from error
    document.pop("__metadata__", None)
    return document


def _fault(file: Path, error: Exception) -> str:
    """The problem of a file that is not a complete safetensors file."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}; correct its permissions, or {AGAIN}"
    if start.startswith(POINTER):
        return "is a Git LFS pointer; fetch what it stands for with `git lfs pull`"
    return f"is not a complete safetensors file ({str(error).splitlines()[0]}): it was cut off or damaged; {AGAIN}"


def refuse_pointer(file: Path) -> None:
    """Raise UserError for the pointer that a clone without Git LFS leaves in a large file's place."""
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise UserError(f"{file} {_fault(file, ValueError())}")


def stored_weights(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """The tensors of the model in `folder` by name, one at a time. Raises UserError, see `read_weights`."""
    for file in read_weights(folder).files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping, its keys() is all it has)
                yield name, weights.get_tensor(name)


def weights_hash(weights: Weights, memory: Path | None = None) -> str:
    """A hash of a folder's safetensors files, names and contents. Raises UserError for numbers that are not finite.

    The result for each file is cached in `memory`, and the file is not read again while its size and times are the
    same.
    """
    known = _Known(memory)
    all_found = known.of({file: file in weights.files for file in sorted([*weights.files, *weights.unread])})
    known.keep()
    for file, found in all_found.items():
        if found.not_finite is not None:
            raise UserError(
                f"{file}: {found.not_finite} holds NaN or infinity, so it can neither be sampled from nor trained; "
                f"{AGAIN}, or take an earlier checkpoint"
            )
    return joint_hash({file: found.sha256 for file, found in all_found.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The result of reading a whole file."""

    state: tuple[int, int, int]
    sha256: str
    is_loaded: bool
    """Whether it was one of the model's loaded files, whose numbers are checked."""
    not_finite: str | None
    """The first tensor with a number that is not finite."""


class _Known:
    """A cache of results of files, by their paths, kept in a file of its own."""

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._found: dict[str, _Found] = {}
        self._is_new = False
        if memory and memory.is_file():
            try:
                document = json.loads(memory.read_text(encoding="utf-8"))
                self._found = {
                    name: _Found(**{**values, "state": tuple(values["state"])})
                    for name, values in document.items()
                }
            except (ValueError, TypeError, KeyError, AttributeError):
                self._found = {}  # damaged: its results are computed again

    def of(self, files: Mapping[Path, bool]) -> dict[Path, _Found]:
        """The results of files, given whether each is loaded; those that have changed are read, some at a time."""
        threads = ThreadPoolExecutor(FILES_AT_A_TIME)
        try:
            return dict(zip(files, threads.map(self._of, files, files.values()), strict=True))
        finally:  # a command that is stopped does not wait for large files
            threads.shutdown(wait=False, cancel_futures=True)

    def _of(self, file: Path, is_loaded: bool) -> _Found:
        path, state = str(file.resolve()), _state(file)
        known = self._found.get(path)
        if known and known.state == state and known.is_loaded >= is_loaded:
            return known
        self._is_new = True
        self._found[path] = _Found(
            state=state,
            is_loaded=is_loaded,
            sha256=file_digest(file),
            not_finite=_first_not_finite(file) if is_loaded else None,
        )
        return self._found[path]

    def keep(self) -> None:
        """Save the cache, if there is anything new and a run to keep it with."""
        if self._memory and self._is_new and self._memory.parent.is_dir():
            document = {name: asdict(found) for name, found in self._found.items()}
            with suppress(OSError, UserError):  # then the results are computed again next time
                write_text(self._memory, json.dumps(document, indent=1))


def _first_not_finite(file: Path) -> str | None:
    header = _header(file)
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    for name, entry in header.items():
        if entry["dtype"] not in EXPONENT:
            continue
        kind, mask = EXPONENT[entry["dtype"]]
        begin, end = entry["data_offsets"]
        count = (end - begin) // np.dtype(kind).itemsize
        if count and not _all_finite(np.memmap(file, kind, "r", start + begin, (count,)), kind(mask)):
            return name
    return None


def _all_finite(numbers: "np.memmap[Any, np.dtype[Any]]", mask: Any) -> bool:
    return not any(
        bool(((numbers[start : start + NUMBERS_AT_A_TIME] & mask) == mask).any())
        for start in range(0, len(numbers), NUMBERS_AT_A_TIME)
    )
