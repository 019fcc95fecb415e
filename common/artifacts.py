"""A run's folder, writes that are whole or absent, and what identifies a model.

artifacts/<run>/ is laid out here and nowhere else.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from common.config import Config
from common.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


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
    def completions(self) -> Path:
        """A few of the completions that training saw, a file an evaluation."""
        return self.root / "completions"

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
    """Yield a temporary sibling to write to; give it the final name once it is whole and on disk.

    Raises UserError where the disk is full or the folder cannot be written to; the final name is untouched then.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise UserError(
                f"cannot write {path}: {os.strerror(error.errno)}; what was written before is whole. Make room, "
                "correct the permissions or give another path, and start the command again: it continues from there"
            ) from error
        raise


_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
LEFTOVER_SECONDS = 24 * 3600.0


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers: of dead processes of this machine, and any older than a day."""
    for file in folder.glob(".*.tmp"):
        host, _, process = file.name.removesuffix(".tmp").rpartition(".")
        dead = (
            host.endswith(f".{platform.node()}") and process.isdigit() and not Path("/proc", process).exists()
        )
        with suppress(FileNotFoundError):
            if dead or time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                file.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` (from 1) of `count` of a run's prompts; prompts are dealt out by their content hash."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `2/8`. Raises UserError for anything else."""
        index, _, count = text.partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise UserError(f"--shard {text}: write it as i/n with 1 ≤ i ≤ n, for example 2/8")

    def holds(self, prompt_id: str) -> bool:
        """Whether this shard draws the samples of that prompt."""
        return int(prompt_id[:12], 16) % self.count == self.index - 1

    def overlaps(self, other: "Shard") -> bool:
        """Whether the two can hold the same prompt."""
        return (self.index - other.index) % math.gcd(self.count, other.count) == 0

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard()


@contextmanager
def exclusive_run(paths: RunPaths, job: str, shard: Shard = WHOLE) -> Iterator[None]:
    """Hold a run, or a shard of it, so that two jobs of one kind never do the same work in the same run.

    A job's claim is a locked file, which the kernel unlocks with the process, however that ends. Raises UserError if
    another job holds a shard that overlaps with this one.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        (paths.root / f".{job}.lock").touch()
    except OSError as error:
        raise UserError(
            f"cannot write to {paths.root}: {error.strerror}; correct its permissions, or choose another folder with "
            "ASTAR_PO_ARTIFACTS"
        ) from error
    with ExitStack() as claim:
        with (paths.root / f".{job}.lock").open("a") as one_at_a_time:
            _lock(one_at_a_time, wait=True)
            for path in paths.root.glob(f".{job}-*-of-*.lock"):
                index, count = (int(number) for number in re.findall(r"-(\d+)-of-(\d+)\.lock$", path.name)[0])
                if shard.overlaps(Shard(index, count)):
                    with path.open("a+") as file:
                        _lock(file, wait=False, job=job)
            ours = paths.root / f".{job}-{shard.index}-of-{shard.count}.lock"
            file = claim.enter_context(ours.open("a+"))
            _lock(file, wait=False, job=job)
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
        yield


def _lock(file: IO[str], *, wait: bool, job: str = "") -> None:
    """Lock an open file until it is closed. Raises UserError if another job holds it and this one shall not wait."""
    folder = Path(file.name).parent
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(
            f"another {job} job (process {file.read().strip() or 'unknown'}) is writing to {folder}; "
            "wait for it or choose another --run"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot lock {file.name}: {error.strerror}; two jobs could write to one run. Choose a file system with "
            "locks for it, with ASTAR_PO_ARTIFACTS"
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    """A hash of the names and contents of a folder's files that match any pattern."""
    digest = hashlib.sha256()
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    for file in files:
        digest.update(file.name.encode() + b"\0")
        digest.update(bytes.fromhex(file_digest(file)))
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
