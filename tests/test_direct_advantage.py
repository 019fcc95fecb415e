"""Training on known advantages: its data and batches, its minimiser, the trainer over ranks and restarts, refusals."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError
from common.runs import run_paths
from common.segments.files import ADVANTAGES_TABLE
from stage1_vstar.advantages.filter import filter_states
from stage2_train.config import Config
from stage2_train.data import TrainingData, prepare
from stage2_train.objectives.direct_advantage import DirectAdvantage
from stage2_train.ranks import ALONE, Ranks
from stage2_train.sources.offline import OfflineSource
from tests.batches import batch_of, loss_of, minimising_logits, tensor
from tests.conftest import RunCli
from tests.objective_steps import ITERATIONS
from tests.stage2_runs import as_toml, tiny_config, trained_offline, write_tiny_vstar
from tests.step_tables import write_advantages
from tests.training_jobs import ranks_found

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")

OBJECTIVE = {"name": "direct_advantage", "beta": 0.1}


def configured(folder: Path, model: Path, **sections: Any) -> Config:
    config = tiny_config(folder, model)
    document = config.model_dump(mode="json", exclude_none=True)
    document["train"] = {**document["train"], "objective": OBJECTIVE}
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return Config.model_validate(document)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, artifacts: Path) -> Config:
    """A run with a table of advantages: 64 states of 32 prompts, a few of them dropped."""
    config = configured(tmp_path, tiny_model)
    write_advantages(config, run_paths(config.run).advantages, min_gap=0.3)
    return config


def prepared(config: Config, **sections: Any) -> TrainingData:
    document = config.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return prepare(Config.model_validate(document), run_paths(config.run).advantages)


# Data and batches.


def test_the_data_are_the_pairs_of_the_states_that_are_kept(config: Config) -> None:
    data, rows = prepared(config), ADVANTAGES_TABLE.read(run_paths(config.run).advantages)[0]
    kept = rows.filter("keep")
    assert data.advantages is not None
    assert 0 < len(data.advantages) == kept.height < rows.height
    prompts = {prompt.id: prompt for prompt in data.prompts}
    for unit, row in enumerate(kept.iter_rows(named=True)):
        group = data.advantages.group(unit)
        before = (*prompts[row["prompt_id"]].token_ids, *row["prefix_token_ids"])
        assert {tuple(pair.prompt.token_ids) for pair in group} == {before}
        assert [list(pair.completion.token_ids) for pair in group] == row["action_token_ids"]
        assert [pair.advantage for pair in group] == row["advantages"]
    dropped = rows.height - kept.height
    assert "action_texts" not in data.advantages.rows.columns
    assert data.advantages.lines() == [
        f"{kept.height} states of {len(prompts)} prompts with {data.advantages.pairs} (state, action) pairs, values by "
        "Monte Carlo, gap of at least 0.3",
        f"{dropped} other states were dropped by gap < 0.3: {dropped}",
    ]


def test_after_a_filter_its_rules_are_said_and_not_the_gap_of_before(config: Config, tmp_path: Path) -> None:
    table, chosen = run_paths(config.run).advantages, tmp_path / "chosen.parquet"
    filter_states(table, chosen, min_gap=0.0, where=["step = 0"])
    advantages = prepare(config, chosen).advantages
    assert advantages is not None
    (line,) = advantages.lines()
    assert line.endswith("values by Monte Carlo, after dropping by one next step, not where step = 0")


def test_pairs_alone_are_the_same_pairs_and_repeated_ones_are_as_many_as_were_drawn(config: Config) -> None:
    states = prepared(config).advantages
    pairs = prepared(config, train={"objective": OBJECTIVE | {"state_wise": False}}).advantages
    repeated = prepared(config, advantages={"unique": False}).advantages
    assert states is not None
    assert pairs is not None
    assert repeated is not None
    everything = [pair for unit in range(len(states)) for pair in states.group(unit)]
    assert [pairs.group(unit) for unit in range(len(pairs))] == [[pair] for pair in everything]
    counts = [count for row in states.rows["action_counts"] for count in row]
    found = [pair for unit in range(len(repeated)) for pair in repeated.group(unit)]
    assert found == [pair for pair, count in zip(everything, counts, strict=True) for _ in range(count)]
    assert len(repeated) == len(states)
    assert len({each.digest() for each in (states, repeated)}) == 2


def test_a_state_is_in_one_step_of_one_rank_and_seen_once_an_epoch(config: Config) -> None:
    data = prepared(config)
    assert data.advantages is not None
    batches: list[list[str]] = []
    for number in range(1, 9):
        shares = [
            OfflineSource(config, data.advantages, Ranks(rank, 2, torch.device("cpu"))).groups(number, 8, {})
            for rank in range(2)
        ]
        whole = OfflineSource(config, data.advantages, ALONE).groups(number, 8, {})
        assert [shares[place % 2][place // 2] for place in range(16)] == whole
        assert all(len({pair.prompt.id for pair in group}) == 1 for group in whole)
        batches.append([group[0].prompt.id for group in whole])
    seen = [state for batch in batches for state in batch]
    count = len(data.advantages)
    assert len(set(seen[:count])) == count
    assert seen[:count] != sorted(seen[:count])


# The minimiser, on two states of three actions each, whose policy is a softmax per state.

ADVANTAGES_SA = torch.tensor([[0.3, 0.0, -0.3], [0.1, -0.05, -0.05]], dtype=torch.float64)
REFERENCE_SA = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64).log()
BETA = 0.5


def minimised(loss: Callable[[Tensor], Tensor]) -> Tensor:
    return minimising_logits(loss, REFERENCE_SA).log_softmax(-1)


def test_the_objective_reaches_the_minimiser_of_its_formula_which_is_a_better_policy() -> None:
    objective = DirectAdvantage(name="direct_advantage", beta=BETA)
    batch = batch_of(
        [1] * 6,
        tensor([0.0] * 6),
        reference_K=REFERENCE_SA.flatten(),
        advantages_B=ADVANTAGES_SA.flatten(),
    )

    def by_the_formula(logits: Tensor) -> Tensor:
        ratio_SA = logits.log_softmax(-1) - REFERENCE_SA
        return ((ADVANTAGES_SA / BETA - ratio_SA) ** 2).mean() / 2

    ours = minimised(lambda logits: loss_of(objective, logits.log_softmax(-1).flatten(), batch).share)
    theirs = minimised(by_the_formula)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    # ∂ℓ/∂logit of an action is its residual less π times the state's residuals, which cannot all be 0.
    residual_SA = ADVANTAGES_SA / BETA - (ours - REFERENCE_SA)
    torch.testing.assert_close(residual_SA, ours.exp() * residual_SA.sum(-1, keepdim=True), rtol=0, atol=1e-6)
    expected_S = (ours.exp() * ADVANTAGES_SA).sum(-1)
    assert (expected_S > (REFERENCE_SA.exp() * ADVANTAGES_SA).sum(-1)).all()


# The trainer.

SPLITS: dict[str, dict[str, Any]] = {
    "states": {"zero_stage": 2, "tokens_per_micro_batch": 160},
    "states, all at once": {"zero_stage": 1, "tokens_per_micro_batch": 100_000},
    "states, ZeRO-3": {"zero_stage": 3, "tokens_per_micro_batch": 160},
    "states, LoRA": {"zero_stage": 2, "lora": {"rank": 4, "alpha": 8}},
    "pairs": {"objective": OBJECTIVE | {"state_wise": False}, "zero_stage": 2},
}
ONE = ("states", "states, all at once", "pairs", "states, LoRA")
TWO = ("states", "states, ZeRO-3", "pairs")
Found = dict[int, list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of one process and of two found, by case."""
    folder = tmp_path_factory.mktemp("direct-advantage")
    config = configured(folder, tiny_model, train={"iterations": ITERATIONS}, grader={"workers": 1})
    write_advantages(config, folder / "advantages.parquet")
    cases = {
        count: {name: {"objective": OBJECTIVE, **SPLITS[name]} for name in names}
        for count, names in ((1, ONE), (2, TWO))
    }
    return ranks_found("objective_steps", config, folder, cases)


