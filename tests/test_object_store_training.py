"""Training at s3://: one machine continues from another's checkpoint, and no cut connection changes a result."""

import hashlib
import itertools
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.errors import UserError
from common.runs import RunPaths
from common.sampling import writer
from common.store import sample_files
from common.vstar_file import read_vstar
from stage2_train.checkpoint import MANIFEST, damage
from stage2_train.config import Config
from tests import warm
from tests.conftest import ROOT
from tests.fakes import ScriptedEngine
from tests.killing import JobServer
from tests.object_store import KEY, SECRET, CuttingProxy, Machines, Store, environment
from tests.stage1_runs import Engines, run
from tests.stage2_runs import NUM_SAMPLES, as_toml, tiny_config, write_tiny_vstar
from tests.test_resume import assert_same

PROMPTS = 32


@pytest.fixture(scope="module")
def proxy(s3_address: str) -> Iterator[CuttingProxy]:
    found = CuttingProxy(s3_address)
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
    s3_address: str, proxy: CuttingProxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A prefix of this test's own, behind the proxy."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    for name, value in {**environment(proxy.address), "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    proxy.cut_after(None)
    return Store(s3_address, re.sub(r"\W+", "-", request.node.name))


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


def assert_evaluated(config: Config, store: Store, folder: Path) -> None:
    """`evaluate` and `report` on a machine that has nothing yet; no file there contains a secret."""
    (folder / "run.toml").write_text(as_toml(config), encoding="utf-8")
    changed = {"ASTAR_PO_ARTIFACTS": store.url, "ASTAR_PO_CACHE": str(folder / "machines" / "fourth")}
    for command in (["evaluate", "--config", str(folder / "run.toml")], ["report", "--run", "tiny"]):
        result = warm.run([ROOT / "cli.py", *command], env={**os.environ, **changed}, timeout=300)
        assert result.returncode == 0, result.stderr
        assert str(folder / "machines") not in result.stdout + result.stderr
    assert {"tiny/evaluations/results.json", "tiny/report/report.html"} < set(store.names())
    for file in [*store.download(folder / "all").rglob("*"), *(folder / "machines").rglob("*")]:
        assert not file.is_file() or not re.search(f"{KEY}|{SECRET}".encode(), file.read_bytes()), file


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
    assert_evaluated(config, store, tmp_path)


@pytest.fixture
def engines(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Engines:
    """Stage 1 draws from a scripted engine."""
    scripted = Engines()
    monkeypatch.setattr("tests.stage1_runs.engine_builder", scripted.build)
    return scripted


def addresses(folder: Path) -> list[tuple[str, int]]:
    files = sample_files(folder)
    return [
        row for file in files for row in pl.read_parquet(file).select("prompt_id", "sample_index").iter_rows()
    ]


class Witness:
    """Looks at what is in the store after each cut: nothing half, nothing lost, nothing twice."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._looks = 0
        self._samples: set[tuple[str, int]] = set()
        self._newest = ""

    def look(self) -> RunPaths:
        """The run as it is in the store; fails if it has less than at the last look."""
        self._looks += 1
        paths = RunPaths(self._store.download(self._folder / str(self._looks)) / "tiny")
        for file in sample_files(paths.samples):
            assert file.stem.removeprefix("part-") == hashlib.sha256(file.read_bytes()).hexdigest()
        there = addresses(paths.samples)
        assert len(there) == len(set(there)), "a sample was drawn twice"
        assert self._samples <= set(there), "a sample was lost"
        self._samples = set(there)
        if paths.vstar.exists():
            assert read_vstar(paths.vstar)[0].height == PROMPTS
        whole = [seal.parent for seal in sorted(paths.checkpoints.glob(f"iteration-*/{MANIFEST}"))]
        assert [damage(checkpoint) for checkpoint in whole] == [None] * len(whole)
        newest = whole[-1].name if whole else ""
        assert newest >= self._newest, "a checkpoint was lost"
        self._newest = newest
        return paths


@pytest.mark.parametrize("cuts", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_a_connection_cut_at_random_points_costs_nothing_but_time(
    train: Train,
    config: Config,
    engines: Engines,
    machines: Machines,
    store: Store,
    proxy: CuttingProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuts: int,
) -> None:
    monkeypatch.setattr(writer, "FRAGMENT_SAMPLES", 10)

    def stage1(artifacts: str, machine: str) -> bool:
        """Whether it came to its end."""
        monkeypatch.setenv("ASTAR_PO_ARTIFACTS", artifacts)
        machines.use(machine)
        engines.next = ScriptedEngine()
        with suppress(UserError):
            run(config)
            return True
        assert proxy.is_cut, "it failed for another reason"
        return False

    def stage2(artifacts: str, machine: str) -> bool:
        return train(artifacts, f"{artifacts}/tiny/vstar.parquet", machine) == 0

    stages = (stage1, stage2)
    assert all(stage(str(tmp_path / "folder"), "none") for stage in stages)
    traffic = [proxy.passed]
    for stage in stages:
        assert stage(store.beside("whole").url, "whole")
        traffic.append(proxy.passed)
    totals = [after - before for before, after in itertools.pairwise(traffic)]
    points, folder = random.Random(0), RunPaths(tmp_path / "folder" / "tiny")
    done = courses = 0
    while done < cuts:
        courses += 1
        course = store.beside(str(courses))
        witness = Witness(course, tmp_path / f"looks-{courses}")
        for stage, total in zip(stages, totals, strict=True):
            has_ended = False
            while not has_ended:
                proxy.cut_after(points.randint(0, total) if done < cuts else None)
                has_ended = stage(course.url, points.choice(["first", "second"]))
                done += proxy.is_cut
                proxy.cut_after(None)
                for name in course.names():
                    if ".leases" in name:
                        course.remove(name)  # as if its time had passed
                found = witness.look()
        assert_same(found, folder)
        assert read_vstar(found.vstar)[0].equals(read_vstar(folder.vstar)[0])
        assert sorted(addresses(found.samples)) == sorted(addresses(folder.samples))
        assert len(addresses(found.samples)) == PROMPTS * NUM_SAMPLES
