"""URLs, the local copies that stand for them, and texts that show neither credentials nor the place of a copy."""

import os
import re
from pathlib import Path

from common.errors import UserError

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?!/)(.*)|(file)://(/.*)", re.DOTALL)
"""Also with one slash, as pathlib writes it."""
_HOST_AND_PORT = re.compile(r"[^/:?#]+:[0-9]+(?=/|$)")
_USER_OR_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/\s@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")


def cache() -> Path:
    """The folder of all copies: $ASTAR_PO_CACHE, or astar-po in the user's cache."""
    own = os.environ.get("ASTAR_PO_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.path.realpath(own or Path(user, "astar-po")))


def here(text: str) -> Path:
    """The local path of a path or URL; that of a URL is its copy's.

    Raises UserError, which does not repeat them, for credentials or parameters in a URL.
    """
    if (found := _URL.fullmatch(text)) is None:
        return Path(text)
    if found[3]:
        return Path(found[4])
    scheme, rest = found[1], found[2]
    if "@" not in rest and _HOST_AND_PORT.match(rest):
        raise UserError(
            f"{text} names a host and a port: write {scheme}://bucket/prefix, and set AWS_ENDPOINT_URL to the "
            "address of an S3 store elsewhere"
        )
    if set("@:") & set(rest.partition("/")[0]) or set("?#") & set(rest):
        shown = re.split(r"[?#]", rest.rpartition("@")[2])[0]
        raise UserError(
            f"the URL of {scheme}://{shown} was given with a user, a password or parameters; leave them out: "
            "credentials come from the environment or the store's own files"
        )
    parts = rest.rstrip("/").split("/")
    if not set(parts).isdisjoint({"", ".", ".."}):
        raise UserError(f"{text} is not the URL of a folder or file: write it as {scheme}://bucket/prefix")
    return cache().joinpath(scheme, *parts)


def url_of(path: Path) -> str | None:
    """The URL that a local path stands for; None if it is no copy."""
    folder = cache()
    if not path.is_relative_to(folder) or len(parts := path.relative_to(folder).parts) < 2:
        return None
    return f"{parts[0]}://{'/'.join(parts[1:])}"


def named(path: Path) -> str:
    """The name of a path on every machine: the URL that it stands for, or the absolute path."""
    return url_of(path) or str(path.absolute())


def shown(text: str) -> str:
    """A text with URLs in place of the copies that stand for them, but for logs, which are in the copy alone."""
    folder = str(cache())
    copy = re.escape(folder) + r"/([a-z][a-z0-9+.-]*)/(?!\S*\.log\b)"
    return re.sub(copy, r"\1://", text) if folder in text else text


def without_secrets(text: str) -> str:
    """A text whose URLs have neither users and passwords nor parameters, which may sign a request."""
    return _USER_OR_QUERY.sub(r"\1\2", text)
