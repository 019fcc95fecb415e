"""The Makefile, as far as it can be tested without installing anything: the commands that it would run."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from common.processes import PATIENCE_SECONDS
from tests.conftest import ROOT


def run_make(
    *arguments: str, artifacts: Path | str = "/nonexistent", path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What make says to a user, with nothing of the `make test ARGS=…` that may be running the tests."""
    environment = {"PATH": os.environ["PATH"], "ASTAR_PO_ARTIFACTS": str(artifacts)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def make(*arguments: str, path: Path | None = None) -> str:
    result = run_make(*arguments, path=path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_target_that_users_call() -> None:
    listed = set(re.findall(r"make ([a-z0-9-]+)", make("help")))
    assert listed >= {
        "demo",
        "test",
        "vstar",
        "train",
        "rounds",
        "evaluate",
        "report",
        "compare",
        "setup",
        "setup-stage1",
        "check",
        "browser",
    }


def test_stage_1_never_installs_deepspeed_and_training_does() -> None:
    def installs(target: str) -> str:
        return make(
            "-n", "--always-make", target, "ACCELERATOR=cpu", "CONFIG=configs/gsm8k-qwen2.5-1.5b.toml"
        )

    assert "cpu-train.txt" not in installs("vstar")
    assert "cpu-train.txt" in installs("train")
    for variant in ("cpu", "cuda"):
        stage1 = (ROOT / "requirements" / f"{variant}-stage1.txt").read_text()
        assert "deepspeed" not in stage1
        assert "deepspeed==" in (ROOT / "requirements" / f"{variant}-train.txt").read_text()


def test_a_machine_with_a_gpu_gets_the_cuda_requirements(tmp_path: Path) -> None:
    found = tmp_path / "nvidia-smi"
    found.write_text("#!/bin/sh\nexit 0\n")
    found.chmod(0o755)
    new = ("-n", "--always-make", "setup-stage1", "VENV=none")
    assert "cuda-stage1.txt" in make(*new, path=tmp_path)
    found.write_text("#!/bin/sh\nexit 9\n")
    assert "cpu-stage1.txt" in make(*new, path=tmp_path)
    assert "cuda-stage1.txt" in make(*new, "ACCELERATOR=cuda", path=tmp_path)


@pytest.mark.parametrize(("installed", "status"), [("cuda", 9), ("cpu", 0)])
def test_an_environment_keeps_to_its_accelerator_on_every_machine(
    installed: str, status: int, tmp_path: Path
) -> None:
    """A login node without a GPU may share the environment of the nodes that have one."""
    found = tmp_path / "nvidia-smi"
    found.write_text(f"#!/bin/sh\nexit {status}\n")
    found.chmod(0o755)
    (tmp_path / ".accelerator").write_text(f"{installed}\n")
    other = {"cpu": "cuda", "cuda": "cpu"}[installed]
    again = ("-n", "--always-make", "setup", f"VENV={tmp_path}")
    assert f"requirements/{installed}-train.txt" in make(*again, path=tmp_path)
    assert f"requirements/{other}-" not in make(*again, path=tmp_path)
    assert f"requirements/{other}-train.txt" in make(*again, f"ACCELERATOR={other}", path=tmp_path)


def test_a_set_up_that_failed_keeps_to_its_accelerator(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "pip"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for accelerator in ("cuda", "cpu"):
        assert run_make("setup-stage1", f"VENV={tmp_path}", f"ACCELERATOR={accelerator}").returncode
        assert f"requirements/{accelerator}-stage1.txt" in make("-n", "setup-stage1", f"VENV={tmp_path}")


def test_the_run_is_the_configs_unless_named() -> None:
    assert "--run gsm8k-qwen2.5-3b " in make("-n", "vstar", "CONFIG=configs/gsm8k-qwen2.5-3b.toml")
    assert "--run mine " in make("-n", "vstar", "CONFIG=configs/gsm8k-qwen2.5-3b.toml", "RUN=mine")


def test_training_makes_the_artifact_that_is_missing_and_uses_as_many_processes_as_told() -> None:
    commands = make("-n", "train", "NPROC=4")
    assert commands.index("cli.py vstar") < commands.index("cli.py train")
    (arguments,) = re.findall(r"torchrun (.*cli\.py train.*)", commands)
    launcher = parse_args(arguments.split())
    assert launcher.nproc_per_node == "4"
    assert launcher.shutdown_timeout == PATIENCE_SECONDS
    assert launcher.training_script == "cli.py"
    assert launcher.training_script_args[:2] == ["train", "--config"]


def test_rounds_train_on_as_many_processes_as_told() -> None:
    (line,) = [line for line in make("-n", "rounds", "NPROC=4", "ROUNDS=2").splitlines() if "cli.py" in line]
    assert shlex.split(line)[2:] == [
        *("rounds", "--rounds", "2", "--nproc", "4", "--config", "configs/demo.toml", "--run", "demo"),
    ]


def test_an_objective_without_vstar_is_trained_without_stage_1() -> None:
    commands = make("-n", "train", "ARGS=--set train.objective.name=grpo")
    assert "cli.py train" in commands
    assert "cli.py vstar" not in commands
    assert "cli.py base-model" in commands


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("", ["segments", "critic", "advantages", "train"]),
        (" --set advantages.values=monte_carlo", ["segments", "advantages", "train"]),
        (" --advantages other.parquet", ["train"]),
    ],
)
def test_direct_advantage_is_trained_after_the_jobs_that_make_its_table(
    options: str, steps: list[str]
) -> None:
    commands = make("-n", "train", f"ARGS=--set train.objective.name=direct_advantage{options}")
    assert re.findall(r"cli\.py (vstar|segments|critic|advantages|train) ", commands) == steps


def test_a_table_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "advantages.parquet").touch()
    arguments = ["-n", "train", "ARGS=--set train.objective.name=direct_advantage"]
    commands = run_make(*arguments, artifacts=tmp_path).stdout
    assert "cli.py train" in commands
    assert "cli.py segments" not in commands
    assert "cli.py segments" in run_make(*arguments, artifacts=tmp_path / "other").stdout


