"""Fixtures that several test files share: a model small enough to load in seconds, and the command line."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tests.warm
from benchmarks.tiny_model import save_tiny_model

if TYPE_CHECKING:
    from tests.object_store import Machines, Store
    from tests.stage1_runs import Engines

# Read when torch is imported. Threads that spin while they wait take the cores from the tests' other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The tests' models are too small for a second thread, and the cores are the other workers'.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]

RunCli = Callable[..., subprocess.CompletedProcess[str]]


MOST_WORKERS = 4
"""Each takes up to 3 GB."""
LONGEST_FILES = (
    "test_kill",
    "test_objective_runs",
    "test_ranks",
    "test_training",
    "test_other_split",
    "test_resume",
    "test_rollout_groups",
    "test_gpu_benchmark",
    "test_engines",
    "test_stage1",
    "test_lora",
    "test_forecast",
    "test_grading_code",
    "test_grading_pool",
    "test_cli_errors",
    "test_safeguards",
)
"""From a run's longest to those of ten seconds."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The number of workers for `-n auto`: one per core; none besides this process if they would share a GPU.

    With one more a run is a quarter shorter, but on a loaded machine deadlines of good neighbours then pass.
    """
    return 0 if tests.warm.HAS_GPU else min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers take file after file; with the longest first, none has one left when the others have finished."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST_FILES)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def warm_starts_end_with_the_session() -> Iterator[None]:
    yield
    tests.warm.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 folder whose samples look like answers without any training: `7 #### 3`, `#### 2`, now and then junk.

    The next token depends on the class of the last one (anything, `####`, a number) and, weakly and at random, on
    all before it: after `####` comes 1, 2, 3 or 4, so a prompt whose answer is one of these is solved now and then.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as small, with one matrix for the embedding and the output layer; its samples are noise."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    save_tiny_model(folder, seed=0, tied=True)
    return folder


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's runs, instead of the checkout's artifacts/."""
    folder = tmp_path / "artifacts"
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(folder))
    return folder


@pytest.fixture(autouse=True)
def fresh_groups() -> None:
    """Let DeepSpeed make new process groups: an engine of an earlier test may have ended those that it remembers."""
    if (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
        import torch.distributed as dist

        if not dist.is_initialized():
            for name, value in list(vars(groups).items()):
                if isinstance(value, dist.ProcessGroup):
                    setattr(groups, name, None)


@pytest.fixture
def run_cli(artifacts: Path, tmp_path: Path) -> RunCli:
    """Run `python cli.py …` as a user would, in another folder; returns the finished process.

    `warm` as in tests/warm.py, for programs that load torch or vLLM and whose cold start is tested elsewhere.
    """

    def run(
        *arguments: str | Path, timeout: float = 60, warm: bool = False
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "ASTAR_PO_ARTIFACTS": str(artifacts),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }
        program = [ROOT / "cli.py", *arguments]
        return tests.warm.run(program, cwd=tmp_path, env=environment, timeout=timeout, cold=not warm)

    return run


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """A few questions, as a generic data set."""
    from tests.stage1_runs import write_questions

    return write_questions(tmp_path / "data.jsonl")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, artifacts: Path) -> Iterator["Engines"]:
    """Every run of stage 1 in the test draws from a scripted engine."""
    from tests.stage1_runs import scripted_engines

    yield from scripted_engines(monkeypatch, artifacts)


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    """An S3 server on this machine."""
    from tests.object_store import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture
def store(s3_address: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> "Store":
    """A prefix of this test's own in an object store."""
    from tests.object_store import store_of_test

    return store_of_test(s3_address, request.node.name, monkeypatch)


@pytest.fixture
def machines(store: "Store", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Machines":
    """Machines that share the store; the test begins on "first"."""
    from tests.object_store import Machines

    found = Machines(tmp_path / "machines", monkeypatch)
    found.use("first")
    return found
