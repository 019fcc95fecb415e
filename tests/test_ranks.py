"""One training step however it is split: over processes, ZeRO stages and micro-batches.

The same scripted completions are trained on by one process and by two. Sums are taken in another order, so results
agree to rounding; AdamW divides gradients by their own size, which magnifies the rounding of the smallest.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.stage2_runs import tiny_config, write_tiny_vstar
from tests.train_steps import FIGURES, IN_CHUNKS

ROOT = Path(__file__).parents[1]
FIGURES_TOLERANCE = 1e-5
"""Relative, for losses, KL, entropy and gradient norm."""
WEIGHTS_TOLERANCE = 5e-5
"""Absolute (measured: 1e-5). Four steps move a weight by up to 4e-3."""
MOVEMENT_TOLERANCE = 5e-3
"""Of a tensor's whole movement (measured: 1e-3 for the key biases, whose gradient is rounding alone; others 1e-5)."""
BASELINE = "ZeRO-2"
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_stage": 0},
    "ZeRO-1": {"zero_stage": 1},
    BASELINE: {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    IN_CHUNKS: {"zero_stage": 3},
    "a sequence at a time": {"zero_stage": 2, "tokens_per_micro_batch": 1},
    "all at once": {"zero_stage": 2, "tokens_per_micro_batch": 100_000},
    "gradient checkpointing": {"zero_stage": 2, "gradient_checkpointing": True},
}


@dataclass(frozen=True)
class Outcome:
    """What each rank found, by case."""

    figures: list[dict[str, dict[str, Any]]]
    weights: list[dict[str, dict[str, torch.Tensor]]]


def run(folder: Path, model: Path, processes: int) -> Outcome:
    config = tiny_config(
        folder,
        model,
        sampling={"max_completion_tokens": 16},
        train={"iterations": 2, "tokens_per_micro_batch": 55},
    )
    write_tiny_vstar(config, folder / "vstar.parquet")
    cases = {
        name: config.model_copy(update={"train": config.train.model_copy(update=change)}).model_dump(
            mode="json"
        )
        for name, change in CASES.items()
    }
    job = folder / f"job-{processes}.json"
    output = folder / f"outcome-{processes}"
    job.write_text(
        json.dumps({"cases": cases, "vstar": str(folder / "vstar.parquet"), "output": str(output)})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    finished = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.train_steps", str(job)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = [torch.load(f"{output}.{rank}") for rank in range(processes)]
    return Outcome([figures for figures, _ in found], [weights for _, weights in found])


@pytest.fixture(scope="module")
def start(tiny_model: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(tiny_model / "model.safetensors")
    return weights


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcome]:
    found = {processes: run(tmp_path_factory.mktemp("ranks"), tiny_model, processes) for processes in (1, 2)}
    return found.__getitem__


def assert_same(
    outcome: Outcome, rank: int, case: str, reference: Outcome, start: dict[str, torch.Tensor]
) -> None:
    ours, theirs = outcome.figures[rank][case], reference.figures[0][BASELINE]
    for name in ("pass_at_1", *FIGURES):
        assert ours[name] == pytest.approx(theirs[name], rel=FIGURES_TOLERANCE), name
    assert outcome.weights[rank][case].keys() == start.keys()
    for name, weight in reference.weights[0][BASELINE].items():
        difference = outcome.weights[rank][case][name] - weight
        moved = weight - start[name]
        assert float(difference.abs().max()) < WEIGHTS_TOLERANCE, name
        assert float(difference.norm()) < MOVEMENT_TOLERANCE * float(moved.norm()), name


@pytest.mark.parametrize("case", CASES)
def test_one_process_gives_the_same_step_in_every_way(
    outcome: Callable[[int], Outcome], start: dict[str, torch.Tensor], case: str
) -> None:
    assert_same(outcome(1), 0, case, outcome(1), start)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_step_of_one(
    outcome: Callable[[int], Outcome], start: dict[str, torch.Tensor], case: str
) -> None:
    for rank in range(2):
        assert_same(outcome(2), rank, case, outcome(1), start)


@pytest.mark.parametrize("case", CASES)
def test_both_processes_hold_the_very_same_weights(outcome: Callable[[int], Outcome], case: str) -> None:
    first, second = (weights[case] for weights in outcome(2).weights)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_the_cases_differ_in_what_they_are_meant_to_compare(
    outcome: Callable[[int], Outcome], start: dict[str, torch.Tensor]
) -> None:
    """Training moved the weights, slices were many or one, and the two ranks had unequal numbers of them."""
    for name, weight in outcome(1).weights[0][BASELINE].items():
        assert float((weight - start[name]).abs().max()) > 50 * WEIGHTS_TOLERANCE, name
    one = outcome(1).figures[0]
    assert one["a sequence at a time"]["slices"] == [8] * 4
    assert one["all at once"]["slices"] == [1] * 4
    left, right = (figures[BASELINE]["slices"] for figures in outcome(2).figures)
    assert left != right
    assert 0 < one[BASELINE]["pass_at_1"] < 1
    assert all(norm > 0 for norm in one[BASELINE]["train/gradient_norm"])


def test_before_its_first_step_the_policy_is_the_reference(outcome: Callable[[int], Outcome]) -> None:
    for processes in (1, 2):
        for figures in outcome(processes).figures:
            for case in CASES:
                first, *later = figures[case]["log_ratios"]
                assert len(first) == 8 / processes
                assert max(map(abs, first)) < 1e-4
                assert max(abs(value) for step in later for value in step) > 1e-2
