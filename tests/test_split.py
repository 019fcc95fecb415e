"""A run goes on with another number of processes and under another ZeRO stage, from DeepSpeed's converted files.

Completions are scripted, so that every split trains on the very same ones. A conversion only moves numbers: weights and
moments are bit for bit those of the checkpoint. What follows is summed in another order, and agrees to rounding.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from stage2_train.resume import refuse_other_zero
from stage2_train.split import Split
from tests.objective_steps import ITERATIONS
from tests.stage2_runs import GRADED, tiny_config, write_tiny_vstar
from tests.train_steps import changed
from tests.training_jobs import ranks_found

WEIGHTS_TOLERANCE = 2e-5
"""Absolute, after the two or four steps of an iteration, which move a weight by up to 4e-3; as in test_ranks.py."""
BFLOAT16_TOLERANCE = 4e-3
"""The same in bfloat16, whose gradients have three digits: AdamW may move the smallest of them either way."""
FIGURES_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative."""
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
    "2 to 1": Case(saved=(2, 2), continued=(1, 2), is_tied=True),
    "1 to 2": Case(saved=(1, 2), continued=(2, 2), train={"staleness": 1}),
    "2 to 1 under ZeRO-3": Case(saved=(2, 3), continued=(1, 3)),
    "1 to 2 under ZeRO-3": Case(saved=(1, 3), continued=(2, 3), train={"lora": LORA}),
    "1 to 2 without ZeRO": Case(saved=(1, 0), continued=(2, 0)),
    "ZeRO-2 to 3": Case(saved=(2, 2), continued=(2, 3), train={"objective": {"name": "spo"}}),
    "ZeRO-3 to 2": Case(saved=(2, 3), continued=(2, 2), is_tied=True),
    "ZeRO-1 to 2": Case(saved=(1, 1), continued=(1, 2)),
    "2 to 1, ZeRO-3 to 2, PPO": Case(saved=(2, 3), continued=(1, 2), train={"objective": PPO}),
    "1 to 2, ZeRO-2 to 3, PPO, LoRA": Case(
        saved=(1, 2), continued=(2, 3), train={"objective": PPO, "lora": LORA}
    ),
    "1 to 2, offloaded": Case(saved=(1, 2), continued=(2, 3), train={"offload_optimizer": True}),
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
    orders: dict[bool, dict[int, dict[str, Any]]] = {
        continues: {1: {}, 2: {}} for continues in (False, True)
    }
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
    tolerance = WEIGHTS_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    assert difference(first["weights"], whole["weights"]) < tolerance
    assert all(difference(first["weights"], other["weights"]) == 0 for other in others)
    for figure, value in whole["metrics"].items():
        if figure.startswith(("loss/", "reward/", "kl/", "advantage/", "policy/", "train/gradient_norm")):
            expected = pytest.approx(value, rel=FIGURES_TOLERANCE[dtype], abs=1e-5)
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
        (0, 3, "1 process under ZeRO-3, which cannot be continued without ZeRO: set train.zero_stage to 1, 2 or 3"),
    ],
)
def test_between_zero_and_none_a_run_cannot_go_on(ours: int, saved: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        refuse_other_zero(
            Path("iteration-000002"),
            Split(processes=2, zero_stage=ours),
            Split(processes=1, zero_stage=saved),
        )
