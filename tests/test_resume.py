"""Stage 2 is killed at any instant: a re-run ends with the very weights and figures of an undisturbed run."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.tiny_model import save_tiny_model
from common.runs import RunPaths, run_paths
from stage2_train.checkpoint import (
    ROLLOUTS,
    checkpoints,
    damage,
    latest_state,
    newest_intact,
    read_rollouts,
    write,
)
from stage2_train.config import Config
from stage2_train.ranks import ALONE
from tests import warm
from tests.conftest import ROOT
from tests.killing import JobServer
from tests.stage2_runs import as_toml, tiny_config, write_tiny_vstar
from tests.train_steps import changed

ITERATIONS = 12
VARIES = ("time/", "throughput/", "memory/")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Training of a network that draws random numbers of its own: it has dropout."""
    model = tmp_path / "model"
    save_tiny_model(model, seed=0)
    document = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(document | {"attention_dropout": 0.1}), encoding="utf-8")
    train = {"iterations": ITERATIONS, "checkpoint_every": 2, "evaluate_every": 3, "warmup_steps": 8}
    config = tiny_config(
        tmp_path, model, train=train, engine={"backend": "transformers"}, grader={"workers": 1}
    )
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    return config


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    with JobServer(tmp_path_factory.mktemp("jobs"), "tests.training_jobs") as server:
        yield server


def figures(paths: RunPaths) -> list[dict[str, Any]]:
    """What is in metrics.jsonl, times aside."""
    rows = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(VARIES)} for row in rows]