@pytest.mark.parametrize(("processes", "case"), [*product([1], ONE), *product([2], TWO)])
def test_a_run_from_a_checkpoint_is_the_uninterrupted_one(found: Found, processes: int, case: str) -> None:
    for rank in found[processes]:
        for name, weight in rank[case]["weights"].items():
            assert torch.equal(weight, rank[case]["resumed"][name]), name
        assert any(
            not torch.equal(weight, rank[case]["start"][name])
            for name, weight in rank[case]["weights"].items()
        )


@pytest.mark.parametrize("case", ["states", "states, ZeRO-3", "states, all at once"])
def test_every_split_of_a_step_gives_the_same_policy(found: Found, case: str) -> None:
    reference = found[1][0]["states"]["weights"]
    for ranks in found.values():
        for rank in ranks:
            for name, weight in rank.get(case, {"weights": reference})["weights"].items():
                assert float((weight - reference[name]).abs().max()) < 5e-5, name
    assert sum(case in rank for ranks in found.values() for rank in ranks) >= 1


def test_two_ranks_report_the_figures_of_one_and_none_of_rewards(found: Found) -> None:
    for case in ("states", "pairs"):
        for ours, theirs in zip(found[1][0][case]["metrics"], found[2][0][case]["metrics"], strict=True):
            assert not any(name.startswith(("reward/", "engine/", "evaluate/")) for name in ours)
            assert "completion/truncated" not in ours
            for name in ("loss/regression", "policy/log_ratio", "advantage/mean", "train/gradient_norm"):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), name


