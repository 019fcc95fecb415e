"""Every objective in the real trainer: over ranks, micro-batches, ZeRO stages and LoRA, and from a checkpoint.

Completions are scripted, so that all cases of an objective train on the very same ones.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objective_steps import ITERATIONS, Counts, is_resumed
from tests.stage2_runs import GRADED, tiny_config, write_tiny_vstar
from tests.training_jobs import ranks_found

WEIGHTS_TOLERANCE = 5e-5
"""Six to twelve steps move a weight by up to 1e-2."""
PROMPTS, STEPS = 12, 2
"""Of an iteration; the data are those of two."""
BUDGET = 160
"""Tokens per micro-batch: several of them in a step."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "astar_po": {},
    "astar_po, two completions": {"group_size": 2},
    "astar_po, the group's V̂*": {"group_size": 2, "vstar": "group"},
    "grpo": {"kl": 0.1, "entropy": 0.1},
    "grpo, two passes": {"passes": 2, "group_size": 3},
    "rebel": {"eta": 20.0},
    "ppo": {"kl": 0.1, "entropy": 0.1, "critic_learning_rate": 1e-3},
    "centred_residual": {"beta": 0.05, "group_size": 3},
    "pmd_mean": {"tau": 0.05},
    "spo": {},
    "qrpo": {"beta": 0.1},
}
SPLITS: dict[str, dict[str, Any]] = {
    "as configured": {"zero_stage": 2, "tokens_per_micro_batch": BUDGET},
    "all at once": {"zero_stage": 1, "tokens_per_micro_batch": 100_000},
    "ZeRO-3": {"zero_stage": 3, "tokens_per_micro_batch": BUDGET},
}
LORA = {"lora": {"rank": 4, "alpha": 8}}
DRAWN_AHEAD = "drawn ahead"
ADAPTED = ("grpo", "rebel", "ppo")


def section(name: str) -> dict[str, Any]:
    return {"name": name.partition(",")[0], **OBJECTIVES[name]}


