"""Files that are whole or absent, and their contents: atomic writes, syncing, digests."""

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError
from common.lifetime import is_alive
from common.remote.copies import forget, published, published_folder


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to; give it the final name once it is whole and on disk.

    A link is followed: the file that it points to is replaced. Raises UserError if the disk is full, the folder cannot
    be written to, or the path is a folder, a device or a pipe; the final name is then unchanged.
    """
    refuse_unless_file(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = target.with_name(f".{target.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with writing_to(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            with published(temporary, target):
                temporary.replace(target)
            sync(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def refuse_unless_file(path: Path) -> None:
    """Raise UserError if no regular file is or could be at the path, or if it stands for an open stream."""
    if path.absolute().parent in _STREAMS:
        raise UserError(
            f"cannot write {path}: it is a device or an open stream; give the path of a file (`--json`, where a "
            "command has it, prints to standard output)"
        )
    if (obstacle := obstacle_at(path)) is not None:
        raise UserError(f"cannot write {path}: {obstacle}")


def obstacle_at(path: Path) -> str | None:
    """The obstacle to a regular file at this path, with advice; None if a file is or could be there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{meaning(error.errno)}; correct the path or its permissions"
    if stat.S_ISREG(mode):
        return None
    kind = "folder" if stat.S_ISDIR(mode) else "device, a pipe or a socket"
    return f"it is a {kind}; give the path of a file"


def meaning(number: int | None) -> str:
    """The meaning of an error of the file system for the path that was used."""
    return _MEANINGS.get(number) or os.strerror(number or 0)


_MEANINGS: dict[int | None, str] = {
    errno.EEXIST: "a file stands where the path has a folder",
    errno.ENOTDIR: "a file stands where the path has a folder",
    errno.ENOENT: "no file can be made in its folder",
}


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Raise UserError if work in the context fails because the file or folder at `path` can no longer be written.

    Not every library reports a full disk, so a little is written to find out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (cause := _unwritable(error, path)) is None:
            raise
        raise UserError(
            f"cannot write {path}: {cause}; what was written before is whole. Make room, correct the permissions or "
            "give another path, and start the same command again: it continues from there"
        ) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling to fill; it gets the final name once it is whole, in place of a folder that has it.

    Raises UserError if it can no longer be written to; the final name is then unchanged.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing_to(temporary):
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            with published_folder(temporary, folder):
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    forget(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unwritable(error: Exception, path: Path) -> str | None:
    """The reason why nothing more can be written, if that caused the error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (named := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(named[1])
    if number in (None, errno.ENOENT):  # a file may be missing for many reasons
        number = _probe(path if path.is_dir() else path.parent)
    return meaning(number) if number in (*UNWRITABLE, errno.ENOENT) else None


def _probe(folder: Path) -> int | None:
    """The number of the error that writing a little to the folder gives; None if it can be written."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.errno
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
}
"""The errors of a file system that the user can fix."""
_PROBE_BYTES = 2**20
_STREAMS = {Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd")}

FILES_AT_A_TIME = 8
"""Threads that hash files."""

LEFTOVER_SECONDS = 24 * 3600.0


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers: of dead processes of this machine, and any older than a day."""
    for file in folder.glob(".*.tmp"):
        host, _, process = file.name.removesuffix(".tmp").rpartition(".")
        is_ours = host.endswith(f".{platform.node()}") and process.isdigit()
        dead = is_ours and not is_alive(int(process))
        with suppress(FileNotFoundError):
            if dead or time.time() - file.stat().st_mtime > LEFTOVER_SECONDS:
                file.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that others append to, with their line ends; an unfinished last line is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]


def sync(path: Path) -> None:
    """Synchronise a file's content, or a folder's list of names, to disk."""
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
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return joint_hash({file: file_digest(file) for file in files})


def joint_hash(digests: Mapping[Path, str]) -> str:
    """A hash of the names of files and of their digests; empty for none."""
    joint = hashlib.sha256()
    for file in sorted(digests):
        joint.update(file.name.encode() + b"\0")
        joint.update(bytes.fromhex(digests[file]))
    return joint.hexdigest()[:32] if digests else ""
