"""`segments` is killed at any instant and at any write: a re-run completes it to the result of an undisturbed run."""

import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.runs import RunPaths, run_paths
from common.segments.files import SEGMENTS_TABLE
from common.store import addresses, damage, sample_files
from tests.fakes import tiny_config
from tests.killing import JobServer, kill_at_each_write
from tests.stage1_runs import write_questions

SETTINGS = {"solutions": 6, "chosen": 4, "completions": 3, "split": [" "]}
FEW = {"solutions": 6, "chosen": 2, "completions": 2, "split": [" "]}


@pytest.fixture
def jobs(artifacts: Path) -> Iterator[JobServer]:
    with JobServer(artifacts) as server:
        yield server


def document(model: Path, data: Path, run: str, settings: Mapping[str, Any] = SETTINGS) -> dict[str, Any]:
    return tiny_config(model, data, run=run, segments=settings, grader={"workers": 1}).model_dump(
        mode="json", exclude_unset=True
    )


def there(run: str) -> int:
    """How many samples are kept; every file is whole, and no sample is there twice."""
    paths = run_paths(run)
    count = 0
    for folder in (paths.samples, paths.continuations):
        files = sample_files(folder)
        assert all(damage(file) is None for file in files)
        found = addresses(files)
        assert found.n_unique() == found.height
        count += found.height
    return count


def assert_same(run: str, expected: str) -> None:
    ours, theirs = (SEGMENTS_TABLE.read(run_paths(name).segments) for name in (run, expected))
    assert ours[0].equals(theirs[0])
    assert ours[1].identity == theirs[1].identity
    for folder in ("samples", "continuations"):
        assert _samples(run_paths(run), folder).equals(_samples(run_paths(expected), folder))


def _samples(paths: RunPaths, folder: str) -> pl.DataFrame:
    files = sample_files(paths.root / folder)
    return pl.concat(map(pl.read_parquet, files)).sort("prompt_id", "sample_index")


@pytest.mark.parametrize("least", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_instants_nothing_is_lost_and_nothing_there_twice(
    jobs: JobServer, tiny_model: Path, tmp_path: Path, least: int
) -> None:
    data = write_questions(tmp_path / "data.jsonl", 3)

    def run_for(run: str, seconds: float | None = None) -> int:
        order = document(tiny_model, data, run)
        return jobs.run(order, seconds=seconds, sample_seconds=0.002, job="segments")

    assert run_for("warm") == 0
    start = time.monotonic()
    assert run_for("whole") == 0
    duration, whole = time.monotonic() - start, there("whole")
    instants = random.Random(0)
    kills = completed = partial = 0
    while kills < least:
        run, kept = f"killed-{completed}", 0
        # longer if the machine gets slower
        while run_for(run, instants.uniform(0, duration * (1 + kills / 60))):
            kills += 1
            assert there(run) >= kept
            kept = there(run)
            partial += 0 < kept < whole
        assert_same(run, "whole")
        completed += 1
    assert partial >= least // 6


def test_killed_at_each_write_nothing_is_lost_and_nothing_there_twice(
    jobs: JobServer, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_questions(tmp_path / "data.jsonl", 1)

    def run(name: str, at_write: int | None) -> int:
        return jobs.run(document(tiny_model, data, name, FEW), at_write=at_write, job="segments")

    assert run("whole", None) == 0
    writes = kill_at_each_write(run, there, assert_same)
    fragments = sum(
        len(sample_files(run_paths("whole").root / name)) for name in ("samples", "continuations")
    )
    assert writes >= 4 * fragments + 3  # content, sync, rename, sync of the folder; config