def test_an_iteration_trains_on_each_pair_once_and_draws_nothing(found: Found) -> None:
    counts = found[1][0]["pairs"]["counts"]
    assert counts["drawn"] == 0
    assert counts["models"] == ["policy", "reference"]
    assert counts["trained"] == counts["scored"] == 16 * ITERATIONS
    counts = found[1][0]["states"]["counts"]
    assert counts["trained"] == counts["scored"] > 2 * 16 * ITERATIONS


# The job.


def test_training_needs_no_engine_and_continues_exactly(config: Config, run_cli: RunCli) -> None:
    def of(iterations: int, run: str) -> Config:
        train = config.train.model_copy(update={"iterations": iterations, "mini_batch_size": 16})
        return config.model_copy(update={"train": train, "run": run})

    table = run_paths(config.run).advantages
    for run in ("whole", "parts"):
        run_paths(run).root.mkdir(parents=True)
        run_paths(run).advantages.write_bytes(table.read_bytes())
    said = trained_offline(of(3, "whole"))
    assert "3 iterations of 16 states, 1 process" in said
    assert (
        "nothing is evaluated during training (train.evaluate_every has no effect); `python cli.py evaluate` does it: "
        "[evaluate.data]"
    ) in said
    assert re.search(r"1/3  loss [\d.]+  ln π/π_ref -?0.000  tokens", said)
    assert "nothing to do" in trained_offline(of(3, "whole"))
    trained_offline(of(2, "parts"))
    assert "continuing after iteration 2" in trained_offline(of(3, "parts"))
    whole, parts = run_paths("whole"), run_paths("parts")
    weights = load_file(whole.model / "model.safetensors")
    for name, weight in load_file(parts.model / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[0]["policy/log_ratio"] == pytest.approx(0, abs=1e-5)
    assert not any(name.startswith(("kl/", "throughput/")) for name in rows[0])
    assert rows[0]["loss/regression"] > rows[2]["loss/regression"] > 0
    card = (whole.model / "README.md").read_text()
    assert "values from `monte_carlo`" in card
    assert "| tokens per step |" in card
    assert "per completion" not in card
    finished = run_cli("report", "--run", "whole", warm=True)
    assert finished.returncode == 0, finished.stderr
    write_advantages(config, parts.advantages, min_gap=0.0)
    with pytest.raises(UserError, match="was made with another config"):
        trained_offline(of(4, "parts"))


# Refusals, before a model loads.


def test_a_table_of_another_model_template_or_sampling_is_refused(config: Config) -> None:
    table = run_paths(config.run).advantages
    other = config.model_copy(update={"data": config.data.model_copy(update={"template": "{prompt} So:"})})
    with pytest.raises(UserError, match=r"does not belong to this run: prompt.template is"):
        prepare(other, table)
    with pytest.raises(UserError, match=r"prompt.tokens differ for 32 prompts"):
        prepare(other, table, ["prompt.template"])
    data = prepare(other, table, ["prompt.template", "prompt.tokens"])
    assert len(data.accepted_mismatches) == 2
    write_advantages(config, table, model={"weights": "others", "tokenizer": "others", "config": "others"})
    with pytest.raises(UserError, match=r"model.weights is \"others\" there"):
        prepare(config, table)


def test_a_table_that_keeps_nothing_and_steps_that_the_model_cannot_read_are_refused(config: Config) -> None:
    table = run_paths(config.run).advantages
    write_advantages(config, table, min_gap=3.0)
    with pytest.raises(
        UserError, match=r"no state is left to train on; run `python cli.py filter --advantages .*min-gap"
    ):
        prepare(config, table)
    rows = write_advantages(config, table)
    _, provenance = ADVANTAGES_TABLE.read(table)

    def write(tokens: list[list[list[int]]]) -> None:
        column = pl.Series("action_token_ids", tokens, rows.schema["action_token_ids"])
        ADVANTAGES_TABLE.write(rows.with_columns(column), provenance, table)

    actions = rows["action_token_ids"].to_list()
    write([[[10**6, *action] for action in each] for each in actions])
    with pytest.raises(
        UserError, match=r"a step has the token id 1000000, but the model in .* has \d+ of them"
    ):
        prepare(config, table)
    write([[[10] * 600, *each[1:]] for each in actions])
    with pytest.raises(UserError, match=r"has \d+ tokens, more than the model's context of 512"):
        prepare(config, table)


def test_mistakes_on_the_command_line_are_one_line(config: Config, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "run.toml").write_text(as_toml(config))
    table = run_paths(config.run).advantages
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    cases = {
        ("--vstar", tmp_path / "vstar.parquet"): "reads a table of advantages; give it with --advantages",
        (
            "--set",
            "train.objective.name=grpo",
            "--set",
            "train.objective.beta=1",
        ): "unknown keys train.objective.beta, ",
        ("--set", "train.staleness=1"): "which the objective direct_advantage is not for; set it to 0",
        ("--run", "another"): "; make it with "
        + ", ".join(
            f"`python cli.py {command} --config {tmp_path / 'run.toml'} --run another`"
            for command in ("segments", "critic", "advantages")
        ),
    }
    for options, message in cases.items():
        finished = run_cli("train", "--config", tmp_path / "run.toml", *options, warm=True)
        assert finished.returncode == 2, finished.stderr
        assert finished.stderr.count("\n") == 1, finished.stderr
        assert message in finished.stderr
    (tmp_path / "other.toml").write_text(as_toml(tiny_config(tmp_path, Path(config.model.path))))
    finished = run_cli("train", "--config", tmp_path / "other.toml", "--advantages", table, warm=True)
    assert "the objective astar_po reads none; leave it out" in finished.stderr
    finished = run_cli("forecast", "--config", tmp_path / "run.toml")
    assert finished.returncode == 2
    assert "forecast is for runs that draw completions; direct_advantage reads" in finished.stderr
