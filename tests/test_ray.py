"""Engines on a Ray cluster: what is drawn, and what is lost with an actor, or with the whole cluster."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from common.config import EngineConfig
from common.engines.fleet import EngineFleet
from common.errors import UserError
from common.runs import REPOSITORY
from tests.conftest import RunCli
from tests.fakes import tiny_config
from tests.fleet_engines import number_engine
from tests.stage1_runs import write_questions
from tests.stage2_runs import as_toml
from tests.test_fleet import ENGINE, drawn, pids
from tests.test_placement import OWN, Killer, assert_same_training, configured, trained

ray = pytest.importorskip("ray", reason="ray is not installed: make setup-ray")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine with two cores."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def fleet(cluster: None, tmp_path: Path) -> Iterator[EngineFleet]:
    from common.engines.ray_workers import RayWeights, RayWorker

    build = partial(number_engine, tmp_path, 0.002)
    fleet = EngineFleet(
        lambda _: RayWorker(build, num_cpus=1),
        2,
        engine=ENGINE,
        share=RayWeights.put,
    )
    deadline = time.monotonic() + 120
    while len(drawn(fleet, 100)) < 2:
        assert time.monotonic() < deadline
    yield fleet
    fleet.close()


def test_actors_share_the_requests_and_get_new_weights(fleet: EngineFleet, tmp_path: Path) -> None:
    assert drawn(fleet, 200) == {str(pid) for pid in pids(tmp_path)}
    shared = torch.full((4,), 0.5)
    fleet.load_weights(iter([("a", shared), ("tied", shared)]))
    drawn(fleet, 200, 4)
    fleet.sleep()
    assert len(pids(tmp_path, "asleep")) == 2


@pytest.mark.parametrize("how", ["die", "fail"])
def test_an_actor_that_is_lost_is_replaced_and_its_requests_are_drawn(
    fleet: EngineFleet, tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    fleet.load_weights(iter([("a", torch.tensor([3.0]))]))
    (tmp_path / f"{how}-10").touch()
    deadline = time.monotonic() + 120
    while drawn(fleet, 200, 3) and len(pids(tmp_path, "loaded-3")) < 3:
        assert time.monotonic() < deadline
    said = capfd.readouterr().err
    assert "of 2 is lost (" in said if how == "die" else "out of luck" in said


JOB = """
import sys
from functools import partial
from pathlib import Path
import ray
from common.engines import fleet as fleets
from common.engines.ray_workers import RayWeights, RayWorker, _own_node_is_lost
from common.errors import UserError
from tests.conftest import RunCli
from tests.fakes import tiny_config
from tests.fleet_engines import number_engine
from tests.stage1_runs import write_questions
from tests.stage2_runs import as_toml
from tests.test_fleet import ENGINE, SAMPLING, requests
fleets.WATCH_SECONDS = 1.0
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
         runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
build = partial(number_engine, Path(sys.argv[1]), 0.01)
fleet = fleets.EngineFleet(lambda _: RayWorker(build, num_cpus=1), 2, engine=ENGINE, share=RayWeights.put,
                           hopeless=_own_node_is_lost)
try:
    for number, completion in enumerate(fleet.generate(requests(10**6), SAMPLING)):
        if number == 50:
            print("drawing", flush=True)
except UserError as error:
    print(error, flush=True)
"""


def test_a_job_whose_node_is_lost_ends_with_a_line(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path), str(REPOSITORY)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == "drawing\n"
            for process in psutil.Process(job.pid).children(recursive=True):
                if process.name() == "raylet":
                    process.kill()
            said, _ = job.communicate(timeout=120)
        finally:
            job.kill()
    assert "the Ray node that this job belongs to is lost; start the job again" in said


def test_an_address_without_a_cluster_is_refused(run_cli: RunCli, tmp_path: Path, tiny_model: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    (tmp_path / "run.toml").write_text(as_toml(tiny_config(tiny_model, data)))
    finished = run_cli("vstar", "--config", "run.toml", "--executor", "ray", "--address", "127.0.0.1:1")
    assert finished.returncode == 2
    assert "--address 127.0.0.1:1: there is no Ray cluster to connect to" in finished.stderr
    finished = run_cli("vstar", "--config", "run.toml", "--address", "127.0.0.1:1")
    assert finished.returncode == 2
    assert "--address 127.0.0.1:1 is that of a Ray cluster; give --executor ray with it" in finished.stderr


@pytest.mark.parametrize(
    ("engines", "ranks", "each"), [("auto", 1, 1), ("auto", 2, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)]
)
def test_the_ranks_of_training_share_the_engines(
    cluster: None, engines: int | str, ranks: int, each: int
) -> None:
    from common.engines.ray_workers import _beside_trainer

    assert _beside_trainer(EngineConfig.model_validate({"engines": engines}), ranks) == each
    if engines != "auto":
        with pytest.raises(UserError, match=r"engine.engines [24] cannot be divided among the 3 processes"):
            _beside_trainer(EngineConfig.model_validate({"engines": engines}), 3)


Nodes = Sequence[dict[str, float]]


def of(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cluster have these nodes, and one that is lost."""
    found = [{"Alive": True, "Resources": node} for node in nodes]
    lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*found, lost])


