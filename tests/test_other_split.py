"""A run goes on with another number of processes and under another ZeRO stage, from DeepSpeed's converted files.

Completions are scripted, so that every split trains on the very same ones. A conversion only moves numbers: weights and
moments are bit for bit those of the checkpoint. What follows is summed in another order, and agrees to rounding.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.runs import RunPaths, run_paths
from stage2_train.checkpoint import checkpoints, damage, latest_state
from stage2_train.config import Config
from stage2_train.resume import refuse_other_zero
from stage2_train.split import Split
from tests import warm
from tests.conftest import ROOT
from tests.killing import JobServer
from tests.objective_steps import ITERATIONS
from tests.stage2_runs import GRADED, as_toml, tiny_config, write_tiny_vstar
from tests.train_steps import changed
from tests.training_jobs import ranks_found

WEIGHTS_TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-3}
"""Absolute (measured: 2e-7 and 2.4e-4, one unit in bfloat16's last place). The last two steps move a weight by 1e-3."""
FIGURES_TOLERANCE = {"float32": 5e-5, "bfloat16": 2e-2}
"""Relative, for losses, KL, entropy and gradient norm (measured: 5e-6 and 4e-3)."""
STEPS = 2
LORA = {"rank": 4, "alpha": 8}
PPO = {"name": "ppo", "kl": 0.1, "entropy": 0.1, "critic_learning_rate": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of one split, continued by another."""

    saved: tuple[int, int]
    """Processes and ZeRO stage."""
    continued: tuple[int, int]
    train: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    is_tied: bool = False


CASES = {
    "2 to 1, PPO": Case(saved=(2, 2), continued=(1, 2), train={"objective": PPO}, is_tied=True),
    "1 to 2, drawn ahead": Case(saved=(1, 2), continued=(2, 2), train={"staleness": 1}),
    "2 to 1 under ZeRO-3, SPO": Case(saved=(2, 3), continued=(1, 3), train={"objective": {"name": "spo"}}),
    "1 to 2 under ZeRO-3, LoRA": Case(saved=(1, 3), continued=(2, 3), train={"lora": LORA}),
    "1 to 2 without ZeRO": Case(saved=(1, 0), continued=(2, 0)),
    "ZeRO-2 to 3, PPO, LoRA": Case(saved=(2, 2), continued=(2, 3), train={"objective": PPO, "lora": LORA}),
    "ZeRO-3 to 2": Case(saved=(2, 3), continued=(2, 2), is_tied=True),
    "1 to 2, ZeRO-1 to 3, offloaded": Case(saved=(1, 1), continued=(2, 3), train={"offload_optimizer": True}),
    "2 to 1, ZeRO-3 to 1, bfloat16": Case(saved=(2, 3), continued=(1, 1), dtype="bfloat16"),
    "1 to 2, ZeRO-2 to 3, bfloat16": Case(saved=(1, 2), continued=(2, 3), dtype="bfloat16", is_tied=True),
}


@dataclass(frozen=True)
class Found:
    """What the ranks of the run that saved found, which went on, and those of the run that continued."""

    whole: list[dict[str, Any]]
    continued: list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tiny_model: Path, tied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("a+b")
    orders: dict[bool, dict[int, dict[str, Any]]] = {continues: {1: {}, 2: {}} for continues in (False, True)}
    for number, (name, case) in enumerate(CASES.items()):
        own = folder / str(number)
        own.mkdir()
        for continues, (processes, stage) in ((False, case.saved), (True, case.continued)):
            config = tiny_config(
                own,
                tied_model if case.is_tied else tiny_model,
                sampling={"max_completion_tokens": 48},
                train={"iterations": ITERATIONS, "warmup_steps": 9, "zero_stage": stage, **case.train},
                grader={"workers": 1},
            )
            config = changed(config, {"model": {"dtype": case.dtype}})
            write_tiny_vstar(config, own / "vstar.parquet", made_up=GRADED)
            orders[continues][processes][name] = {
                "config": config.model_dump(mode="json"),
                "vstar": str(own / "vstar.parquet"),
                "checkpoints": str(own / "checkpoints"),
                "continues": continues,
            }
    whole, continued = (ranks_found("split_steps", config, folder, orders[each]) for each in (False, True))
    return {
        name: Found(
            whole=[rank[name] for rank in whole[case.saved[0]]],
            continued=[rank[name] for rank in continued[case.continued[0]]],
        )
        for name, case in CASES.items()
    }


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("name", CASES)
def test_weights_and_moments_are_those_of_the_checkpoint(found: dict[str, Found], name: str) -> None:
    expected = found[name].whole[0]["at checkpoint"]
    assert {key.split()[-1] for key in expected} == {"weight", "exp_avg", "exp_avg_sq"}
    assert {key.split()[0] for key in expected} == ({"state", "critic"} if "PPO" in name else {"state"})
    for rank in found[name].continued:
        assert rank["at checkpoint"].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(rank["at checkpoint"][key].flatten(), value.flatten()), key


@pytest.mark.parametrize("name", CASES)
def test_the_next_iteration_is_that_of_the_uninterrupted_run(found: dict[str, Found], name: str) -> None:
    whole, dtype = found[name].whole[0], CASES[name].dtype
    first, *others = found[name].continued
    assert difference(first["weights"], whole["weights"]) < WEIGHTS_TOLERANCE[dtype]
    assert all(difference(first["weights"], other["weights"]) == 0 for other in others)
    for figure, value in whole["metrics"].items():
        if figure.startswith(("loss/", "reward/", "kl/", "advantage/", "policy/", "train/gradient_norm")):
            expected = pytest.approx(value, rel=FIGURES_TOLERANCE[dtype], abs=1e-7)
            assert first["metrics"][figure] == expected, figure


@pytest.mark.parametrize("name", CASES)
def test_the_schedule_and_adams_count_of_steps_go_on(found: dict[str, Found], name: str) -> None:
    whole = found[name].whole[0]
    assert whole["steps"] == {ITERATIONS * STEPS}
    for rank in found[name].continued:
        assert rank["metrics"]["train/learning_rate"] == whole["metrics"]["train/learning_rate"] < 1e-3
        assert rank["steps"] == whole["steps"]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_beside_the_checkpoint(found: dict[str, Found], name: str) -> None:
    for rank in (*found[name].whole, *found[name].continued):
        assert rank["files"] == ["iteration-000002"]


@pytest.mark.parametrize(
    ("ours", "saved", "line"),
    [
        (2, 0, "1 process without ZeRO, which cannot be continued under ZeRO: set train.zero_stage to 0"),
        (
            0,
            3,
            "1 process under ZeRO-3, which cannot be continued without ZeRO: set train.zero_stage to 1, 2 or 3",
        ),
    ],
)
def test_between_zero_and_none_a_run_cannot_go_on(ours: int, saved: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        refuse_other_zero(
            Path("iteration-000002"),
            Split(processes=2, zero_stage=ours),
            Split(processes=1, zero_stage=saved),
        )


# Whole runs, which draw their completions.


RUN_TOLERANCE = 2e-5
"""Of the weights after six iterations, as in test_ranks.py (measured: 2.5e-6)."""


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    train = {"iterations": 6, "checkpoint_every": 2, "warmup_steps": 8, "keep_checkpoints": 3}
    engine = {"backend": "transformers"}
    config = tiny_config(tmp_path, tiny_model, train=train, engine=engine, grader={"workers": 1})
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    return config


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    with JobServer(tmp_path_factory.mktemp("jobs"), "tests.training_jobs") as server:
        yield server


def rates(paths: RunPaths) -> list[float]:
    """The learning rate of each iteration, also of the one before the first."""
    lines = paths.metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line).get("train/learning_rate", 0.0) for line in lines]


def assert_alike(ours: RunPaths, theirs: RunPaths) -> None:
    weights = [load_file(paths.model / "model.safetensors") for paths in (ours, theirs)]
    assert difference(*weights) < RUN_TOLERANCE
    assert rates(ours) == rates(theirs)


def test_a_run_goes_on_after_a_killed_conversion_and_from_the_checkpoint_before_a_damaged_one(
    jobs: JobServer, config: Config, tmp_path: Path, artifacts: Path
) -> None:
    def train(name: str, processes: int, zero_stage: int, **order: Any) -> int:
        ours = changed(config.model_copy(update={"run": name}), {"train": {"zero_stage": zero_stage}})
        order |= {"program": "train", "processes": processes, "artifacts": str(artifacts)}
        return jobs.run(ours.model_dump(mode="json"), vstar=str(tmp_path / "vstar.parquet"), **order)

    whole, moved = run_paths("whole"), run_paths("moved")
    assert train("whole", 1, 2) == 0
    assert train("moved", 2, 3, killed_after=5) == signal.SIGKILL
    earlier, newest = checkpoints(moved.checkpoints)

    assert train("moved", 1, 2, killed_in_conversion=True) == signal.SIGKILL
    left = moved.checkpoints / ".iteration-000004-converted.tmp"
    assert any(left.rglob("exp_avg.pt"))
    assert [damage(earlier), damage(newest)] == [None, None]

    next(newest.rglob("*optim_states.pt")).write_bytes(b"nothing")
    assert train("moved", 1, 2, killed_after=3) == signal.SIGKILL
    assert {path.name for path in moved.checkpoints.iterdir()} == {"iteration-000002", "damaged"}
    assert train("moved", 1, 2) == 0
    assert latest_state(moved.checkpoints)["world_size"] == 1
    assert_alike(moved, whole)


def test_a_run_under_torchrun_is_killed_and_goes_on_in_one_process(
    config: Config, tmp_path: Path, artifacts: Path
) -> None:
    """Through the command line."""

    def start(name: str, *launcher: str) -> "subprocess.Popen[str]":
        named = config.model_copy(update={"run": name})
        (tmp_path / "run.toml").write_text(as_toml(named), encoding="utf-8")
        return warm.popen(
            [
                *launcher,
                *(ROOT / "cli.py", "train", "--config", tmp_path / "run.toml"),
                *("--vstar", tmp_path / "vstar.parquet"),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    moved = run_paths("moved")
    job = start("moved", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    deadline = time.monotonic() + 120
    while latest_state(moved.checkpoints).get("iteration") != 4:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    job.communicate(timeout=30)
    psutil.wait_procs(processes, timeout=30)

    output, errors = start("moved").communicate(timeout=120)
    assert "moved/model: the trained policy" in output, errors[-4000:]
    made = f"{moved.checkpoints / 'iteration-000004'} was made by 2 processes under ZeRO-2"
    assert f"{made}: it will be converted for 1 process under ZeRO-2\n" in output
    assert "continuing after iteration 4\n" in output
    assert errors == ""
    output, errors = start("whole").communicate(timeout=120)
    assert "whole/model: the trained policy" in output, errors[-4000:]
    assert_alike(moved, run_paths("whole"))
