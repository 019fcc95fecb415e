"""The local copy of files at a URL: fetch what the store lists, put files there before they get their name here.

A copied file's modification time is no time: it is a hash of the version that the store has.
"""

import errno
import hashlib
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from common.remote import leases, objects
from common.remote.objects import Listed
from common.remote.places import cache, here, named, url_of

THREADS = 8

_NAMED_BY_CONTENT = re.compile(r"(?:part|grades)-[0-9a-f]{64}\.parquet")
_FETCHED_WHEN_READ = re.compile(r"(?:part|grades)-.*\.parquet|.*\.(?:safetensors|bin|pt|npy)")
_WITH_SEAL = re.compile(
    r"((?:runs/[^/]+/)?(?:checkpoints/iteration-\d+|exported/\d+|model|critic|base_model))/.*"
)
"""The names, relative to a run or a study, in folders that exist once their last file, the seal, is there."""
_NOT_SHARED = re.compile(r".*\.log|tensorboard|loadable_model")
_UNFINISHED = re.compile(r"\..*\.tmp")
"""The names of folders that are being filled: they are stored whole, when they are."""
_DAMAGED = "damaged"

_seen: dict[str, str] = {}
"""By URL, the version that this process has read or written."""
_fetched: set[tuple[Path, bool]] = set()


def given(text: str) -> Path:
    """The local path of a path or URL that a user has given, for typer; of a URL's file or folder, a fresh copy."""
    return fetched(here(text))


def fetched(path: Path, *, whole: bool = False, again: bool = False) -> Path:
    """Make the copy of a file or folder equal to the store's listing, once in this process or `again`.

    Samples, weights and checkpoints' tensors are fetched only if it is to be `whole`. Raises UserError.
    """
    if (url := url_of(path)) is None:
        return path
    if again:
        _fetched.difference_update([each for each in _fetched if each[0].is_relative_to(path)])
    if (path, whole) not in _fetched:
        _fetch(path, url, whole)
        _fetched.add((path, whole))
    return path


def fetched_anew(path: Path) -> Path:
    """Replace the copy of a file or folder, which is damaged."""
    if url_of(path) is not None:
        for file in [path] if path.is_file() else list(_files(path)):
            file.unlink(missing_ok=True)
        fetched(path, whole=True, again=True)
    return path


@contextmanager
def published(temporary: Path, target: Path) -> Iterator[None]:
    """Store a finished file, then let the context give it the name `target`.

    Raises UserError if another job has changed the file since this process read it, or the store cannot be reached.
    """
    url = url_of(target)
    if url is None or target.name.startswith(".") or any(map(_UNFINISHED.fullmatch, target.parts)):
        yield
        return
    leases.refuse_void(url)
    with _lock():
        if _NAMED_BY_CONTENT.fullmatch(target.name):
            version = objects.put(url, temporary)
        else:
            version = objects.replace(url, temporary, _version_seen(target, url))
        _note(url, temporary, version)
        yield


@contextmanager
def published_folder(temporary: Path, folder: Path) -> Iterator[None]:
    """Store a finished folder in place of one that is there, then let the context give it the name `folder`.

    In the store it does not exist until its last file is there. Raises UserError if the store cannot be reached.
    """
    if (url := url_of(folder)) is None:
        yield
        return
    leases.refuse_void(url)
    seal = _seal(folder)
    names = sorted(str(file.relative_to(temporary)) for file in _files(temporary))
    others = [name for name in names if name != seal]
    forget(folder, keep=others)

    def put(name: str) -> None:
        place = f"{url}/{name}"
        _note(place, temporary / name, objects.put(place, temporary / name))

    _in_threads(put, others)
    with _lock():
        for name in set(names).difference(others):
            put(name)
        yield


def forget(path: Path, *, keep: Iterable[str] = ()) -> None:
    """Remove a file or folder from the store, its last file first, but for the names to `keep`."""
    if (url := url_of(path)) is None:
        return
    leases.refuse_void(url)
    seal = _seal(path)
    names = sorted(objects.listing(url), key=lambda name: (name != seal, name))
    gone = [f"{url}/{name}".rstrip("/") for name in names if name not in set(keep)]
    objects.remove(gone)
    for each in gone:
        _seen.pop(each, None)


def forget_unfinished(folder: Path) -> None:
    """Remove the folders of a run's folder in the store that lack their last file, because their writer was killed."""
    if (url := url_of(folder)) is None:
        return
    names = {f"{folder.name}/{name}" for name in objects.listing(url)}
    unfinished = (name for name in names if _DAMAGED not in name.split("/") and not _is_there(name, names))
    objects.remove([f"{url.rpartition('/')[0]}/{name}" for name in sorted(unfinished)])


