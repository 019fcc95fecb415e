"""A run of commit 31beced, the last one before stage 2 was redesigned: read, and continued to the same result.

tests/golden/31beced holds it as that commit left it after two iterations (`run`, less the scripts that DeepSpeed adds
to a checkpoint), and what that commit made of it in a third one (`continued`). It is never written again. The samples
of a seed are others since: to compare the third iteration, completions are drawn as they were then.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.vstar_file import read_vstar
from tests import warm
from tests.conftest import ROOT, RunCli

FORMAT = ROOT / "tests" / "golden" / "31beced"
CONFIG = FORMAT / "run.toml"
VARIES = ("time/", "throughput/", "memory/")


@pytest.fixture
def run(artifacts: Path) -> Path:
    folder = artifacts / "old"
    shutil.copytree(FORMAT / "run", folder)
    return folder


@pytest.fixture(autouse=True)
def reward_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rows(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(VARIES)} for line in lines]


def test_its_table_is_read_and_its_samples_give_the_same_one(run: Path, run_cli: RunCli) -> None:
    before, provenance = read_vstar(run / "vstar.parquet")
    assert provenance.identity["grader"].startswith("tests.golden_reward:reward@")
    assert len(set(before["vstar"])) > 3
    finished = run_cli("vstar", "--config", CONFIG, "--allow-mismatch", "versions", warm=True)
    assert finished.returncode == 0, finished.stderr
    assert "samples to draw" not in finished.stdout
    assert read_vstar(run / "vstar.parquet")[0].equals(before)


def test_its_trained_model_needs_nothing_more(run: Path, run_cli: RunCli) -> None:
    finished = run_cli("train", "--config", CONFIG, warm=True)
    assert finished.returncode == 0, finished.stderr
    assert "nothing to do" in finished.stdout


def test_its_checkpoint_is_continued_to_the_same_result(run: Path, artifacts: Path, tmp_path: Path) -> None:
    finished = warm.run(
        ["-m", "tests.golden_train", "train", "--config", CONFIG, "--set", "train.iterations=3"],
        cwd=tmp_path,
        env={**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "HF_HUB_OFFLINE": "1"},
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    assert "continuing after iteration 2" in finished.stdout
    ours, theirs = rows(run / "metrics.jsonl"), rows(FORMAT / "continued" / "metrics.jsonl")
    assert [row["iteration"] for row in ours] == [0, 1, 2, 3]
    assert ours[:3] == theirs[:3]
    assert ours[3] == pytest.approx(theirs[3], rel=1e-4, abs=1e-6)
    expected = load_file(FORMAT / "continued" / "model.safetensors")
    found = load_file(run / "model" / "model.safetensors")
    start = load_file(FORMAT / "run" / "base_model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)
        assert float((weight - start[name]).abs().max()) > 1e-3, name


def test_another_objective_does_not_go_on_with_its_checkpoint(run: Path, run_cli: RunCli) -> None:
    overrides = ("--set", "train.objective.name=grpo", "--set", "train.iterations=3")
    finished = run_cli("train", "--config", CONFIG, "--vstar", run / "vstar.parquet", *overrides, warm=True)
    assert finished.returncode == 2
    assert "was made with another config" in finished.stderr
    assert "objective.name is" in finished.stderr
    assert "choose another --run" in finished.stderr
