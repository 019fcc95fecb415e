"""Leases: one job at a time holds a run at a URL, or a part of it, wherever the jobs are.

A lease is an object <run>/.leases/<part>.<id>.json that its job renews. Each job first puts its own, then looks for
others: of two jobs that come at the same time, at least one sees the other. If both do, both give way, and ask again
after random times: a lease says whether its job holds the run or only asks for it. Ages are differences between the
times that the store gives its objects, so the clocks of the machines do not matter.
"""

import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

from common.errors import UserError
from common.remote import objects
from common.remote.objects import ChangedMeanwhile
from common.remote.places import cache, url_of

SECONDS = 60.0
"""The time after which a lease that was not renewed is void."""
RENEWALS = 4
"""Renewals in that time."""
ATTEMPTS = 8
"""How often a job asks for a run that others ask for."""
PAUSE_SECONDS = 1.0
"""The longest time before it asks again, after the first attempt; after the second twice as long, and so on."""
FOLDER = ".leases"


@contextmanager
def leased(root: Path, job: str, part: str, is_rival: Callable[[str], bool]) -> Iterator[None]:
    """Hold a part of the run whose copy is at `root`. Raises UserError if another job holds a rival part.

    The caller holds the same part of the copy by a lock of the kernel, so a lease that came from this copy is void.
    """
    if (run := url_of(root)) is None:
        yield
        return
    lease = _Lease(run, part)
    try:
        lease.claim(job, is_rival)
        with lease.renewed():
            yield
    finally:
        with suppress(UserError):  # it ends by itself
            lease.remove()


def refuse_void(url: str) -> None:
    """Raise UserError if this process held the run of that URL, and another may hold it now."""
    for lease in list(_held):
        if url.startswith(f"{lease.run}/"):
            lease.ensure()


_held: list["_Lease"] = []


class _Lease:
    def __init__(self, run: str, part: str) -> None:
        self.run = run
        self.url = f"{run}/{FOLDER}/{part}.{uuid.uuid4().hex}.json"
        self._note = {"holder": f"{os.getpid()} on {platform.node()}", "copy": copy_id(), "is_held": False}
        self._version: str | None = None
        self._since = 0.0
        self._is_lost = False
        self._lock = threading.Lock()

    def claim(self, job: str, is_rival: Callable[[str], bool]) -> None:
        """Raise UserError if another job holds a rival part; void leases of rivals are removed."""
        self.renew()
        attempts = 1
        while (
            (rival := self._rival(is_rival)) is not None and not rival.get("is_held") and attempts < ATTEMPTS
        ):
            self.remove()
            sleep(random.SystemRandom().uniform(0, attempts * PAUSE_SECONDS))
            self.renew()
            attempts += 1
        if rival is None:
            self._note["is_held"] = True
            self.renew()
            return
        raise UserError(
            f"another {job} job (process {rival.get('holder', 'unknown')}) is writing to {self.run}; wait for it or "
            f"choose another --run. If it was killed, its claim ends {SECONDS:g} seconds after that"
        )

    def _rival(self, is_rival: Callable[[str], bool]) -> dict[str, Any] | None:
        """What the lease of a rival says, one that holds the run if there is one; removes void ones."""
        found = objects.listing(f"{self.run}/{FOLDER}")
        now = found[self.url.rpartition("/")[2]].modified
        rival: dict[str, Any] | None = None
        for name, other in found.items():
            url = f"{self.run}/{FOLDER}/{name}"
            if url == self.url or not is_rival(name.split(".")[0]):
                continue
            if (note := _note(url)) is None:
                continue  # it has just given way
            if note.get("copy") != self._note["copy"] and now - other.modified <= SECONDS:
                rival = note if rival is None or note.get("is_held") else rival
            else:
                objects.remove([url])
        return rival

    def renew(self) -> None:
        """Put the lease again. Raises UserError if the store cannot be reached, or has it no more."""
        with self._lock:
            before = _clock()
            content = json.dumps({**self._note, "renewed": time.time()}).encode()
            try:
                self._version = self._put(content)
            except ChangedMeanwhile:
                self._is_lost = True
                raise
            self._since = before

    def _put(self, content: bytes) -> str:
        """Put the lease in place of the last one; returns its version. Raises ChangedMeanwhile if it is not there.

        Others only remove it: another version is a renewal of this job whose answer was lost.
        """
        try:
            return objects.write(self.url, content, self._version)
        except ChangedMeanwhile:
            if (found := objects.listing(self.url).get("")) is None:
                raise
            return objects.write(self.url, content, found.version)

    def remove(self) -> None:
        """Remove the lease, if it was ever stored."""
        if self._version is not None:
            objects.remove([self.url])
            self._version = None

    def ensure(self) -> None:
        """Raise UserError if the lease is void or has been removed."""
        try:
            if not self._is_lost and _clock() - self._since > SECONDS:
                self.renew()
        except ChangedMeanwhile:
            pass
        if self._is_lost:
            raise UserError(
                f"this job had no connection to {self.run} for more than {SECONDS:g} seconds, and another job has "
                "taken the run over; wait for that one, or start the same command again when it has ended"
            )

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease in a thread until the context ends."""
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(SECONDS / RENEWALS) and not self._is_lost:
                with suppress(UserError):  # the next time, or `ensure` says so
                    self.renew()

        thread = threading.Thread(target=keep, name=f"lease of {self.run}", daemon=True)
        _held.append(self)
        thread.start()
        try:
            yield
        finally:
            _held.remove(self)
            ended.set()
            thread.join()


def _clock() -> float:
    """Seconds, with those for which the machine was suspended where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _note(url: str) -> dict[str, Any] | None:
    """The content of a lease; None if it has just been removed."""
    content = objects.read(url)
    return None if content is None else dict(json.loads(content))


def copy_id() -> str:
    """A name that only this machine's copies have."""
    file = cache() / ".id"
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        temporary = file.with_name(f".id.{os.getpid()}")
        temporary.write_text(uuid.uuid4().hex, encoding="ascii")
        try:
            os.link(temporary, file)
        finally:
            temporary.unlink()
    return file.read_text(encoding="ascii")
