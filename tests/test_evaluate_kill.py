"""An evaluation that is killed again and again ends with the results of an undisturbed one, and draws nothing twice."""

import json
import random
import time
from pathlib import Path

import polars as pl
import pytest

from benchmarks.tiny_model import save_tiny_model, write_questions
from common.runs import run_paths
from common.store import sample_files
from tests.killing import JobServer
from tests.stage2_runs import tiny_config

PARTIAL = 3
"""Of the kills, those in the middle of drawing."""

QUESTIONS = 20
SAMPLES = 3


def drawn(run: str) -> int:
    """How many samples there are, each of them once."""
    there = 0
    for folder in (run_paths(run).evaluations / "samples").glob("*"):
        files = sample_files(folder)
        if files:
            addresses = pl.read_parquet(files, columns=["prompt_id", "sample_index"])
            assert addresses.is_unique().all()
            there += addresses.height
    return there


@pytest.mark.parametrize("least", [7, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants_an_evaluation_has_the_same_results(
    artifacts: Path, tiny_model: Path, tmp_path: Path, least: int
) -> None:
    save_tiny_model(tmp_path / "other", seed=1)
    config = tiny_config(tmp_path, tiny_model, evaluate={"num_samples": SAMPLES})
    assert config.evaluate.data is not None
    write_questions(Path(str(config.evaluate.data.path)), QUESTIONS, first=100)
    document = config.model_dump(mode="json", exclude_none=True)
    document["evaluate"]["benchmarks"] = {
        "hot": {"data": document["evaluate"]["data"], "num_samples": 2, "sampling": {"temperature": 0.5}}
    }
    folders = {"other": str(tmp_path / "other")}
    expected = QUESTIONS * (1 + SAMPLES + 1 + 2 + 1)
    with JobServer(artifacts, "tests.evaluate_jobs") as jobs:

        def run(name: str, **options: float) -> int:
            return jobs.run({**document, "run": name}, folders=folders, sample_seconds=0.003, **options)  # type: ignore[arg-type]

        assert run("first") == 0
        began = time.monotonic()
        assert run("whole") == 0
        longest = time.monotonic() - began
        assert drawn("whole") == expected
        whole = json.loads(run_paths("whole").results("json").read_text())
        instants = random.Random(0)
        kills = completed = partial = 0
        while kills < least or (partial < PARTIAL and kills < 3 * least):
            name, before = f"killed-{completed}", 0
            while run(name, seconds=instants.uniform(0, longest)):
                kills += 1
                assert drawn(name) >= before
                before = drawn(name)
                partial += 0 < before < expected
            assert drawn(name) == expected
            assert json.loads(run_paths(name).results("json").read_text()) == whole
            ours, theirs = (pl.read_parquet(run_paths(each).results("parquet")) for each in (name, "whole"))
            assert ours.equals(theirs)
            completed += 1
    assert partial >= PARTIAL