def modified(path: Path) -> float:
    """When a file was last written, in seconds since the epoch. Raises OSError or UserError if it is not there."""
    if (url := url_of(path)) is None:
        return path.stat().st_mtime
    if (found := objects.listing(url).get("")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return found.modified


def renamed(source: Path, target: Path) -> None:
    """Move a file or folder in the store, as the caller moves its copy."""
    if (url := url_of(source)) is None:
        return
    for name in objects.listing(url):
        objects.copy(f"{url}/{name}".rstrip("/"), f"{named(target)}/{name}".rstrip("/"))
    forget(source)


def _version_seen(file: Path, url: str) -> str | None:
    """The version that this process has read or written, None for none; of a file that it never looked for, today's."""
    if url not in _seen and not any(file.is_relative_to(path) for path, _ in _fetched):
        found = objects.listing(url).get("")
        return None if found is None else found.version
    return _seen.get(url)


def _fetch(path: Path, url: str, whole: bool) -> None:
    with _lock():
        listed = objects.listing(url)
        missing = {}
        for name, found in listed.items():
            if not _is_there(name, listed):
                continue
            file, place = path / name, f"{url}/{name}".rstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            _seen[place] = found.version
            if not _is_current(file, found) and (whole or not _FETCHED_WHEN_READ.fullmatch(file.name)):
                missing[place] = (file, found, _state(file))
        for place in [each for each in _seen if each == url or each.startswith(f"{url}/")]:
            if place[len(url) + 1 :] not in listed:
                del _seen[place]
        for file in [path] if path.is_file() else list(_files(path)):
            name = "" if file == path else str(file.relative_to(path))
            if name not in listed:
                _remove_copy(file, path)
    _in_threads(lambda place: _download(place, *missing[place]), missing)


def _download(url: str, file: Path, found: Listed, before: tuple[int, int] | None) -> None:
    """Fetch an object, unless another process has put a newer one in its copy's place meanwhile."""
    temporary = file.with_name(f".{file.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        if not objects.get(url, temporary):
            return  # it has been removed since it was listed
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        if temporary.stat().st_size == found.size:  # otherwise it is a newer version, to be fetched again
            _stamp(temporary, found.version)
        with _lock():
            if _state(file) == before:
                temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_copy(file: Path, root: Path) -> None:
    """Remove a file that the store does not list, and the folders that this leaves empty."""
    file.unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        for folder in file.parents[: len(file.parts) - len(root.parts)]:
            folder.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, but for hidden ones and those that are not shared."""
    for place, folders, files in os.walk(folder):
        folders[:] = filter(_is_shared, folders)
        yield from (Path(place, name) for name in filter(_is_shared, files))


def _is_shared(name: str) -> bool:
    """Whether a file or folder of this name is the same on all machines."""
    return name[0] != "." and _NOT_SHARED.fullmatch(name) is None


def _is_there(name: str, names: Collection[str]) -> bool:
    """Whether an object is part of the run: not hidden, not set aside, in no folder whose last file is missing."""
    parts = name.split("/") if name else []
    if not all(map(_is_shared, parts)) or _DAMAGED in parts:
        return False
    found = _WITH_SEAL.fullmatch(name)
    return found is None or f"{found[1]}/{_seal(Path(found[1]))}" in names


def _seal(folder: Path) -> str:
    """The file of a folder that is put last and removed first."""
    if folder.parent.name == "checkpoints":
        return "manifest.json"
    is_our_model = folder.name in ("model", "critic") or folder.parent.name == "exported"
    return "astar_po.json" if is_our_model else "config.json"


def _is_current(file: Path, found: Listed) -> bool:
    return _state(file) == (found.size, _number(found.version))


def _state(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _note(url: str, file: Path, version: str) -> None:
    _seen[url] = version
    _stamp(file, version)


def _stamp(file: Path, version: str) -> None:
    os.utime(file, ns=(_number(version), _number(version)))


def _number(version: str) -> int:
    """A version as a time in nanoseconds, between 2001 and 2033."""
    return 10**18 + int.from_bytes(hashlib.sha256(version.encode()).digest()[:8]) % 10**18


def _in_threads(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, names))


def _lock() -> FileLock:
    """Orders the changes of this machine's processes."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / ".lock", fallback_to_soft=False)
