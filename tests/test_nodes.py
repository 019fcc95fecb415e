"""Training on several nodes, which here are launchers that meet on this machine: equal to one node, and one is lost."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.runs import REPOSITORY, RunPaths
from stage2_train.config import Config
from tests.stage2_runs import as_toml, tiny_config, write_tiny_vstar

pytestmark = pytest.mark.slow
DEADLINE = 240


def configured(folder: Path, model: Path, iterations: int) -> Config:
    train = {"iterations": iterations, "checkpoint_every": 2}
    config = tiny_config(folder, model, train=train, engine={"backend": "transformers", "max_num_seqs": 16})
    (folder / "run.toml").write_text(as_toml(config))
    write_tiny_vstar(config, folder / "vstar.parquet")
    return config


def launch(
    folder: Path, artifacts: Path, port: int, *, nodes: int, processes: int
) -> list["subprocess.Popen[str]"]:
    """One launcher for each node, each with so many ranks."""
    environment = {**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "OMP_NUM_THREADS": "1"}
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)),
                *("--nproc-per-node", str(processes), *meeting, str(REPOSITORY / "cli.py"), "train"),
                *("--config", str(folder / "run.toml"), "--vstar", str(folder / "vstar.parquet")),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for _ in range(nodes)
    ]


def launch_by_deepspeed(folder: Path, artifacts: Path, port: int) -> list["subprocess.Popen[str]"]:
    """What `deepspeed --hostfile HOSTS --no_local_rank cli.py …` starts on each of two hosts."""
    hosts = json.dumps({"first": [0], "second": [0]}).encode()
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "deepspeed.launcher.launch", "--no_local_rank"),
                *("--world_info", base64.urlsafe_b64encode(hosts).decode(), "--node_rank", str(node)),
                *("--master_addr", "127.0.0.1", "--master_port", str(port), str(REPOSITORY / "cli.py")),
                *("train", "--config", str(folder / "run.toml"), "--vstar", str(folder / "vstar.parquet")),
            ],
            env={**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for node in range(2)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def figures(paths: RunPaths) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    of_the_machine = ("time/", "throughput/", "memory/")
    return [{name: row[name] for name in row if not name.startswith(of_the_machine)} for row in rows]


def test_two_nodes_train_like_one_with_two_ranks_and_say_so_when_one_is_lost(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = configured(tmp_path, tiny_model, iterations=4)
    runs = {}
    for name in ("one", "two", "by deepspeed"):
        if name == "by deepspeed":
            launched = launch_by_deepspeed(tmp_path, tmp_path / name, free_port())
        else:
            nodes, processes = (1, 2) if name == "one" else (2, 1)
            launched = launch(tmp_path, tmp_path / name, free_port(), nodes=nodes, processes=processes)
        outputs = [job.communicate(timeout=DEADLINE)[0] for job in launched]
        assert [job.returncode for job in launched] == [0] * len(launched), outputs
        assert sum("4/4" in output for output in outputs) == 1, "the main rank alone logs"
        runs[name] = RunPaths(tmp_path / name / config.run)
    assert figures(runs["one"]) == figures(runs["two"]) == figures(runs["by deepspeed"])
    weights = load_file(runs["one"].model / "model.safetensors")
    for name, weight in load_file(runs["two"].model / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name

    configured(tmp_path, tiny_model, iterations=10_000)
    first, second = launch(tmp_path, tmp_path / "lost", free_port(), nodes=2, processes=1)
    paths = RunPaths(tmp_path / "lost" / config.run)
    end = time.monotonic() + DEADLINE
    while not list(paths.checkpoints.glob("iteration-*")):
        assert time.monotonic() < end
        time.sleep(0.1)
    for rank in children(second.pid):
        os.kill(rank, signal.SIGKILL)
    second.kill()
    said = [job.communicate(timeout=DEADLINE)[0] for job in (first, second)]
    assert first.returncode != 0
    (lost,) = [line for each in said for line in each.splitlines() if "has lost the connection" in line]
    assert re.search(
        r"error: rank \d has lost the connection to another rank \(.+\): look at the output", lost
    ), said
    assert "The same command continues from the last checkpoint" in "".join(said)


def children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(child) for child in text.split()]
