"""Files that are whole or absent, and what they contain: atomic writes, syncing, digests."""

import errno
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError


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


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that others append to, with their ends; one that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