def cases(*splits: str, adapted: str, few: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """All objectives in these splits, some of them in a few more or with an adapter, one with groups drawn ahead."""
    chosen = [(name, split) for name in OBJECTIVES for split in splits]
    chosen += [(name, split) for name in ADAPTED for split in few]
    plain = {f"{name} | {split}": {"objective": section(name), **SPLITS[split]} for name, split in chosen}
    ahead = "astar_po, two completions"
    plain[f"{ahead} | {DRAWN_AHEAD}"] = {"objective": section(ahead), "zero_stage": 2, "staleness": 1}
    return plain | {
        f"{name} | LoRA, {adapted}": {"objective": section(name), **SPLITS[adapted], **LORA}
        for name in ADAPTED
    }


ONE = cases("as configured", adapted="all at once", few=("all at once",))
TWO = cases("ZeRO-3", adapted="ZeRO-3", few=("as configured",))
RUNS = [(1, case) for case in ONE] + [(2, case) for case in TWO]
Found = dict[int, list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of one process and of two found, by case."""
    folder = tmp_path_factory.mktemp("objectives")
    config = tiny_config(
        folder,
        tiny_model,
        data={"limit": 2 * PROMPTS},
        sampling={"max_completion_tokens": 48},
        train={"iterations": ITERATIONS, "batch_size": PROMPTS, "mini_batch_size": PROMPTS // STEPS},
        grader={"workers": 1},
    )
    write_tiny_vstar(config, folder / "vstar.parquet", made_up=GRADED)
    return ranks_found("objective_steps", config, folder, {1: ONE, 2: TWO})


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    ("processes", "case"),
    [
        (processes, case)
        for processes, case in RUNS
        if is_resumed(processes, {1: ONE, 2: TWO}[processes][case]["objective"]["name"])
    ],
)
def test_a_run_from_a_checkpoint_is_the_uninterrupted_one(found: Found, processes: int, case: str) -> None:
    """Bit for bit, the critic and what is remembered of prompts included."""
    for rank in found[processes]:
        whole, resumed = rank[case]["weights"], rank[case]["resumed"]
        assert whole.keys() == resumed.keys()
        for name, weight in whole.items():
            assert torch.equal(weight, resumed[name]), name
        last, again = rank[case]["metrics"][-1], rank[case]["resumed metrics"][-1]
        varies = ("time/", "throughput/", "memory/")
        for name, value in last.items():
            assert name.startswith(varies) or again[name] == value or name == "engine/rebuilds", name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_split_of_a_step_gives_the_same_policy(found: Found, name: str) -> None:
    reference = found[1][0][f"{name} | as configured"]
    assert difference(reference["start"], reference["weights"]) > 1e-3
    others = [
        (processes, case)
        for processes, case in RUNS
        if case.startswith(f"{name} | ") and "LoRA" not in case and DRAWN_AHEAD not in case
    ]
    assert len(others) >= 2
    for processes, case in others:
        for rank in found[processes]:
            assert difference(rank[case]["weights"], reference["weights"]) < WEIGHTS_TOLERANCE, case


@pytest.mark.parametrize("case", TWO)
def test_ranks_hold_the_very_same_weights_and_report_the_same_figures(found: Found, case: str) -> None:
    first, second = (rank[case] for rank in found[2])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    for ours, theirs in zip(first["metrics"], second["metrics"], strict=True):
        shared = [name for name in ours if name.startswith(("loss/", "reward/", "kl/", "train/", "policy/"))]
        assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_report_the_figures_of_one(found: Found, name: str) -> None:
    alone = found[1][0][f"{name} | as configured"]["metrics"]
    two = found[2][0][f"{name} | ZeRO-3"]["metrics"]
    for ours, theirs in zip(alone, two, strict=True):
        for figure, value in ours.items():
            if figure.startswith(("loss/", "reward/", "kl/", "advantage/", "policy/")):
                assert theirs[figure] == pytest.approx(value, rel=1e-3, abs=1e-5), figure


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_trained_alone(found: Found, name: str) -> None:
    case = found[1][0][f"{name} | LoRA, all at once"]
    moved = {
        part
        for part, weight in case["weights"].items()
        if part in case["start"] and not torch.equal(weight, case["start"][part])
    }
    policy = {part for part in moved if not part.startswith("critic.")}
    assert policy
    assert all("_proj" in part for part in policy)
    critic = {part for part in case["weights"] if part.startswith("critic.")}
    assert bool(critic) == (name == "ppo")
    assert all(".lora_" in part or ".score." in part for part in critic)


def test_what_a_node_needs_once_is_done_by_one_of_its_ranks_and_fails_on_all(found: Found) -> None:
    """So is the hash of a model's weights."""
    seen = [rank["once a node"] for rank in found[2]]
    assert [rank["did"] for rank in seen] == [[0], []]
    assert {rank["result"] for rank in seen} == {"of rank 0"}
    assert {rank["error"] for rank in seen} == {"no model on rank 0"}


def costs(
    *models: str, group: int = 1, scored: int = 1, critic: bool = False, more: int = 0, passes: int = 1
) -> Counts:
    """Three iterations; completions are `scored` so often without gradients, and `more` of them once again."""
    completions = group * PROMPTS * ITERATIONS
    return Counts(
        drawn=completions,
        trained=passes * completions,
        scored=scored * completions + more,
        critic_trained=completions if critic else 0,
        critic_scored=completions if critic else 0,
        models=["policy", *models],
        optimizers=2 if critic else 1,
    )


EXPECTED: dict[str, Counts] = {
    "astar_po": costs("reference"),
    "astar_po, two completions": costs("reference", group=2),
    "astar_po, the group's V̂*": costs("reference", group=2),
    "grpo": costs("reference", group=2, scored=2),
    "grpo, two passes": costs("reference", group=3, scored=2, passes=2),
    "rebel": costs(group=2),
    "ppo": costs("critic", "reference", scored=2, critic=True),
    "centred_residual": costs("reference", group=3),
    "pmd_mean": costs(group=4),
    # π_old and the new completion each time, in the third iteration also the completions of the first one's prompts
    "spo": costs(scored=2, more=PROMPTS),
    "qrpo": costs("reference"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_objective_pays_for_what_it_needs_and_for_nothing_else(found: Found, name: str) -> None:
    """A*-PO: one completion per prompt, one pass of one reference, one pass of one policy, one optimizer."""
    assert EXPECTED.keys() == OBJECTIVES.keys()
    assert Counts(**found[1][0][f"{name} | as configured"]["counts"]) == EXPECTED[name]


def test_the_cases_differ_in_what_they_are_meant_to_compare(found: Found) -> None:
    for name in ADAPTED:
        several, few = (
            found[1][0][f"{name} | {split}"]["slices"] for split in ("as configured", "all at once")
        )
        assert all(more > fewer for more, fewer in zip(several, few, strict=True))
    for name in OBJECTIVES:
        assert min(found[1][0][f"{name} | as configured"]["slices"]) > 1
    left, right = ([rank[f"{name} | ZeRO-3"]["slices"] for name in OBJECTIVES] for rank in found[2])
    assert left != right