@pytest.mark.parametrize(
    ("nodes", "size", "engines", "resources"),
    [
        ([{"CPU": 8}], 1, 2, {"num_cpus": 4}),
        ([{"CPU": 8}], 1, 20, {"num_cpus": 1}),
        ([{"CPU": 2}, {"CPU": 2}], 1, 1, {"num_cpus": 2}),  # not 4, which no node has
        ([{"CPU": 8}, {"CPU": 2}], 1, 2, {"num_cpus": 4}),
        ([{"CPU": 8}, {"CPU": 6}], 1, 3, {"num_cpus": 4}),
        ([{}, {"CPU": 2}], 1, 1, {"num_cpus": 2}),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 4}], 4, 1, {"num_gpus": 4, "num_cpus": 1}),
    ],
)
def test_an_engine_asks_for_what_one_node_has(
    monkeypatch: pytest.MonkeyPatch, nodes: Nodes, size: int, engines: int, resources: dict[str, int]
) -> None:
    from common.engines.ray_workers import _resources

    of(nodes, monkeypatch)
    assert _resources(EngineConfig(tensor_parallel_size=size), engines) == resources


def test_an_engine_of_more_gpus_than_a_node_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.engines.ray_workers import _resources

    of([{"CPU": 8, "GPU": 2}] * 4, monkeypatch)
    with pytest.raises(
        UserError, match=r"tensor_parallel_size 4: no node of the Ray cluster has as many GPUs"
    ):
        _resources(EngineConfig(tensor_parallel_size=4), 2)


@pytest.mark.parametrize(
    ("nodes", "size", "engines"),
    [
        ([{"GPU": 8}, {"GPU": 8}], 1, 16),
        ([{"GPU": 3}, {"GPU": 3}], 2, 2),
        ([{"CPU": 4}, {"CPU": 4}], 1, 8),
    ],
)
def test_a_cluster_is_used_as_far_as_its_nodes_have_room(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    size: int,
    engines: int,
) -> None:
    from common.engines.ray_workers import _sized

    of(nodes, monkeypatch)
    config = tiny_config(
        tiny_model, write_questions(tmp_path / "questions.jsonl"), engine={"tensor_parallel_size": size}
    )
    assert _sized(config, tiny_model, 10**6).engine.engines == engines


def test_training_on_ray_needs_engines_of_its_own(run_cli: RunCli, tmp_path: Path, tiny_model: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    (tmp_path / "run.toml").write_text(as_toml(tiny_config(tiny_model, data)))
    finished = run_cli("train", "--config", "run.toml", "--executor", "ray")
    assert finished.returncode == 2
    assert 'found engine.placement "inside"; set it to "own processes"' in finished.stderr


def test_training_with_actors_is_that_of_an_engine_inside_even_if_one_is_killed(
    tmp_path: Path, tiny_model: Path, artifacts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It ends the cluster: only tests that need none come after it."""
    from common.engines.ray_workers import ray_engines

    inside = trained(configured(tmp_path, tiny_model, "inside"))
    killer = Killer(after=1, command="ray::EngineActor")
    with ray_engines(None) as engines:
        actors = trained(configured(tmp_path, tiny_model, "actors", placement=OWN), [killer], engines.build)
    assert len(killer.killed) == 1
    assert "engine 1 of 1 is lost (" in capfd.readouterr().err
    assert_same_training(actors, inside)


def test_several_processes_of_training_do_not_each_start_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.engines.ray_workers import ray_engines

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(UserError, match="ray start --head`, and give its address with --address"),
        ray_engines(None),
    ):
        pass
    with ray_engines("head:6379"):
        assert not ray.is_initialized(), "it is connected to when the first engine is needed"