def assert_same(ours: RunPaths, theirs: RunPaths) -> None:
    """The weights bit for bit, the figures, the completions shown, and which checkpoints are kept."""
    weights = load_file(theirs.model / "model.safetensors")
    for name, weight in load_file(ours.model / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    assert figures(ours) == figures(theirs)
    shown, expected = (pl.read_parquet(paths.completions / "*.parquet") for paths in (ours, theirs))
    assert shown.equals(expected)
    kept, expected_names = (
        [path.name for path in checkpoints(paths.checkpoints)] for paths in (ours, theirs)
    )
    assert kept == expected_names


Train = Callable[..., int]


@pytest.fixture
def train(jobs: JobServer, config: Config, tmp_path: Path, artifacts: Path) -> Train:
    """Train as run `name`, with other values in the config's sections; returns the wait status."""

    def run(
        name: str, *, change: dict[str, dict[str, Any]] | None = None, processes: int = 1, **order: Any
    ) -> int:
        ours = changed(config, change or {}).model_copy(update={"run": name})
        order |= {"program": "train", "processes": processes, "artifacts": str(artifacts)}
        order |= {"vstar": str(tmp_path / "vstar.parquet")}
        return jobs.run(ours.model_dump(mode="json"), **order)

    return run


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_instants_a_run_ends_as_if_nothing_had_happened(train: Train, kills: int) -> None:
    assert train("whole") == 0
    whole = run_paths("whole")
    assert [row["iteration"] for row in figures(whole)] == list(range(ITERATIONS + 1))
    instants = random.Random(0)
    completed = done = lost = 0
    after, iterations_later = 3, 0.0  # the first time right before a checkpoint
    while kills:
        name = f"killed-{completed}"
        killed = run_paths(name)
        if status := train(name, killed_after=after, iterations_later=iterations_later):
            assert status == signal.SIGKILL
            kills -= 1
            before, done = done, latest_state(killed.checkpoints).get("iteration", 0)
            assert done >= before
            lost += len(figures_of_killed(killed)) - 1 - done
            kept = checkpoints(killed.checkpoints)
            assert [damage(path) for path in kept] == [None] * len(kept)
        else:
            assert_same(killed, whole)
            completed, done = completed + 1, 0
        after = min(done + instants.randint(1, 4), ITERATIONS)
        iterations_later = instants.uniform(0, 1)
    assert train(f"killed-{completed}") == 0
    assert_same(run_paths(f"killed-{completed}"), whole)
    assert lost > 0  # iterations were thrown away and done again


SPLITS = [
    split for split in product((1, 2), (0, 1, 2, 3), ("float32", "bfloat16")) if split[1:] != (0, "bfloat16")
]
CASES = [(*split, 0) for split in SPLITS] + [(1, 2, "float32", 2), (2, 3, "float32", 1)]
IN_THE_SUITE = [(2, 2, "float32", 0), (2, 3, "float32", 1), (1, 2, "bfloat16", 0)]


@pytest.mark.parametrize(
    ("processes", "zero_stage", "dtype", "staleness"),
    [pytest.param(*case, marks=() if case in IN_THE_SUITE else pytest.mark.slow) for case in CASES],
)
def test_killed_between_checkpoints_any_split_ends_as_if_nothing_had_happened(
    train: Train, processes: int, zero_stage: int, dtype: str, staleness: int
) -> None:
    change = {
        "train": {"zero_stage": zero_stage, "iterations": 6, "staleness": staleness},
        "model": {"dtype": dtype},
    }
    assert train("whole", change=change, processes=processes) == 0
    assert train("killed", change=change, processes=processes, killed_after=5) == signal.SIGKILL
    whole, killed = run_paths("whole"), run_paths("killed")
    assert latest_state(killed.checkpoints)["iteration"] == 4
    assert train("killed", change=change, processes=processes) == 0
    assert_same(killed, whole)


def figures_of_killed(paths: RunPaths) -> list[str]:
    return [
        line for line in paths.metrics.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")
    ]


def cli(
    config: Config, folder: Path, artifacts: Path, *, largest_file: int | None = None
) -> "subprocess.Popen[str]":
    (folder / "run.toml").write_text(as_toml(config), encoding="utf-8")
    environment = {"ASTAR_PO_ARTIFACTS": str(artifacts), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = warm.popen(
        [ROOT / "cli.py", "train", "--config", folder / "run.toml", "--vstar", folder / "vstar.parquet"],
        env={**os.environ, **environment, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if largest_file:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    return process


def test_evicted_by_a_scheduler_training_ends_at_an_iteration_with_a_checkpoint_of_it(
    config: Config, tmp_path: Path, artifacts: Path
) -> None:
    """And with its newest checkpoint damaged afterwards it continues from the one before, and says so."""
    train = config.train.model_copy(update={"iterations": 300, "checkpoint_every": 2})
    process = cli(config.model_copy(update={"train": train}), tmp_path, artifacts)
    paths = run_paths(config.run)
    assert process.stdout is not None
    assert any(line.strip().startswith("5/300") for line in process.stdout)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-4000:]
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    done = latest_state(paths.checkpoints)["iteration"]
    assert done == figures(paths)[-1]["iteration"] >= 5
    *_, earlier, newest = checkpoints(paths.checkpoints)
    next(newest.rglob("*optim_states.pt")).write_bytes(b"nothing")

    short = train.model_copy(update={"iterations": done + 1})
    output, errors = cli(config.model_copy(update={"train": short}), tmp_path, artifacts).communicate(
        timeout=100
    )
    assert "trained policy" in output, errors[-4000:]
    assert f"warning: {newest} is damaged" in output
    assert f"continuing from {earlier.name}" in output
    assert f"continuing after iteration {int(earlier.name[-6:])}\n" in output
    assert (paths.checkpoints / "damaged" / newest.name).is_dir()
    assert [row["iteration"] for row in figures(paths)] == list(range(done + 2))


def test_a_disk_too_full_for_a_checkpoint_ends_training_with_one_line(
    config: Config, tmp_path: Path, artifacts: Path
) -> None:
    """Here no file may grow beyond a size; a full disk fails in the same calls."""
    process = cli(config, tmp_path, artifacts, largest_file=500_000)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors[-4000:]
    assert "Traceback" not in errors
    assert re.search(r"error: cannot write .*: File too large; .* start the same command again", errors)
    assert checkpoints(run_paths(config.run).checkpoints) == []
    assert [row["iteration"] for row in figures(run_paths(config.run))] == [0, 1, 2]


# Checkpoints as files, without a model.


class FileLearner:
    """Saves two files."""

    def __init__(self, iteration: int) -> None:
        self._iteration = iteration

    def save(self, folder: Path, name: str) -> None:
        (folder / name).mkdir()
        for file in ("weights", "optimizer"):
            (folder / name / file).write_bytes(f"{file} {self._iteration}".encode() * 100)


def save(folder: Path, iteration: int, *, accuracy: float | None = None, keep: int = 2) -> None:
    state = {"iteration": iteration, "held_out_accuracy": accuracy}
    parts: Any = {"state": FileLearner(iteration)}
    write(folder, state, parts, ALONE, keep=keep, rollouts=[[[{"prompt_id": "a"}]]])


def test_batches_of_a_checkpoint_are_groups_also_those_of_older_versions(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoint,) = checkpoints(tmp_path)
    assert read_rollouts(checkpoint, group_size=1) == [[[{"prompt_id": "a"}]]]
    without_groups = [[{"prompt_id": name} for name in "aabb"]]
    (checkpoint / ROLLOUTS).write_text(json.dumps(without_groups))
    assert read_rollouts(checkpoint, group_size=2) == [
        [[{"prompt_id": "a"}, {"prompt_id": "a"}], [{"prompt_id": "b"}, {"prompt_id": "b"}]]
    ]


def iterations(folder: Path) -> list[int]:
    return [int(path.name[-6:]) for path in checkpoints(folder)]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    accuracies = {1: 0.3, 2: None, 3: 0.5, 4: 0.5, 5: None, 6: 0.4, 7: None}
    kept = []
    for iteration, accuracy in accuracies.items():
        save(tmp_path, iteration, accuracy=accuracy)
        kept.append(iterations(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [3, 6, 7]]
    assert all(damage(path) is None for path in checkpoints(tmp_path))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "file", ["state/weights", "state/optimizer", "state.json", "rollouts.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["gone", "cut", "one bit"])
def test_a_damaged_checkpoint_is_moved_aside_and_named(tmp_path: Path, file: str, how: str) -> None:
    for iteration in (1, 2, 3):
        save(tmp_path, iteration, keep=3)
    path = tmp_path / "iteration-000003" / file
    content = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(
        content[:-1] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1])
    )
    said: list[str] = []
    assert newest_intact(tmp_path, said.append) == tmp_path / "iteration-000002"
    assert len(said) == 1
    assert file in said[0]
    assert "continuing from iteration-000002" in said[0]
    assert (tmp_path / "damaged" / "iteration-000003" / "state").is_dir()
    said.clear()
    assert newest_intact(tmp_path, said.append) == tmp_path / "iteration-000002"
    assert said == []


def test_without_an_intact_checkpoint_training_starts_anew_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "iteration-000001" / "state" / "weights").unlink()
    said: list[str] = []
    assert newest_intact(tmp_path, said.append) is None
    assert "starting over" in said[0]
    assert newest_intact(tmp_path / "nothing there", said.append) is None


def test_killed_at_any_write_of_a_checkpoint_the_one_before_or_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies_at(step: int) -> None:
        steps = 0

        def before(function: Any) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == step:
                    raise Killed
                return function(*arguments, **options)

            return counted

        monkeypatch.setattr(os, "fsync", before(os.fsync))
        monkeypatch.setattr(Path, "rename", before(Path.rename))
        monkeypatch.setattr(Path, "write_text", before(Path.write_text))
        monkeypatch.setattr(shutil, "rmtree", before(shutil.rmtree))

    step, found = 1, []
    while True:
        folder = tmp_path / str(step)
        save(folder, 1, keep=1)
        dies_at(step)
        try:
            save(folder, 2, keep=1)
        except Killed:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            break
        said: list[str] = []
        newest = newest_intact(folder, said.append)
        assert said == []
        assert newest is not None
        found.append(int(newest.name[-6:]))
        assert not list(folder.glob(".*"))
        save(folder, 3, keep=1)
        assert iterations(folder) == [3]
        step += 1
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert len(found) >= 10
