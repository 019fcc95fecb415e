"""Training on stage 1's samples themselves (`train.rollouts = "stage1"`), which is OAPL: data, trainer, refusals."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.provenance import read_provenance
from common.runs import run_paths
from common.store import SAMPLES, add_fragment
from common.terminal.console import Terminal
from common.vstar_file import read_vstar
from stage1_vstar.filter import filter_prompts, rules_where
from stage1_vstar.run import run_stage1
from stage2_train.config import Config
from stage2_train.data import prepare
from stage2_train.ranks import ALONE, Ranks
from stage2_train.samples import Samples
from stage2_train.sources.offline import OfflineSource
from tests.conftest import RunCli
from tests.objective_steps import ITERATIONS
from tests.stage2_runs import NUM_SAMPLES, as_toml, tiny_config, trained_offline
from tests.training_jobs import ranks_found

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")

GRADER = "tests.test_stored_samples:reward"


def reward(prompt: str, completion: str, answer: str) -> float:
    """Random completions of the tiny model have rewards that differ."""
    return sum(map(ord, completion)) % 5 / 4


def configured(folder: Path, model: Path, **sections: Any) -> Config:
    return tiny_config(
        folder,
        model,
        **{
            "vstar": {"keep_token_ids": True},
            "grader": {"name": GRADER, "workers": 1},
            "engine": {"backend": "transformers"},
            "train": {"rollouts": "stage1", "objective": {"beta2": 0.05, "group_size": 2}},
            **sections,
        },
    )


def changed(config: Config, **sections: Any) -> Config:
    document = config.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        document[name] = {**document[name], **values} if isinstance(values, dict) else values
    return Config.model_validate(document)


def draw(config: Config) -> None:
    run_stage1(config, Terminal(quiet=True), check=False)


@pytest.fixture(scope="module")
def drawn(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts in which stage 1 has run, with its data beside it."""
    folder = tmp_path_factory.mktemp("stored-samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTAR_PO_ARTIFACTS", str(folder / "artifacts"))
        draw(configured(folder, tiny_model))
    return folder


@pytest.fixture
def config(drawn: Path, tiny_model: Path, artifacts: Path) -> Config:
    """A run whose stage 1 is done."""
    shutil.copytree(drawn / "artifacts", artifacts, dirs_exist_ok=True)
    return configured(drawn, tiny_model)


def samples_of(config: Config, table: Path | None = None) -> Samples:
    data = prepare(config, table or run_paths(config.run).vstar)
    assert data.samples is not None
    return data.samples


# Data and batches.


