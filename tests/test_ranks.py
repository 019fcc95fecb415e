"""Training however it is split: over processes, ZeRO stages and micro-batches. The reference is the formula itself.

The same scripted completions are trained on in every case. Sums are taken in another order, so results agree to
rounding; AdamW divides gradients by their own size, which magnifies the rounding of the smallest.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.formula import ByFormula, by_formula
from stage2_train.config import Config
from tests.stage2_runs import tiny_config, write_tiny_vstar
from tests.train_steps import IN_CHUNKS
from tests.training_jobs import ranks_found

FIGURES_TOLERANCE = 1e-5
"""Relative, for losses, KL, entropy and gradient norm (measured: 2e-6)."""
LOG_RATIO_TOLERANCE = 5e-5
"""Nats per completion (measured: 2e-5); its log-probs add up to hundreds."""
WEIGHTS_TOLERANCE = 2e-5
"""Absolute (measured: 3e-6). Six steps move a weight by up to 6e-3."""
MOVEMENT_TOLERANCE = 1e-3
"""Of a tensor's whole movement (measured: 1e-4 for the key biases, whose gradients are the smallest)."""

ITERATIONS, STEPS, SEQUENCES = 3, 6, 8
BUDGETS = {"a sequence at a time": 1, "in slices": 90, "all at once": 100_000}
SPLITS = [(0, "in slices"), *product((1, 2, 3), BUDGETS)]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    **{
        f"ZeRO-{stage}, {budget}": {"train": {"zero_stage": stage, "tokens_per_micro_batch": BUDGETS[budget]}}
        for stage, budget in SPLITS
    },
    IN_CHUNKS: {"train": {"zero_stage": 3}},
    "gradient checkpointing": {"train": {"zero_stage": 2, "gradient_checkpointing": True}},
}
CASES_OF_FOUR = {name: CASES[name] for name in ("ZeRO-2, in slices", "ZeRO-3, in slices", IN_CHUNKS)}
RUNS = [(1, case) for case in CASES] + [(2, case) for case in CASES] + [(4, case) for case in CASES_OF_FOUR]
Sequences = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """The results of each rank, by the number of processes and the case; the weights at the start."""

    config: Config
    start: dict[str, Tensor]
    found: dict[int, list[dict[str, dict[str, Any]]]]

    def ranks(self, processes: int, case: str) -> list[dict[str, Any]]:
        return [rank[case] for rank in self.found[processes]]

    def sequences(self, processes: int, case: str) -> list[Sequences]:
        """Those of each step, of all ranks."""
        ranks = self.ranks(processes, case)
        return [
            {
                place: sequence
                for rank in ranks
                for place, sequence in rank["steps"][step]["sequences"].items()
            }
            for step in range(STEPS)
        ]


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("ranks")
    config = tiny_config(
        folder,
        tiny_model,
        sampling={"max_completion_tokens": 64},
        train={
            "iterations": ITERATIONS,
            "tokens_per_micro_batch": BUDGETS["in slices"],
            "max_grad_norm": 10.0,
        },
        grader={"workers": 1},
    )
    write_tiny_vstar(config, folder / "vstar.parquet")
    found = ranks_found("train_steps", config, folder, {1: CASES, 2: CASES, 4: CASES_OF_FOUR})
    return Outcome(config, load_file(tiny_model / "model.safetensors"), found)


