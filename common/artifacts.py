"""A run's folder, writes that are whole or absent, and the provenance that ties an artifact to its origin.

artifacts/<run>/ is laid out here and nowhere else. Provenance has two halves: `identity` must be equal for two
pieces of work to be mixed (stage 1's samples among themselves, stage 1's result with stage 2's training);
`context` is recorded for the reader and never compared.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where a run keeps what."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def base_model(self) -> Path:
        """The demo's reference model; other runs bring their own."""
        return self.root / "base_model"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def vstar(self) -> Path:
        return self.root / "vstar.parquet"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained policy in Hugging Face format."""
        return self.root / "model"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def report(self) -> Path:
        return self.root / "report"


def run_paths(run: str) -> RunPaths:
    """artifacts/<run> of this checkout, or below $ASTAR_PO_ARTIFACTS where that is set."""
    return RunPaths(Path(os.environ.get("ASTAR_PO_ARTIFACTS", REPOSITORY / "artifacts")) / run)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; give it the final name once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_run(paths: RunPaths, job: str) -> Iterator[None]:
    """Hold the run's lock, so that two jobs of one kind never write to the same run.

    The kernel releases the lock with the process, however that ends. Raises UserError if another job holds it.
    """
    paths.root.mkdir(parents=True, exist_ok=True)
    with (paths.root / f".{job}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"another {job} job (process {file.read().strip() or 'unknown'}) is writing to {paths.root}; "
                "wait for it or choose another --run"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """A hash of the names and contents of a folder's files that match any pattern."""
    digest = hashlib.sha256()
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32] if files else ""


def resolve_model(path: str, revision: str | None) -> Path:
    """The local folder of a model: a given folder, or a hub model's snapshot (downloaded if need be).

    Raises UserError if there is no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} is no model in Hugging Face format: it has no config.json")
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise UserError(
            f"there is no model at {path}; check model.path; the demo's is built by `make base-model`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no model {path}: it is neither a local folder nor to be had from the Hugging Face hub "
            f"({reason}); check model.path"
        ) from error


def reference_model(config: Config) -> Path:
    """The local folder of a run's reference model; {run} in its path stands for the run's own folder."""
    path = config.model.path.replace("{run}", str(run_paths(config.run).root))
    return resolve_model(path, config.model.revision)


def model_identity(folder: Path) -> dict[str, Any]:
    """What makes a model this model: hashes of its weights and of its tokenizer."""
    weights = hash_files(folder, ("*.safetensors",))
    if not weights:
        raise UserError(f"{folder} holds no *.safetensors weights; convert the model to safetensors first")
    return {
        "weights": weights,
        "tokenizer": hash_files(
            folder, ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
        ),
    }


def context(config: Config) -> dict[str, Any]:
    """What a reader will want to know of where and how an artifact was made."""
    return {
        "model_path": config.model.path,
        "model_revision": config.model.revision,
        "data": config.data.model_dump(exclude_none=True),
        "engine": config.engine.backend,
        "dtype": config.model.dtype,
        "versions": {
            name: _version(name) for name in ("torch", "transformers", "vllm", "math-verify", "pyarrow")
        },
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def differences(expected: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Name each field in which two identities differ, with both values."""
    lines = []
    for key in sorted(expected.keys() | found.keys()):
        here, there = expected.get(key), found.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            lines += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            lines.append(f"{prefix}{key} is {json.dumps(there)} there and {json.dumps(here)} here")
    return lines
