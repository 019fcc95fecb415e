"""Training at s3://: the checkpoints of one machine continue on another, and no cut of the connection changes a result."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.runs import RunPaths
from stage2_train.config import Config
from tests.killing import JobServer
from tests.object_store import CuttingProxy, Machines, Store, environment, s3_server
from tests.stage2_runs import tiny_config, write_tiny_vstar
from tests.test_resume import assert_same

CUTS = 30


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[CuttingProxy]:
    found = CuttingProxy(server)
    yield found
    found.close()


@pytest.fixture(scope="module")
def jobs(proxy: CuttingProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(proxy.address), "AWS_MAX_ATTEMPTS": "1"}.items():
            patch.setenv(name, value)
        with JobServer(tmp_path_factory.mktemp("jobs"), "tests.training_jobs") as found:
            yield found


@pytest.fixture
def store(
    server: str, proxy: CuttingProxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A prefix of this test's own, behind the proxy."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    for name, value in {**environment(proxy.address), "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    proxy.cut_after(None)
    return Store(server, request.node.name.replace("_", "-"))


@pytest.fixture
def machines(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(tmp_path / "machines", monkeypatch)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Config:
    train = {"iterations": 4, "checkpoint_every": 1, "evaluate_every": 2}
    return tiny_config(
        tmp_path, tiny_model, train=train, engine={"backend": "transformers"}, grader={"workers": 1}
    )


Train = Callable[..., int]


@pytest.fixture
def train(jobs: JobServer, config: Config, tmp_path: Path) -> Train:
    """Train in the artifacts of that place, as a new process on a machine; returns the wait status."""

    def start(artifacts: str, vstar: str, machine: str = "first", **order: Any) -> int:
        order |= {"program": "train", "processes": 1, "artifacts": artifacts, "vstar": vstar}
        order["environment"] = {"ASTAR_PO_CACHE": str(tmp_path / "machines" / machine)}
        return jobs.run(config.model_dump(mode="json"), **order)

    return start


def test_training_continues_on_another_machine_bit_for_bit(
    train: Train, config: Config, store: Store, tmp_path: Path
) -> None:
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    assert train(str(tmp_path / "folder"), str(tmp_path / "vstar.parquet")) == 0
    store.put("tables/vstar.parquet", (tmp_path / "vstar.parquet").read_bytes())
    remote = (store.url, f"{store.url}/tables/vstar.parquet")
    assert train(*remote, killed_after=3) == signal.SIGKILL
    assert "tiny/checkpoints/iteration-000002/manifest.json" in store.names()
    [lease] = [name for name in store.names() if ".leases" in name]
    store.remove(lease)  # as if its time had passed
    assert train(*remote, "second") == 0
    whole = RunPaths(tmp_path / "folder" / "tiny")
    assert_same(RunPaths(store.download(tmp_path / "store") / "tiny"), whole)
    before = store.names()
    assert train(*remote, "third") == 0, "a finished run does nothing"
    assert store.names() == before
    assert not any(".tmp" in name or ".leases" in name for name in before)
