"""Engines on a Ray cluster: what is drawn, and what is lost with an actor, or with the whole cluster."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from common.engines.fleet import EngineFleet
from common.runs import REPOSITORY
from tests.fleet_engines import number_engine
from tests.test_fleet import BATCH, drawn, pids

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
    fleet = EngineFleet(lambda _: RayWorker(build, num_cpus=1), 2, max_num_seqs=BATCH, share=RayWeights.put)
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