def test_visits_go_through_all_samples_of_a_prompt_with_their_tokens_and_rewards(config: Config) -> None:
    paths = run_paths(config.run)
    samples, rows = samples_of(config), read_vstar(paths.vstar)[0]
    stored = pl.concat([pl.read_parquet(file) for file in paths.samples.glob("part-*.parquet")])
    texts = {(row["prompt_id"], row["sample_index"]): row for row in stored.iter_rows(named=True)}
    assert len(samples) == rows.height == 32
    for unit, prompt in enumerate(samples.prompts):
        (row,) = rows.filter(prompt_id=prompt.id).iter_rows(named=True)
        visits = [rollout for visit in range(2) for rollout in samples.group(unit, visit)]
        assert [rollout.reward for rollout in visits] == row["rewards"]
        assert [len(rollout.completion.token_ids) for rollout in visits] == row["completion_tokens"]
        for index, rollout in enumerate(visits):
            assert rollout.prompt is prompt
            assert list(rollout.completion.token_ids) == texts[prompt.id, index]["completion_ids"]
            assert rollout.completion.truncated == (texts[prompt.id, index]["outcome"] == "truncated")
        assert samples.group(unit, 2) == samples.group(unit, 0)
        assert (
            samples.group(unit, 0) != samples.group(unit, 1) or len(set(visits[0].completion.token_ids)) < 2
        )
    three = samples_of(changed(config, train={"objective": {"group_size": 3}}))
    indices = [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    every = samples.group(0, 0) + samples.group(0, 1)
    assert [three.group(0, visit) for visit in range(3)] == [
        [every[index] for index in each] for each in indices
    ]


def test_an_epoch_visits_each_prompt_once_on_any_number_of_ranks(config: Config) -> None:
    samples = samples_of(config)
    seen: dict[str, list[Any]] = {}
    for number in range(1, 5):
        shares = [
            OfflineSource(config, samples, Ranks(rank, 2, torch.device("cpu"))).groups(number, 4, {})
            for rank in range(2)
        ]
        whole = OfflineSource(config, samples, ALONE).groups(number, 4, {})
        assert [shares[place % 2][place // 2] for place in range(16)] == whole
        for group in whole:
            seen.setdefault(group[0].prompt.id, []).append(group)
    assert len(seen) == 32
    for unit, prompt in enumerate(samples.prompts):
        assert seen[prompt.id] == [samples.group(unit, visit) for visit in range(2)]


def test_a_filtered_table_elsewhere_finds_the_samples_of_its_run(config: Config, tmp_path: Path) -> None:
    chosen = tmp_path / "far" / "away.parquet"
    chosen.parent.mkdir()
    values = read_vstar(run_paths(config.run).vstar)[0]["vstar"]
    some = int((values > 0.5).sum())
    filter_prompts(run_paths(config.run).vstar, chosen, rules_where(["vstar > 0.5"]))
    assert 0 < len(samples_of(config, chosen)) == some < 32
    # Beside the table, or in the folder above it, they are another run's.
    shutil.copytree(run_paths(config.run).samples, tmp_path / "samples")
    shutil.rmtree(run_paths(config.run).samples)
    assert len(samples_of(config, chosen)) == some


# The trainer.

OBJECTIVES: dict[str, dict[str, Any]] = {
    "A*-PO": {"name": "astar_po", "beta2": 0.05, "group_size": NUM_SAMPLES},
    "VarGrad": {"name": "centred_residual", "beta": 0.05, "group_size": 2},
}
Found = dict[int, list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def found(drawn: Path, tiny_model: Path) -> Found:
    """What each rank of one process and of two found, by objective."""
    config = configured(drawn, tiny_model, train={"rollouts": "stage1", "iterations": ITERATIONS})
    run = drawn / "artifacts" / config.run
    shutil.copytree(run / "samples", drawn / "samples")
    shutil.copy(run / "vstar.parquet", drawn / "vstar.parquet")
    cases = {name: {"objective": objective} for name, objective in OBJECTIVES.items()}
    return ranks_found("objective_steps", config, drawn, {1: cases, 2: cases})


@pytest.mark.parametrize("case", OBJECTIVES)
def test_two_ranks_train_like_one_and_draw_nothing(found: Found, case: str) -> None:
    alone = found[1][0][case]
    assert alone["counts"]["drawn"] == 0
    assert alone["counts"]["trained"] == 16 * OBJECTIVES[case]["group_size"] * ITERATIONS
    for rank in (*found[1], *found[2]):
        for name, weight in rank[case]["weights"].items():
            assert float((weight - alone["weights"][name]).abs().max()) < 5e-5, name
        if "resumed" in rank[case]:
            for name, weight in rank[case]["resumed"].items():
                assert torch.equal(weight, rank[case]["weights"][name]), name
    assert any(not torch.equal(alone["start"][name], weight) for name, weight in alone["weights"].items())


def test_the_loss_at_the_reference_is_the_mean_squared_advantage_of_the_samples(
    found: Found, drawn: Path
) -> None:
    first = found[1][0]["A*-PO"]["metrics"][0]
    rows = read_vstar(drawn / "vstar.parquet")[0]
    residual = (pl.col("rewards") - pl.col("vstar")) ** 2
    expected = rows.explode("rewards").group_by("prompt_id").agg(residual.mean())["rewards"]
    # Half of the prompts are in the first iteration, and its second step sees a policy that has moved a little.
    assert expected.min() <= first["loss/regression"] <= expected.max()
    assert not any(name.startswith(("reward/", "kl/", "throughput/", "engine/")) for name in first)
    assert abs(first["policy/log_ratio"]) < 1
    assert first["completion/tokens_mean"] > 0


# The job.


def test_training_needs_no_engine_and_continues_exactly(config: Config, run_cli: RunCli) -> None:
    def of(iterations: int, run: str) -> Config:
        return changed(config, run=run, train={"iterations": iterations, "mini_batch_size": 16})

    for run in ("whole", "parts"):
        shutil.copytree(run_paths(config.run).root, run_paths(run).root)
    said = trained_offline(of(3, "whole"))
    assert "V̂* of 32 prompts from N = 4 samples under β1 = 0.5" in said
    assert "trained on stage 1's 128 samples themselves, 2 of each prompt at a visit" in said
    assert "3 iterations of 16 prompts, 1 process" in said
    assert "nothing is evaluated during training" in said
    assert "nothing to do" in trained_offline(of(3, "whole"))
    trained_offline(of(2, "parts"))
    assert "continuing after iteration 2" in trained_offline(of(3, "parts"))
    whole, parts = run_paths("whole"), run_paths("parts")
    weights = load_file(whole.model / "model.safetensors")
    for name, weight in load_file(parts.model / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert "stage 1's samples" in (whole.model / "README.md").read_text()
    assert run_cli("report", "--run", "whole", warm=True).returncode == 0
    for file in parts.samples.glob("part-*.parquet"):
        swap_two_tokens(file)
    with pytest.raises(UserError, match="was made with another config or other data"):
        trained_offline(of(4, "parts"))


def swap_two_tokens(file: Path) -> None:
    """The same samples of the same lengths, but one of them has other tokens."""
    rows, provenance = pl.read_parquet(file).to_dicts(), read_provenance(file)
    long = next(row for row in rows if len(set(row["completion_ids"])) > 1)
    ordered = sorted(long["completion_ids"])
    long["completion_ids"] = ordered if ordered != long["completion_ids"] else ordered[::-1]
    file.unlink()
    add_fragment(file.parent, "part", rows, SAMPLES, provenance)


# Refusals, before a model loads.


def test_samples_that_are_not_there_or_have_no_token_ids_are_refused(config: Config, tmp_path: Path) -> None:
    paths = run_paths(config.run)
    with pytest.raises(
        UserError, match=r"group_size 5 is more than the samples of 32 prompts, such as \w+ with 4"
    ):
        samples_of(changed(config, train={"objective": {"group_size": 5}}))
    files = list(paths.samples.glob("part-*.parquet"))
    kept = tmp_path / "kept"
    shutil.copytree(paths.samples, kept)

    def rewritten(without: int, **values: Any) -> None:
        for file in files:
            rows = [{**row, **values} for row in pl.read_parquet(file).to_dicts()[without:]]
            add_fragment(paths.samples, "part", rows, SAMPLES, read_provenance(kept / file.name))

    shutil.rmtree(paths.samples)
    with pytest.raises(UserError, match=r"there is no .*samples, whose samples .* copy them to that folder"):
        samples_of(config)
    paths.samples.mkdir()
    files = list(kept.glob("part-*.parquet"))
    rewritten(0, completion_ids=None)
    with pytest.raises(
        UserError, match=r"128 samples have no token ids, which are kept only with vstar.keep"
    ):
        samples_of(config)
    shutil.rmtree(paths.samples)
    rewritten(1)
    with pytest.raises(
        UserError, match=r"the samples of \d prompts, such as \w+, are not those that V̂\* was made of"
    ):
        samples_of(config)
    shutil.rmtree(paths.samples)
    shutil.copytree(kept, paths.samples)
    other = changed(config, sampling={"max_completion_tokens": 7})
    with pytest.raises(UserError, match=r"sampling.max_completion_tokens"):
        samples_of(other)


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    cases: dict[str, dict[str, Any]] = {
        "reads the token ids of stage 1's samples": {"vstar": {"keep_token_ids": False}},
        "staleness = 1 would have no effect": {"train": {"rollouts": "stage1", "staleness": 1}},
        "which the objective grpo is not for": {
            "train": {"rollouts": "stage1", "objective": {"name": "grpo"}}
        },
    }
    for message, sections in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            configured(tmp_path, tiny_model, **sections)


def test_forecast_refuses_and_stage_1_must_have_run(config: Config, tmp_path: Path, run_cli: RunCli) -> None:
    file = tmp_path / "run.toml"
    file.write_text(as_toml(changed(config, run="fresh")))
    finished = run_cli("train", "--config", file)
    assert finished.returncode == 2
    assert (
        f'vstar.parquet, which train.rollouts = "stage1" needs; make it with `python cli.py vstar --config {file}`'
        in finished.stderr
    )
    finished = run_cli("forecast", "--config", file, "--vstar", run_paths(config.run).vstar)
    assert finished.returncode == 2
    assert 'train.rollouts = "stage1" reads those of stage 1' in finished.stderr