@pytest.fixture(scope="module")
def reference(outcome: Outcome, tiny_model: Path) -> ByFormula:
    policy, initial = (
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2)
    )
    return by_formula(policy, initial, outcome.sequences(1, next(iter(CASES))), outcome.config.train)


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_every_split_takes_the_steps_of_the_formula(
    outcome: Outcome, reference: ByFormula, processes: int, case: str
) -> None:
    """Each step's loss, gradient norm and log-ratios."""
    for step, sequences in enumerate(outcome.sequences(processes, case)):
        assert sorted(sequences) == sorted(reference.log_ratios[step])
        loss = sum(sequence["loss"] for sequence in sequences.values()) / SEQUENCES
        assert loss == pytest.approx(reference.losses[step], rel=FIGURES_TOLERANCE)
        for place, sequence in sequences.items():
            expected = reference.log_ratios[step][place]
            assert sequence["log_ratio"] == pytest.approx(expected, abs=LOG_RATIO_TOLERANCE)
        for rank in outcome.ranks(processes, case):
            assert rank["steps"][step]["norm"] == pytest.approx(reference.norms[step], rel=FIGURES_TOLERANCE)


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_every_split_ends_with_the_weights_of_the_formula(
    outcome: Outcome, reference: ByFormula, processes: int, case: str
) -> None:
    for rank in outcome.ranks(processes, case):
        assert rank["weights"].keys() == outcome.start.keys() == reference.weights.keys()
        for name, weight in reference.weights.items():
            difference = rank["weights"][name] - weight
            moved = weight - outcome.start[name]
            assert float(difference.abs().max()) < WEIGHTS_TOLERANCE, name
            assert float(difference.norm()) < MOVEMENT_TOLERANCE * float(moved.norm()), name


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_every_rank_reports_the_figures_of_the_whole_batch(
    outcome: Outcome, reference: ByFormula, processes: int, case: str
) -> None:
    whole = outcome.sequences(1, next(iter(CASES)))
    rewards = [[sequence["reward"] for sequence in step.values()] for step in whole]
    lengths = [sum(len(sequence["completion"]) for sequence in step.values()) for step in whole]
    for rank in outcome.ranks(processes, case):
        assert rank["before"] == outcome.found[1][0][case]["before"]
        for iteration in range(ITERATIONS):
            steps = range(2 * iteration, 2 * iteration + 2)
            log_ratios = [value for step in steps for value in reference.log_ratios[step].values()]
            tokens = sum(lengths[step] for step in steps)
            expected = {
                "loss/regression": sum(reference.losses[step] for step in steps) / 2,
                "kl/sequence": sum(log_ratios) / len(log_ratios),
                "reward/mean": sum(sum(rewards[step]) for step in steps) / len(log_ratios),
                "train/gradient_norm": sum(reference.norms[step] for step in steps) / 2,
                "policy/entropy": sum(reference.entropies[step] * lengths[step] for step in steps) / tokens,
            }
            found = {name: values[iteration] for name, values in rank["figures"].items()}
            assert found == pytest.approx(expected, rel=FIGURES_TOLERANCE)


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_all_ranks_hold_the_very_same_weights(outcome: Outcome, processes: int, case: str) -> None:
    first, *others = (rank["weights"] for rank in outcome.ranks(processes, case))
    for other in others:
        for name, weight in first.items():
            assert torch.equal(weight, other[name]), name


def test_the_cases_differ_in_what_they_are_meant_to_compare(outcome: Outcome, reference: ByFormula) -> None:
    """Weights moved, gradients were clipped or not, lengths differ, and ranks had unequal numbers of slices."""
    for name, weight in reference.weights.items():
        assert float((weight - outcome.start[name]).abs().max()) > 50 * WEIGHTS_TOLERANCE, name
    limit = outcome.config.train.max_grad_norm
    assert min(reference.norms) < limit < max(reference.norms)

    def slices(processes: int, case: str) -> list[list[int]]:
        return [[step["slices"] for step in rank["steps"]] for rank in outcome.ranks(processes, case)]

    for stage in (1, 2, 3):
        assert slices(1, f"ZeRO-{stage}, a sequence at a time") == [[SEQUENCES] * STEPS]
        assert slices(1, f"ZeRO-{stage}, all at once") == [[1] * STEPS]
        for processes in (1, 2):
            for rank in slices(processes, f"ZeRO-{stage}, in slices"):
                assert 1 < sum(rank) / STEPS < SEQUENCES / processes
        left, right = slices(2, f"ZeRO-{stage}, in slices")
        assert left != right
    sequences = [value for step in outcome.sequences(1, next(iter(CASES))) for value in step.values()]
    assert {1, 64} < {len(sequence["completion"]) for sequence in sequences}
    assert {0.0, 1.0} == {sequence["reward"] for sequence in sequences}


def test_before_its_first_step_the_policy_is_the_reference_model(outcome: Outcome) -> None:
    for processes, case in RUNS:
        first, *later = outcome.sequences(processes, case)
        assert max(abs(sequence["log_ratio"]) for sequence in first.values()) < LOG_RATIO_TOLERANCE
        assert max(abs(sequence["log_ratio"]) for step in later for sequence in step.values()) > 1e-2
