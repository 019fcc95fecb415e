"""A store for tests: moto's S3 server on the loopback, machines with copies, a proxy that cuts connections.

`python -m tests.object_store ORDER` is a job in a process of its own: it takes the lease of a run, says so, and waits.
"""

import json
import os
import re
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

KEY, SECRET = "AKIDRECOGNISABLE", "a-secret-nobody-may-read"
BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[str]:
    """A server; yields its address. Skips the test where s3fs or moto is not installed."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: make setup-s3")
    server = pytest.importorskip("moto.server", reason="moto is not installed: make setup-s3")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        running.stop()


def environment(address: str) -> dict[str, str]:
    """The environment of a job that uses the server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class Store:
    """What is in the store, seen past the code under test."""

    def __init__(self, address: str, prefix: str) -> None:
        import boto3

        self.address = address
        self.url = f"s3://{BUCKET}/{prefix}"
        self._prefix = f"{prefix}/"
        self._client = boto3.client(
            "s3",
            endpoint_url=address,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def beside(self, name: str) -> "Store":
        """Another prefix."""
        return Store(self.address, f"{self._prefix.rstrip('/')}-{name}")

    def names(self) -> list[str]:
        """The names of all objects below the prefix."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self._prefix)
        return [found["Key"][len(self._prefix) :] for page in pages for found in page.get("Contents", [])]

    def read(self, name: str) -> bytes:
        return bytes(self._client.get_object(Bucket=BUCKET, Key=self._prefix + name)["Body"].read())

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=self._prefix + name, Body=content)

    def remove(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=self._prefix + name)

    def download(self, folder: Path) -> Path:
        """Write all objects to a folder."""
        for name in self.names():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(name))
        return folder


def store_of_test(server: str, test: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A prefix of a test's own, which ASTAR_PO_ARTIFACTS names."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    found = Store(server, re.sub(r"\W+", "-", test))
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", found.url)
    return found


class Machines:
    """Lets a test work on one machine, then on another: each has a copy of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._patch = monkeypatch

    def use(self, name: str) -> Path:
        """Go to a machine, as a new process there would begin; returns the folder of its copies."""
        from common.remote import copies

        self._patch.setenv("ASTAR_PO_CACHE", str(self._folder / name))
        copies._seen.clear()
        copies._fetched.clear()
        return self._folder / name


class CuttingProxy:
    """A TCP proxy that closes all connections once a number of bytes has passed, and refuses new ones until reset."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._left: int | None = None
        self.passed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: int | None) -> None:
        """Cut once so many more bytes have passed; with None, not any more."""
        with self._lock:
            self._left = count

    @property
    def is_cut(self) -> bool:
        return self._left == 0

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self.is_cut:
                return
            with socket.create_connection(self._target) as server:
                other = {client: server, server: client}
                while not self.is_cut:
                    for source in select.select([client, server], [], [], 0.05)[0]:
                        data = source.recv(65536)
                        allowed = self._allow(len(data))
                        other[source].sendall(data[:allowed])
                        if not data or allowed < len(data):
                            return

    def _allow(self, count: int) -> int:
        with self._lock:
            if self._left is not None:
                count = min(count, self._left)
                self._left -= count
            self.passed += count
            return count


def holding_job(order: dict[str, Any]) -> None:
    from common.runs import exclusive_run, run_paths

    with exclusive_run(run_paths(order["run"]), order["job"]):
        print("holding", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    os.environ |= json.loads(sys.argv[1]).get("environment", {})
    holding_job(json.loads(sys.argv[1]))
