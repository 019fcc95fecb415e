"""The critic's training however it is split, compared with its formula written out in torch.

The formula reads each state by itself: its tokens alone, the logit at the last one. So the tests also show that states
read along a trajectory have the same values, and that a state which solutions share counts once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from common.data.rendering import PromptRenderer
from stage2_train.config import Config
from stage2_train.critic_job.batches import optimizer_steps
from stage2_train.critic_job.states import Trajectory, is_held_out, read_critic_data, trajectories
from stage2_train.critic_job.training import cross_entropy
from tests.critic_steps import steps_of
from tests.stage2_runs import tiny_config
from tests.step_tables import write_solutions
from tests.training_jobs import ranks_found

FIGURES_TOLERANCE = 1e-5
"""Relative, for losses and gradient norms."""
WEIGHTS_TOLERANCE = 2e-5
"""Absolute; steps of 1e-3 move a weight by up to 5e-3."""
LOGITS_TOLERANCE = 1e-4

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "without ZeRO, all at once": {"train": {"zero_stage": 0, "tokens_per_micro_batch": 100_000}},
    "ZeRO-2, in slices": {"train": {"zero_stage": 2, "tokens_per_micro_batch": 90}},
    "ZeRO-3, a trajectory at a time": {"train": {"zero_stage": 3, "tokens_per_micro_batch": 1}},
    "gradient checkpointing": {"train": {"zero_stage": 1, "gradient_checkpointing": True}},
}
FEWER_TRAJECTORIES_THAN_RANKS = "one trajectory a step"
LONE = {
    FEWER_TRAJECTORIES_THAN_RANKS: {
        "critic": {"batch_size": 1, "learning_rate": 1e-4},
        "train": {"zero_stage": 3},
    }
}
RUNS = [(processes, case) for processes in (1, 2) for case in CASES]


@dataclass(frozen=True)
class Outcome:
    """What each rank found, by the number of processes; and what the formula gives."""

    found: dict[int, list[dict[str, dict[str, Any]]]]
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    start: dict[str, Tensor]
    logits: dict[int, float]


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("critic")
    config = critic_config(
        tiny_config(folder, tiny_model, train={"gradient_checkpointing": False}),
        learning_rate=1e-3,
        batch_size=40,
    )
    rows = write_solutions(config, folder / "segments.parquet")
    found = ranks_found("critic_steps", config, folder, {1: CASES | LONE, 2: CASES | LONE})
    return formula(config, rows, folder / "segments.parquet", found)


def critic_config(config: Config, **settings: Any) -> Config:
    document = config.model_dump(mode="json", exclude_none=True)
    return Config.model_validate({**document, "critic": settings})


def formula(config: Config, rows: pl.DataFrame, table: Path, found: Any) -> Outcome:
    """Equation 3.8 with the loss of Section 3.2: each state by itself, all of a step at once, plain AdamW."""
    renderer = PromptRenderer(Path(config.model.path), config.data)
    model = AutoModelForTokenClassification.from_pretrained(
        config.model.path, num_labels=1, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.zero_()
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    train = config.train
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.critic.learning_rate,
        betas=train.adam_betas,
        weight_decay=train.weight_decay,
    )

    def logit(state: int) -> Tensor:
        row = rows.row(state, named=True)
        tokens = [*renderer.render(row["prompt"]), *row["prefix_token_ids"]]
        found: Tensor = model(torch.tensor([tokens])).logits[0, -1, 0]
        return found

    losses, norms = [], []
    for step in steps_of(config, read_critic_data(table, config.data, renderer, 0.0)):
        numbers = [state for each in step for state in each.states]
        predicted = torch.stack([logit(state) for state in numbers]).sigmoid()
        values = torch.tensor([rows["value"][state] for state in numbers])
        loss = -(values * predicted.log() + (1 - values) * (1 - predicted).log()).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)))
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = {state: logit(state).item() for state in range(rows.height)}
    return Outcome(found, losses, norms, model.state_dict(), start, logits)


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_every_split_takes_the_steps_of_the_formula(outcome: Outcome, processes: int, case: str) -> None:
    for rank in outcome.found[processes]:
        steps = rank[case]["steps"]
        assert [step["loss/cross_entropy"] for step in steps] == pytest.approx(
            outcome.losses, rel=FIGURES_TOLERANCE
        )
        assert [step["train/gradient_norm"] for step in steps] == pytest.approx(
            outcome.norms, rel=FIGURES_TOLERANCE
        )


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_every_split_ends_with_the_weights_of_the_formula(
    outcome: Outcome, processes: int, case: str
) -> None:
    weights = outcome.found[processes][0][case]["weights"]
    assert weights.keys() == outcome.weights.keys()
    moved = 0.0
    for name, weight in outcome.weights.items():
        assert float((weights[name] - weight).abs().max()) < WEIGHTS_TOLERANCE, name
        moved = max(moved, float((weight - outcome.start[name]).abs().max()))
    assert moved > 50 * WEIGHTS_TOLERANCE


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_every_rank_has_the_logits_of_all_states(outcome: Outcome, processes: int, case: str) -> None:
    for rank in outcome.found[processes]:
        assert rank[case]["logits"] == pytest.approx(outcome.logits, abs=LOGITS_TOLERANCE)
    assert max(outcome.logits.values()) - min(outcome.logits.values()) > 100 * LOGITS_TOLERANCE


def test_a_rank_without_a_trajectory_of_a_step_adds_nothing_to_it(outcome: Outcome) -> None:
    alone, together = (outcome.found[n][0][FEWER_TRAJECTORIES_THAN_RANKS] for n in (1, 2))
    assert len(alone["steps"]) > 50
    for name, weight in alone["weights"].items():
        assert float((together["weights"][name] - weight).abs().max()) < WEIGHTS_TOLERANCE, name
        assert not torch.equal(weight, outcome.start[name]), name


def test_the_loss_has_the_gradient_of_the_formula() -> None:
    """(sigmoid(z) − y) / n for each state, and the least loss where the sigmoid is the value."""
    logits = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    values = torch.tensor([0.25, 0.5, 1.0])
    cross_entropy(logits, values, states=5).backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, (logits.detach().sigmoid() - values) / 5)
    assert float(logits.grad[1]) == 0


def test_a_state_that_solutions_share_is_in_one_trajectory() -> None:
    states = {0: (), 1: (7,), 2: (7, 8), 3: (7, 8, 0), 4: (7, 9), 5: (7, 9, 9, 0), 6: (5, 0)}
    found = list(trajectories([1, 2], states))
    assert sorted(state for each in found for state in each.states) == list(states)
    assert sorted(list(each.token_ids) for each in found) == [
        [1, 2, 5, 0],
        [1, 2, 7, 8, 0],
        [1, 2, 7, 9, 9, 0],
    ]
    for each in found:
        for state, end in zip(each.states, each.ends, strict=True):
            assert tuple(each.token_ids[:end]) == (1, 2, *states[state])


def test_steps_have_about_as_many_states_and_every_trajectory_once_an_epoch() -> None:
    sizes = [1 + number % 7 for number in range(200)]
    everything = [
        Trajectory(token_ids=range(size), ends=tuple(range(size)), states=tuple(range(size)))
        for size in sizes
    ]
    steps = optimizer_steps(everything, 64, seed=3, epoch=0)
    assert len(steps) == round(sum(sizes) / 64)
    assert all(abs(sum(len(each.states) for each in step) - 64) < 10 for step in steps)
    assert sorted(len(each) for step in steps for each in step) == sorted(sizes)
    lengths = [[len(each) for each in step] for step in steps]
    assert lengths == [[len(each) for each in step] for step in optimizer_steps(everything, 64, 3, 0)]
    assert lengths != [[len(each) for each in step] for step in optimizer_steps(everything, 64, 3, 1)]
    assert len(optimizer_steps(everything, 10**6, seed=3, epoch=0)) == 1


def test_a_share_of_prompts_is_held_out_and_a_larger_share_holds_the_same_ones_out() -> None:
    prompts = [f"{number:024x}" for number in range(4000)]
    some = {prompt for prompt in prompts if is_held_out(prompt, 0.05)}
    more = {prompt for prompt in prompts if is_held_out(prompt, 0.2)}
    assert some < more
    assert len(some) / 4000 == pytest.approx(0.05, abs=0.015)
    assert not any(is_held_out(prompt, 0.0) for prompt in prompts)
