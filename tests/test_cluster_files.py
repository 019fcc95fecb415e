"""The examples for clusters: what they start, with stand-ins for Slurm's and our programs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from common.runs import REPOSITORY

CLUSTER = REPOSITORY / "configs" / "cluster"
SAYS = '#!/bin/bash\necho "$(basename "$0") $*"\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder whose programs say how they were called."""
    for name in (".venv/bin/python", ".venv/bin/torchrun", "bin/srun"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text('#!/bin/bash\nexec "$@"\n' if name == "bin/srun" else SAYS)
        program.chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    return tmp_path


def submitted(checkout: Path, script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(checkout),
        **variables,
    }
    if script == "slurm-train.sbatch":  # srun is given options first
        (checkout / "bin" / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    return subprocess.run(
        [shutil.which("bash") or "bash", str(CLUSTER / script)],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_task_of_an_array_draws_its_part_and_a_single_job_finishes(checkout: Path) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "16", "CONFIG": "my run.toml"}
    found = submitted(checkout, "slurm-vstar.sbatch", **task)
    assert found.stdout == "python cli.py vstar --config my run.toml --shard 3/16\n", found.stderr
    found = submitted(checkout, "slurm-vstar.sbatch", CONFIG="mine.toml")
    assert found.stdout == "python cli.py vstar --config mine.toml\n", found.stderr


def test_training_meets_on_the_first_node(checkout: Path) -> None:
    job = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "64",
    }
    found = submitted(checkout, "slurm-train.sbatch", CONFIG="mine.toml", **job)
    assert found.stdout == (
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node7:29500 --rdzv-id 17 "
        "--shutdown-timeout 290 cli.py train --config mine.toml\n"
    ), found.stderr


@pytest.mark.parametrize("script", ["slurm-vstar.sbatch", "slurm-train.sbatch"])
def test_a_forgotten_config_is_named(checkout: Path, script: str) -> None:
    job = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "64",
    }
    found = submitted(checkout, script, **job)
    assert found.returncode != 0
    assert "set CONFIG to the run" in found.stderr


def test_the_signal_before_the_limit_reaches_the_program() -> None:
    """Slurm sends it to what srun has started, unless told to send it to the script itself, which `exec` replaces."""
    for script, started, warned in (
        ("slurm-vstar", "exec .venv", "B:TERM@"),
        ("slurm-train", "exec srun", "TERM@"),
    ):
        text = (CLUSTER / f"{script}.sbatch").read_text()
        assert f"\n{started}" in text
        assert f"\n#SBATCH --signal={warned}" in text
    (limit,) = re.findall(r"--signal=TERM@(\d+)", text)
    (patience,) = re.findall(r"--shutdown-timeout (\d+)", text)
    assert int(patience) < int(limit)


def test_every_example_of_training_gives_the_ranks_time_to_end() -> None:
    for file in CLUSTER.glob("*-train.*"):
        assert "--shutdown-timeout " in file.read_text(), file.name


def test_jobs_of_slurm_name_the_set_up_that_they_need() -> None:
    for name, target in (("slurm-vstar.sbatch", "setup-stage1"), ("slurm-train.sbatch", "setup")):
        assert f"`make {target} ACCELERATOR=cuda`" in (CLUSTER / name).read_text()


def test_tasks_of_skypilot_name_commands_and_targets_that_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for name, command in (("skypilot-vstar.yaml", "vstar"), ("skypilot-train.yaml", "train")):
        task = yaml.safe_load((CLUSTER / name).read_text())
        assert f"cli.py {command} --config" in task["run"]
        for target in task["setup"].split()[1:]:
            assert f"\n{target}:" in makefile
        assert (REPOSITORY / task["envs"]["CONFIG"]).is_file()
