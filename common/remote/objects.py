"""The objects of a store: list, read, put, put if unchanged, remove.

The store's own library retries after transient errors, with growing pauses. A version is what the store
gives an object when it is put: its ETag, generation or the like.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import UserError, first_line
from common.packages import refuse_missing
from common.remote.places import without_secrets

ONE_PUT = 2**30
"""Bytes of the largest file that is compared and stored by a single request; it is in memory then."""
_IN_MEMORY = 2**26
"""Bytes of the largest file that is stored from memory without need."""

_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "make setup-s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", ".venv/bin/pip install gcsfs")),
}
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "oid", "md5Hash")
"""The names under which fsspec's file systems give a version, the best first; else it is time and size."""
_TIMES = ("LastModified", "updated", "mtime", "created")
_LIBRARIES = {
    *(
        "aiobotocore",
        "aiohttp",
        "botocore",
        "fsspec",
        "gcsfs",
        "google",
        "httpx",
        "huggingface_hub",
        "requests",
    ),
    *("s3fs", "urllib3"),
}
"""Libraries whose exceptions say that a store cannot be reached, or refuses."""
_LOST = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404"}


class ChangedMeanwhile(UserError):
    """Another job has replaced or removed an object since this one read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An object in a listing."""

    version: str
    size: int
    """Bytes."""
    modified: float
    """Seconds since the epoch by the store's clock; 0 if it does not say."""


def listing(url: str) -> dict[str, Listed]:
    """The objects below a URL, by the rest of their names; for that of an object itself, only it, by ""."""
    with _reaching(url) as (files, path):
        files.invalidate_cache()
        try:
            found = files.find(path, detail=True)
        except FileNotFoundError:
            return {}
    below = {
        name: info
        for name, info in found.items()
        if info["type"] == "file" and (name == path or name.startswith(f"{path}/"))
    }
    return {name[len(path) + 1 :]: _listed(info) for name, info in below.items()}


def get(url: str, target: Path) -> bool:
    """Copy an object to a local file; False if there is none."""
    with _reaching(url) as (files, path):
        try:
            files.get_file(path, str(target))
        except FileNotFoundError:
            return False
    return True


def read(url: str) -> bytes | None:
    """The content of an object; None if there is none."""
    with _reaching(url) as (files, path):
        try:
            return bytes(files.cat_file(path))
        except FileNotFoundError:
            return None


def put(url: str, source: Path) -> str:
    """Store a file, whole or not at all, in place of an object that is there; returns its version."""
    with _reaching(url) as (files, path):
        if source.stat().st_size > _IN_MEMORY:
            files.put_file(str(source), path)
            return _listed(files.info(path)).version
        return _piped(files, path, source.read_bytes())


def replace(url: str, source: Path, seen: str | None) -> str:
    """Store a file in place of the version `seen`, or as a new object if that is None; returns its version.

    Raises ChangedMeanwhile if there is another version, or none, and leaves that as it is.
    """
    if source.stat().st_size <= ONE_PUT:
        return write(url, source.read_bytes(), seen)
    _refuse_changed(url, seen)
    return put(url, source)


def write(url: str, content: bytes, seen: str | None) -> str:
    """Like `replace`, with a content of at most ONE_PUT bytes. S3 compares the versions, for other stores we do."""
    with _reaching(url) as (files, path):
        if not _is_s3(url):
            _refuse_changed(url, seen)
            return _piped(files, path, content)
        condition = {"mode": "create"} if seen is None else {"IfMatch": seen}
        try:
            return _piped(files, path, content, **condition, chunksize=ONE_PUT)
        except Exception as error:
            if not _is_lost_race(error):
                raise
            # The first try of a request that was repeated may have succeeded.
            if read(url) != content:
                raise _changed(url) from error
            return _listed(files.info(path)).version


def copy(source: str, target: str) -> None:
    """Copy an object inside a store."""
    with _reaching(source) as (files, path), suppress(FileNotFoundError):
        files.cp_file(path, files._strip_protocol(target))


def remove(urls: Sequence[str]) -> None:
    """Remove objects, one after the other; those that are not there do not matter."""
    for url in urls:
        with _reaching(url) as (files, path), suppress(FileNotFoundError):
            files.rm_file(path)


@contextmanager
def _reaching(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and its path there. Raises UserError if the store cannot be reached, or refuses."""
    scheme = url.partition("://")[0]
    if scheme in _PACKAGES:
        package, remedy = _PACKAGES[scheme]
        refuse_missing(package, f"{url} is in an object store", remedy)
    import fsspec

    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {url}: {first_line(error)}") from error
    try:
        yield files, files._strip_protocol(url)
    except UserError:
        raise
    except Exception as error:
        if not _is_of_store(error):
            raise
        raise UserError(
            f"cannot reach {url}: {without_secrets(first_line(error))}; check connection, credentials and URL, and "
            "start the same command again: it continues from what the store has"
        ) from error


def _is_of_store(error: Exception) -> bool:
    """Whether the store is the cause, and not for example the local disk."""
    if isinstance(error, OSError):
        return error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, ValueError):  # an AWS_ENDPOINT_URL that is no URL
        return True
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def _is_lost_race(error: Exception) -> bool:
    cause = error if hasattr(error, "response") else error.__cause__
    response = getattr(cause, "response", None) or {}
    return isinstance(error, FileExistsError) or response.get("Error", {}).get("Code") in _LOST


def _changed(url: str) -> ChangedMeanwhile:
    return ChangedMeanwhile(
        f"another job has changed {url} since this one read it: nothing was overwritten; start the same command again, "
        "and it works on what is there now"
    )


def _refuse_changed(url: str, seen: str | None) -> None:
    current = listing(url).get("")
    if (current and current.version) != seen:
        raise _changed(url)


def _is_s3(url: str) -> bool:
    """Whether the store compares an object's version while it replaces it."""
    return url.startswith(("s3://", "s3a://"))


def _piped(files: Any, path: str, content: bytes, **options: Any) -> str:
    answer = files.pipe_file(path, content, **options)
    return _listed(answer if isinstance(answer, dict) and "ETag" in answer else files.info(path)).version


def _listed(info: dict[str, Any]) -> Listed:
    size = int(info.get("size") or 0)
    modified = _seconds(next((info[name] for name in _TIMES if info.get(name)), 0))
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), f"{modified} {size}")
    return Listed(version=version, size=size, modified=modified)


def _seconds(time: Any) -> float:
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)
