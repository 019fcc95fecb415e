"""Stage 1 is killed at any instant and at any write: a re-run completes it to the result of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.provenance import read_provenance
from common.runs import run_paths
from common.store import SampleStore, addresses, damage, sample_files
from common.vstar_file import read_vstar
from tests import warm
from tests.conftest import ROOT
from tests.fakes import tiny_config
from tests.killing import JobServer, kill_at_each_write
from tests.test_stage1 import TOML, write_questions

SAMPLES = 4
WATCHED = """
from pathlib import Path

def reward(prompt, completion, answer):
    if completion:  # an empty one only tries the function out
        Path(__file__).with_name("graded").touch()
    return 1.0
"""


@pytest.fixture
def jobs(artifacts: Path) -> Iterator[JobServer]:
    with JobServer(artifacts) as server:
        yield server


def document(model: Path, data: Path, run: str) -> dict[str, Any]:
    return tiny_config(
        model, data, run=run, vstar={"num_samples": SAMPLES}, grader={"workers": 1}
    ).model_dump(mode="json")


def stored(run: str) -> pl.DataFrame:
    """Every sample of a run whose vstar.parquet is written. Fails if one is there twice or a file is damaged."""
    paths = run_paths(run)
    return SampleStore(paths.samples, read_provenance(paths.vstar)).read().sort("prompt_id", "sample_index")


def samples_there(run: str) -> int:
    """How many samples a killed run has; each file under its final name must be whole, and each sample there once."""
    files = sample_files(run_paths(run).samples)
    assert [damage(file) for file in files] == [None] * len(files)
    there = addresses(files)
    assert there.is_unique().all()
    return there.height


def assert_same(run: str, undisturbed: str) -> None:
    assert stored(run).equals(stored(undisturbed))
    assert read_vstar(run_paths(run).vstar)[0].equals(read_vstar(run_paths(undisturbed).vstar)[0])
    assert not [path for path in run_paths(run).samples.iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("least", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_instants_nothing_is_lost_and_nothing_there_twice(
    jobs: JobServer, tiny_model: Path, tmp_path: Path, least: int
) -> None:
    data = write_questions(tmp_path / "data.jsonl", 60)
    assert jobs.run(document(tiny_model, data, "whole")) == 0
    began = time.monotonic()
    assert jobs.run(document(tiny_model, data, "timed"), sample_seconds=0.002) == 0
    longest = time.monotonic() - began
    instants = random.Random(0)
    kills = partial = completed = 0
    while kills < least:
        run, there = f"killed-{completed}", 0
        while jobs.run(
            document(tiny_model, data, run), seconds=instants.uniform(0, longest), sample_seconds=0.002
        ):
            kills += 1
            assert samples_there(run) >= there
            there = samples_there(run)
            partial += 0 < there < 60 * SAMPLES
        assert_same(run, "whole")
        completed += 1
    assert partial >= least // 6


def test_killed_at_each_write_nothing_is_lost_and_nothing_there_twice(
    jobs: JobServer, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_questions(tmp_path / "data.jsonl", 6)

    def run(name: str, at_write: int | None) -> int:
        return jobs.run(document(tiny_model, data, name), at_write=at_write)

    assert run("whole", None) == 0
    writes = kill_at_each_write(run, samples_there, assert_same)
    fragments = 3
    assert writes >= 4 * fragments + 3 + 4  # content, sync, rename, sync of the folder; config; table


def kill_with_vllm(kills: int, model: Path, tmp_path: Path, artifacts: Path) -> None:
    """Run the command line with the real engine, killed that many times."""
    questions = 150
    data = write_questions(tmp_path / "data.jsonl", questions)
    config = tmp_path / "run.toml"
    config.write_text(TOML.format(model=model, data=data))
    environment = {**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "HF_HUB_OFFLINE": "1"}

    def start(run: str) -> subprocess.Popen[str]:
        return warm.popen(
            [ROOT / "cli.py", "vstar", "--config", config, "--run", run],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def finish(run: str) -> float:
        began = time.monotonic()
        process = start(run)
        assert process.wait(300) == 0, process.stderr and process.stderr.read()
        assert process.stderr is not None
        process.stderr.close()
        return time.monotonic() - began

    finish("first")  # loads what every later start has at hand
    longest = finish("whole")
    instants = random.Random(0)
    killed = completed = 0
    while killed < kills:
        process = start(f"killed-{completed}")
        try:
            process.wait(instants.uniform(0.3 * longest, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            samples_there(f"killed-{completed}")
        else:
            completed += 1
        assert process.stderr is not None
        process.stderr.close()
    finish(f"killed-{completed}")
    assert_same(f"killed-{completed}", "whole")


def test_killed_with_the_real_engine_nothing_is_lost(
    tiny_model: Path, tmp_path: Path, artifacts: Path
) -> None:
    kill_with_vllm(2, tiny_model, tmp_path, artifacts)


@pytest.mark.slow
def test_killed_thirty_times_with_the_real_engine_nothing_is_lost(
    tiny_model: Path, tmp_path: Path, artifacts: Path
) -> None:
    kill_with_vllm(30, tiny_model, tmp_path, artifacts)


def test_evicted_by_a_scheduler_stage_one_keeps_what_was_graded(
    tiny_model: Path, tmp_path: Path, artifacts: Path
) -> None:
    """SIGTERM comes seconds before SIGKILL, and a fragment may be a minute old."""
    data = write_questions(tmp_path / "data.jsonl", 200)
    config = tmp_path / "run.toml"
    config.write_text(TOML.format(model=tiny_model, data=data))
    (tmp_path / "watched.py").write_text(WATCHED)
    environment = {**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(tmp_path)
    arguments = [
        "vstar",
        "-c",
        str(config),
        "--set",
        "vstar.num_samples=2000",
        "--set",
        "engine.max_num_seqs=16",
        "--set",
        "grader.name=watched:reward",
    ]
    process = warm.popen(
        [ROOT / "cli.py", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "graded").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert samples_there("test") == 0
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
    assert samples_there("test") > 0