def test_only_a_config_that_uses_the_demo_model_builds_it() -> None:
    assert "cli.py base-model" in make("-n", "vstar")
    assert "cli.py base-model" not in make("-n", "vstar", "CONFIG=configs/math-qwen2.5-7b.toml")


@pytest.mark.parametrize("run", ["../..", ".", "..", "a b", "a/b", "-rf", "a;b", "$HOME", "", "é"])
def test_clean_removes_nothing_but_a_run(run: str, tmp_path: Path) -> None:
    """It refuses whatever else it is given in one line."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "artifacts").mkdir()
    result = run_make("clean", f"RUN={run.replace('$', '$$')}", artifacts=tmp_path / "artifacts")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "RUN" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "kept"]


def test_with_runs_at_a_url_make_runs_the_same_commands_and_removes_nothing() -> None:
    url = "s3://bucket/runs"
    (line,) = [
        line
        for line in make("-n", "vstar", f"ASTAR_PO_ARTIFACTS={url}").splitlines()
        if "cli.py vstar" in line
    ]
    assert shlex.split(line)[2:] == ["vstar", "--config", "configs/demo.toml", "--run", "demo"]
    for arguments, reason in (
        (("clean", "RUN=mine"), f"{url}/mine is in an object store: remove it there"),
        (
            ("vstar", "CONFIG=s3://bucket/mine.toml"),
            "make reads the config itself: give a file of this machine",
        ),
    ):
        result = run_make(*arguments, artifacts=url)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        assert reason in result.stderr


def test_paths_may_have_spaces_and_any_characters(tmp_path: Path) -> None:
    config = tmp_path / "it's my gén.toml"
    config.write_text((ROOT / "configs" / "demo.toml").read_text(encoding="utf-8"), encoding="utf-8")
    commands = make("-n", "vstar", f"CONFIG={config}", f"ASTAR_PO_ARTIFACTS={tmp_path}/my é")
    (line,) = [line for line in commands.splitlines() if "cli.py vstar" in line]
    assert shlex.split(line)[2:] == ["vstar", "--config", str(config), "--run", "demo"]
    (line,) = [line for line in commands.splitlines() if "cli.py base-model" in line]
    assert shlex.split(line)[:3] == ["[", "-e", f"{tmp_path}/my é/demo/base_model"]


def test_a_virtual_environment_whose_path_has_spaces_is_refused_in_a_line() -> None:
    result = run_make("setup", "VENV=my env")
    assert result.returncode == 2
    assert re.fullmatch(r".*VENV=my env: give a folder whose path has no spaces\..*\n", result.stderr)


def test_every_pinned_requirement_is_exact_and_names_no_index() -> None:
    for file in (ROOT / "requirements").glob("c*-*.txt"):
        for line in file.read_text().splitlines():
            assert re.fullmatch(r"[a-zA-Z0-9_.\[\]-]+==[a-zA-Z0-9_.+!]+( ; .*)?", line), (file.name, line)
