"""Stage 2 through its command line, with real DeepSpeed and real vLLM: figures, interruption, export, refusals."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.tiny_model import save_tiny_model
from common.errors import UserError
from common.provenance import differences
from common.runs import RunPaths, run_paths
from common.terminal.console import Terminal
from common.vstar_file import read_vstar, write_vstar
from stage2_train.completions import SHOWN
from stage2_train.config import Config, LoraConfig
from stage2_train.data import prepare
from stage2_train.metrics import MetricsLog
from stage2_train.objectives.grpo import GRPO
from stage2_train.records import ENTROPY, LOG_RATIO, LOGPROB_GAP, SequenceRecord
from stage2_train.records import summarise as summarise_records
from stage2_train.resume import is_finished, origin, with_defaults
from stage2_train.run import run_stage2
from stage2_train.split import Split
from tests import warm
from tests.quantised import save_quantised
from tests.stage2_runs import as_toml, tiny_config, write_tiny_vstar

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(torch|tensorboard|deepspeed)\..*")

ROOT = Path(__file__).parents[1]
ITERATIONS = 6
VARIES = ("time/", "throughput/", "memory/")
METRICS = {
    "reward/mean",
    "reward/solved",
    "reward/unjudged",
    "advantage/mean",
    "loss/regression",
    "kl/sequence",
    "kl/token",
    "completion/tokens_mean",
    "completion/tokens_max",
    "completion/truncated",
    "policy/entropy",
    "engine/logprob_gap",
    "engine/rebuilds",
    "train/gradient_norm",
    "train/skipped_steps",
    "train/processes",
    "train/learning_rate",
    "time/rollout",
    "time/reference",
    "time/update",
    "time/weight_sync",
    "time/iteration",
    "throughput/completion_tokens_per_second",
    "memory/peak_gib",
}


@dataclass(frozen=True)
class Workspace:
    """A config and its vstar.parquet, trained on by several runs, each with artifacts of its own."""

    folder: Path
    config: Config

    def start(
        self, name: str, *overrides: str, processes: int = 1, cold: bool = False
    ) -> "subprocess.Popen[str]":
        """`cli.py train` in the background, with artifacts under `name`; under torchrun where processes are many."""
        paths = self.paths(name)
        paths.root.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.folder / "vstar.parquet", paths.vstar)
        return warm.popen(
            [*self.command("train", processes), *overrides],
            cwd=self.folder,
            env=self.environment(name),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cold=cold,
        )

    def command(self, name: str, processes: int = 1) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        program = [str(ROOT / "cli.py"), name, "--config", str(self.folder / "run.toml")]
        return [*(launcher if processes > 1 else []), *program]

    def environment(self, name: str) -> dict[str, str]:
        # One thread each: the runs share two cores.
        artifacts = {"ASTAR_PO_ARTIFACTS": str(self.folder / name)}
        return {**os.environ, **artifacts, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def paths(self, name: str) -> RunPaths:
        return RunPaths(self.folder / name / self.config.run)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        text = self.paths(name).metrics.read_text(encoding="utf-8")
        return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def output_of(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-4000:]
    return output


@pytest.fixture(scope="module")
def workspace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("training")
    train = {"iterations": ITERATIONS, "checkpoint_every": 1, "warmup_steps": 3}
    config = tiny_config(folder, tiny_model, train=train)
    (folder / "run.toml").write_text(as_toml(config), encoding="utf-8")
    write_tiny_vstar(config, folder / "vstar.parquet")
    return Workspace(folder, config)


@dataclass(frozen=True)
class Finished:
    """`whole` ran in one go; `resumed` is the same run killed in the middle and started again."""

    workspace: Workspace
    whole_output: str
    resumed_output: str
    iterations_before_kill: int
    transformers_output: str


@pytest.fixture(scope="module")
def finished(workspace: Workspace) -> Finished:
    whole, killed = workspace.start("whole", cold=True), workspace.start("resumed")
    metrics = workspace.paths("resumed").metrics
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None:
        if metrics.exists() and '"iteration": 2' in metrics.read_text(encoding="utf-8"):
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    assert killed.returncode == -signal.SIGKILL
    lines = metrics.read_text(encoding="utf-8").count("\n")
    whole_output = output_of(whole)
    resumed = workspace.start("resumed")
    transformers = workspace.start("transformers", "--set", "engine.backend=transformers")
    output_of(workspace.start("beside", "--set", "engine.placement=own processes"))
    return Finished(workspace, whole_output, output_of(resumed), lines - 1, output_of(transformers))


def test_every_iteration_logs_every_figure(finished: Finished) -> None:
    start, *rows = finished.workspace.metrics("whole")
    assert start.keys() == {"iteration", "time/evaluate", "evaluate/pass_at_1"}
    assert [row["iteration"] for row in rows] == list(range(1, ITERATIONS + 1))
    for row in rows:
        evaluated = row["iteration"] % 2 == 0
        extra = {"time/evaluate", "evaluate/pass_at_1"} if evaluated else set()
        if row["iteration"] == 1:
            extra |= {f"forecast/{name}" for name in ("loss_low", "loss_high", "reward_low", "reward_high")}
        assert row.keys() == METRICS | {"iteration"} | extra
        assert all(math.isfinite(value) for value in row.values())


def test_figures_are_of_a_run_that_samples_grades_and_learns(finished: Finished) -> None:
    rows = finished.workspace.metrics("whole")[1:]
    assert len({row["reward/mean"] for row in rows}) > 1
    assert all(0 <= row["reward/mean"] == row["reward/solved"] < 1 for row in rows)
    assert all(1 <= row["completion/tokens_mean"] <= row["completion/tokens_max"] <= 16 for row in rows)
    assert any(row["completion/truncated"] > 0 for row in rows)
    assert all(row["train/gradient_norm"] > 0 and row["policy/entropy"] > 0 for row in rows)
    assert all(row["train/skipped_steps"] == row["engine/rebuilds"] == 0 for row in rows)
    assert [row["train/learning_rate"] for row in rows] == pytest.approx(
        [2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    )
    parts = ("time/rollout", "time/reference", "time/update", "time/weight_sync")
    for row in rows:
        assert 0.4 * row["time/iteration"] < sum(row[part] for part in parts) <= row["time/iteration"]
        tokens = row["completion/tokens_mean"] * 16
        assert row["throughput/completion_tokens_per_second"] == pytest.approx(tokens / row["time/iteration"])
        assert 0.1 < row["memory/peak_gib"] < 16


@pytest.mark.parametrize("name", ["whole", "resumed", "transformers", "beside"])
def test_the_engine_has_the_trainers_weights_at_every_iteration(finished: Finished, name: str) -> None:
    gaps = [row["engine/logprob_gap"] for row in finished.workspace.metrics(name)[1:]]
    assert len(gaps) == ITERATIONS
    assert max(gaps) < 1e-4
    assert min(gaps) > 0


def test_the_same_config_and_seed_give_the_same_figures_even_after_a_kill(finished: Finished) -> None:
    def repeatable(name: str) -> list[dict[str, Any]]:
        rows = finished.workspace.metrics(name)
        return [{key: value for key, value in row.items() if not key.startswith(VARIES)} for row in rows]

    assert 2 <= finished.iterations_before_kill < ITERATIONS
    assert "continuing after iteration" not in finished.whole_output
    assert any(f"continuing after iteration {n}\n" in finished.resumed_output for n in range(1, ITERATIONS))
    assert repeatable("resumed") == repeatable("whole")


def test_an_engine_in_a_process_of_its_own_draws_what_one_inside_draws(finished: Finished) -> None:
    rows, beside = (finished.workspace.metrics(name) for name in ("whole", "beside"))
    for ours, theirs in zip(rows, beside, strict=True):
        for name in (
            "reward/mean",
            "kl/sequence",
            "loss/regression",
            "evaluate/pass_at_1",
            "train/gradient_norm",
        ):
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-3, abs=1e-5), name


def test_an_interrupted_run_ends_with_the_very_weights_of_an_uninterrupted_one(finished: Finished) -> None:
    whole, resumed = (
        load_file(finished.workspace.paths(name).model / "model.safetensors") for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_the_exported_model_is_the_policy(finished: Finished, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = finished.workspace.paths("whole")
    newest = paths.checkpoints / f"iteration-{ITERATIONS:06d}"
    state = torch.load(newest / "state" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    model = AutoModelForCausalLM.from_pretrained(paths.model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    exported = dict(model.named_parameters())
    assert {f"model.{name}" for name in exported} == {name for name in state if not name.startswith("head.")}
    for name, weight in exported.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, state[f"model.{name}"]), name
        assert not torch.equal(weight, reference.get_parameter(name)), name
    text = "Tom has 12 pens.\n"
    folders = (paths.model, tiny_model)
    ours, theirs = (AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in folders)
    assert ours == theirs
    assert model.generation_config.eos_token_id == reference.generation_config.eos_token_id


def test_a_model_with_tied_embeddings_is_exported_whole_and_tied(tied_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    train = {"iterations": 1, "checkpoint_every": 1}
    config = tiny_config(tmp_path, tied_model, train=train, engine={"backend": "transformers"})
    (tmp_path / "run.toml").write_text(as_toml(config), encoding="utf-8")
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    workspace = Workspace(tmp_path, config)
    output_of(workspace.start("tied"))
    paths = workspace.paths("tied")
    newest = paths.checkpoints / "iteration-000001" / "state" / "mp_rank_00_model_states.pt"
    state = torch.load(newest, weights_only=False)["module"]
    stored = load_file(paths.model / "model.safetensors")
    assert "lm_head.weight" not in stored
    loaded: Any = AutoModelForCausalLM.from_pretrained(paths.model, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values()), loading
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert dict(model.named_parameters()).keys() == stored.keys()
    reference = AutoModelForCausalLM.from_pretrained(tied_model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, state[f"model.{name}"]), name
        assert not torch.equal(weight, reference.get_parameter(name)), name
    assert torch.equal(model.lm_head.weight, state["model.lm_head.weight"])


def test_a_quantised_model_is_evaluated_by_vllm_without_kl(finished: Finished, tmp_path: Path) -> None:
    workspace = finished.workspace
    model = save_quantised(workspace.paths("whole").model, tmp_path / "int8")
    process = warm.run(
        [*workspace.command("evaluate"), "--model", str(model), "--json"],
        env=workspace.environment("whole"),
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "int8 is quantised (quantization_config compressed-tensors): no KL" in process.stderr
    (result,) = json.loads(process.stdout)["results"]
    assert (result["prompts"], result["samples_per_prompt"]) == (5, 4)
    assert 1 <= result["completion_tokens_mean"] <= 16
    assert "kl_sequence" not in result


def test_a_checkpoint_is_exported_loads_in_vllm_and_is_evaluated(finished: Finished, tmp_path: Path) -> None:
    workspace, paths = finished.workspace, finished.workspace.paths("whole")
    newest = paths.checkpoints / f"iteration-{ITERATIONS:06d}"
    options = ["--model", str(newest), "--json", "--lm-eval", str(tmp_path)]
    process = warm.run(
        [*workspace.command("evaluate"), *options],
        env=workspace.environment("whole"),
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    (result,) = json.loads(process.stdout)["results"]
    exported = paths.exported(ITERATIONS)
    assert (result["model"], result["path"]) == (str(newest), str(exported))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported, paths.model))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    (written,) = tmp_path.glob("*/results_*.json")
    shown = json.loads(written.read_text(encoding="utf-8"))["results"]["held_out"]
    assert shown["exact_match,none"] == result["greedy_accuracy"]
    assert (result["prompts"], result["samples_per_prompt"]) == (5, 4)
    assert sum(result["outcomes"].values()) == 20
    assert result["pass_at_1"] == pytest.approx(result["outcomes"].get("correct", 0) / 20)
    low, high = result["pass_at_1_interval_95"]
    assert 0 <= low <= result["pass_at_1"] <= high <= 1
    assert result["pass_at_k"].keys() == {"1", "2", "4"}
    assert 0 <= result["greedy_accuracy"] <= 1
    assert 1 <= result["completion_tokens_mean"] <= 16
    assert result["kl_sequence"] > 1e-3
    assert result["kl_token"] == pytest.approx(result["kl_sequence"] / result["completion_tokens_mean"])


@pytest.mark.slow
def test_two_processes_with_an_engine_each_train_the_policy_of_one(finished: Finished) -> None:
    """Measured: 2e-6 after six steps; test_ranks.py says why it is not zero."""
    workspace = finished.workspace
    output_of(workspace.start("two", processes=2))
    whole, two = (load_file(workspace.paths(name).model / "model.safetensors") for name in ("whole", "two"))
    for name, weight in whole.items():
        assert float((two[name] - weight).abs().max()) < 5e-5, name
    for ours, theirs in zip(workspace.metrics("two"), workspace.metrics("whole"), strict=True):
        for name, value in theirs.items():
            if not name.startswith((*VARIES, "engine/")):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_old_checkpoints_but_the_best_are_dropped_and_none_is_left_half_written(finished: Finished) -> None:
    for name in ("whole", "resumed"):
        accuracy = {
            row["iteration"]: row["evaluate/pass_at_1"]
            for row in finished.workspace.metrics(name)[1:]
            if "evaluate/pass_at_1" in row
        }
        kept = {ITERATIONS - 1, ITERATIONS, max(accuracy, key=accuracy.__getitem__)}
        folders = sorted(path.name for path in finished.workspace.paths(name).checkpoints.iterdir())
        assert folders == [f"iteration-{number:06d}" for number in sorted(kept)]


def test_the_completions_shown_join_the_rows_of_stage_one(finished: Finished) -> None:
    workspace = finished.workspace
    shown = pl.read_parquet(workspace.paths("whole").completions / "*.parquet")
    evaluations = [row["iteration"] for row in workspace.metrics("whole") if "evaluate/pass_at_1" in row]
    training, held_out = (shown.filter(pl.col("part") == part) for part in ("train", "held_out"))
    assert sorted(set(training["iteration"])) == evaluations[1:]
    assert training.height == SHOWN * len(evaluations[1:])
    assert held_out.height == 5 * len(evaluations)
    assert held_out["pass_rate"].is_null().all()
    rows, _ = read_vstar(workspace.folder / "vstar.parquet")
    joined = training.join(rows, on="prompt_id", suffix="_stage1")
    assert joined.height == training.height
    for name in ("prompt", "pass_rate", "vstar"):
        assert joined[name].equals(joined[f"{name}_stage1"]), name
    for part in (training, held_out):
        assert part["reward"].to_list() == [float(outcome == "correct") for outcome in part["outcome"]]
        assert part["completion_tokens"].is_between(1, 16).all()
    assert shown.equals(pl.read_parquet(workspace.paths("resumed").completions / "*.parquet"))


def test_training_with_the_transformers_engine_moves_the_policy_too(
    finished: Finished, tiny_model: Path
) -> None:
    rows = finished.workspace.metrics("transformers")
    assert [row["iteration"] for row in rows] == list(range(ITERATIONS + 1))
    trained = load_file(finished.workspace.paths("transformers").model / "model.safetensors")
    start = load_file(tiny_model / "model.safetensors")
    assert all(not torch.equal(weight, start[name]) for name, weight in trained.items())


def rerun(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, config: Config, vstar_file: Path | None = None
) -> str:
    """What a re-run of the finished `whole` says, in this process: it must end before it loads a model."""
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(finished.workspace.folder / "whole"))
    written = StringIO()
    run_stage2(config, Terminal(file=written, width=200), vstar_file)
    return written.getvalue()


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_run_does_nothing_when_run_again(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stamps(finished.workspace.paths("whole").root)
    assert "nothing to do" in rerun(finished, monkeypatch, finished.workspace.config)
    assert stamps(finished.workspace.paths("whole").root) == before


def test_another_config_is_refused_and_the_difference_is_named(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = finished.workspace.config.train.model_copy(update={"learning_rate": 5e-4})
    before = stamps(finished.workspace.paths("whole").root)
    with pytest.raises(UserError, match=r"config\.train\.learning_rate is 0\.001 there and 0\.0005 here"):
        rerun(finished, monkeypatch, finished.workspace.config.model_copy(update={"train": train}))
    assert stamps(finished.workspace.paths("whole").root) == before


def test_a_run_under_zero_does_not_go_on_without(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = {"iterations": ITERATIONS + 1, "zero_stage": 0}
    config = finished.workspace.config
    without = config.model_copy(update={"train": config.train.model_copy(update=longer)})
    with pytest.raises(UserError, match="by 1 process under ZeRO-2, which cannot be continued without ZeRO"):
        rerun(finished, monkeypatch, without)


def test_training_does_not_go_on_with_other_optimal_values(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows, provenance = read_vstar(finished.workspace.folder / "vstar.parquet")
    best = rows.with_columns(pl.lit(0.0).alias("beta1"), pl.col("rewards").list.max().alias("vstar"))
    write_vstar(best, provenance, tmp_path / "vstar.parquet")
    with pytest.raises(UserError, match=r"another config or other data: vstar is"):
        rerun(finished, monkeypatch, finished.workspace.config, tmp_path / "vstar.parquet")


# What `prepare` refuses, before any model is loaded.


@pytest.fixture
def setting(tmp_path: Path, tiny_model: Path) -> tuple[Config, Path]:
    config = tiny_config(tmp_path, tiny_model)
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    return config, tmp_path / "vstar.parquet"


def changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_the_artifact_of_the_same_config_is_accepted(setting: tuple[Config, Path]) -> None:
    config, vstar = setting
    data = prepare(config, vstar)
    assert data.stage1 is not None
    rows, _ = read_vstar(vstar)
    assert [prompt.id for prompt in data.prompts] == rows["prompt_id"].to_list()
    assert data.stage1.vstar == dict(zip(rows["prompt_id"], rows["vstar"], strict=True))
    assert len(data.held_out) == 5
    assert data.iterations(config) == 3
    assert data.iterations(changed(config, "train", iterations=None, epochs=25)) == 50


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda config: changed(config, "sampling", temperature=0.7),
            "sampling.temperature is 1.0 there and 0.7 here",
        ),
        (
            lambda config: changed(config, "sampling", max_completion_tokens=8),
            "sampling.max_completion_tokens is 6 there and 8 here",
        ),
        (lambda config: changed(config, "data", template="line"), "prompt.template is"),
        (lambda config: changed(config, "grader", name="math"), "grader is"),
    ],
    ids=["temperature", "length", "template", "grader"],
)
def test_an_artifact_of_another_setting_is_refused_and_the_difference_is_named(
    setting: tuple[Config, Path], change: Callable[[Config], Config], named: str
) -> None:
    config, vstar = setting
    with pytest.raises(UserError) as refused:
        prepare(change(config), vstar)
    message = str(refused.value)
    assert str(vstar) in message
    assert named in message
    assert message.count(" there and ") == 1
    assert "make it again" in message


def test_an_artifact_of_another_model_is_refused(setting: tuple[Config, Path], tmp_path: Path) -> None:
    config, vstar = setting
    save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"model\.weights is \"\w+\" there and \"\w+\" here") as refused:
        prepare(changed(config, "model", path=str(tmp_path / "other")), vstar)
    assert str(refused.value).count(" there and ") == 1


def test_greedy_sampling_is_refused(setting: tuple[Config, Path]) -> None:
    config, vstar = setting
    with pytest.raises(UserError, match=r"sampling\.temperature is 0"):
        prepare(changed(config, "sampling", temperature=0.0), vstar)


def test_an_adapter_of_layers_that_the_model_does_not_have_is_refused(setting: tuple[Config, Path]) -> None:
    config, vstar = setting
    prepare(changed(config, "train", lora=LoraConfig(target_modules=("q_proj",))), vstar)
    with pytest.raises(UserError, match="no linear layers called query before its output layer"):
        prepare(changed(config, "train", lora=LoraConfig(target_modules=("query",))), vstar)


def test_a_run_of_an_earlier_version_is_continued(setting: tuple[Config, Path]) -> None:
    """Its checkpoints do not name the settings that were added since, and name others that no longer count."""
    config, vstar = setting
    ours = origin(config, prepare(config, vstar))
    train = {name: value for name, value in ours["config"]["train"].items() if name != "staleness"}
    train |= {"zero_stage": 3, "offload_optimizer": True}
    train["objective"] = {"name": "astar_po", "beta2": train["objective"]["beta2"]}
    theirs = ours | {"config": ours["config"] | {"train": train}}
    assert theirs != ours
    assert with_defaults(theirs) == ours
    assert Split.of({"origin": theirs, "world_size": 4}) == Split(processes=4, zero_stage=3)
    drawn_ahead = changed(config, "train", staleness=1)
    assert with_defaults(theirs) != origin(drawn_ahead, prepare(drawn_ahead, vstar))


def test_without_stage_1_a_run_goes_on_with_its_own_model_and_reward_only(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_reward.py").write_text("def reward(prompt, completion, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(tmp_path, tiny_model, grader={"name": "own_reward:reward"})
    train = config.train.model_copy(update={"objective": GRPO(name="grpo")})
    config = config.model_copy(update={"train": train})
    before = origin(config, prepare(config, None))
    assert before == origin(config, prepare(config, None))
    (tmp_path / "own_reward.py").write_text("def reward(prompt, completion, answer):\n    return 0.0\n")
    assert list(differences(before, origin(config, prepare(config, None)))) == ["identity.grader"]
    save_tiny_model(tmp_path / "other", seed=1)
    other = changed(config, "model", path=str(tmp_path / "other"))
    assert "identity.model.weights" in differences(before, origin(other, prepare(other, None)))


def test_a_checkpoint_of_an_unknown_objective_is_another_runs(setting: tuple[Config, Path]) -> None:
    config, vstar = setting
    ours = origin(config, prepare(config, vstar))
    theirs = deepcopy(ours)
    theirs["config"]["train"]["objective"] = {"name": "of a branch", "strength": 1.0}
    assert "config.train.objective.name" in differences(ours, with_defaults(theirs))


def test_only_prompts_marked_keep_are_trained_on(setting: tuple[Config, Path]) -> None:
    config, vstar = setting
    rows, provenance = read_vstar(vstar)
    write_vstar(rows.with_columns(pl.col("pass_at_n").alias("keep")), provenance, vstar)
    data = prepare(config, vstar)
    assert data.stage1 is not None
    kept = set(rows.filter("pass_at_n")["prompt_id"])
    assert {prompt.id for prompt in data.prompts} == data.stage1.vstar.keys() == kept
    assert len(kept) == 24


def test_an_artifact_with_no_prompt_left_is_refused(setting: tuple[Config, Path]) -> None:
    config, vstar = setting
    rows, provenance = read_vstar(vstar)
    write_vstar(rows.with_columns(pl.lit(False).alias("keep")), provenance, vstar)
    with pytest.raises(UserError, match="no prompt is left to train on"):
        prepare(config, vstar)


# The log, and what it says of a step.


def test_the_log_forgets_what_came_after_the_checkpoint_and_a_line_cut_in_half(
    setting: tuple[Config, Path], artifacts: Path
) -> None:
    config, _ = setting
    paths = run_paths(config.run)
    assert paths.root.is_relative_to(artifacts)
    paths.root.mkdir(parents=True)
    paths.metrics.write_text('{"iteration": 1, "a/b": 1}\n{"iteration": 2, "a/b": 2}\n{"iteration": 3, "a/b"')
    log = MetricsLog(config, paths, Terminal(file=StringIO()), first_iteration=2, last=3)
    log.write(2, {"a/b": 5.0})
    log.close()
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert rows == [{"iteration": 1, "a/b": 1}, {"iteration": 2, "a/b": 5.0}]


def test_a_damaged_log_is_refused_before_a_model_loads(
    setting: tuple[Config, Path], artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, vstar = setting
    metrics = run_paths(config.run).metrics
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"iteration": 1}\n{"iteration": 2, "a/\n')
    monkeypatch.setattr("stage2_train.run.Trainer", None)
    with pytest.raises(
        UserError, match=r"metrics\.jsonl, line 2 is damaged: Invalid JSON: .*; remove the line"
    ):
        run_stage2(config, Terminal(quiet=True), vstar)
    assert metrics.read_text() == '{"iteration": 1}\n{"iteration": 2, "a/\n'


@pytest.mark.parametrize("content", ["", "[]", '{"iterations": 3}', '{"iterations": 3, "origin": {'])
def test_a_damaged_record_of_a_trained_model_is_refused(tmp_path: Path, content: str) -> None:
    paths = RunPaths(tmp_path)
    paths.model.mkdir()
    paths.trained_with.write_text(content)
    with pytest.raises(UserError, match=r"model/astar_po\.json is damaged: .*; remove it: `train` exports"):
        is_finished(paths, {"iterations": 3, "origin": {}})


def test_the_figures_of_a_step_are_those_computed_by_hand() -> None:
    well: dict[str, Any] = {"truncated": False, "solved": False, "unjudged": False, "trained": True}
    long = SequenceRecord(
        **well | {"solved": True},
        reward=1.0,
        advantage=0.5,
        completion_tokens=6,
        figures={"loss/regression": 0.25, LOG_RATIO: 0.8, ENTROPY: 3.0, LOGPROB_GAP: 1e-6},
    )
    short = SequenceRecord(
        **well | {"truncated": True},
        reward=0.0,
        advantage=-0.3,
        completion_tokens=2,
        figures={"loss/regression": 0.05, LOG_RATIO: -0.4, ENTROPY: 1.0, LOGPROB_GAP: math.nan},
    )
    unjudged = SequenceRecord(**well | {"unjudged": True, "trained": False}, reward=0.0, completion_tokens=4)
    skipped = SequenceRecord(
        **well | {"trained": False},
        reward=0.25,
        advantage=9.0,
        completion_tokens=8,
        figures={"loss/regression": math.nan, LOG_RATIO: math.nan, ENTROPY: math.nan},
    )
    assert summarise_records([long, short, unjudged, skipped], seconds=2.0, drawn=True) == pytest.approx(
        {
            "reward/mean": 1.25 / 3,
            "reward/solved": 1 / 3,
            "reward/unjudged": 0.25,
            "advantage/mean": 0.1,
            "loss/regression": 0.15,
            "kl/sequence": 0.2,
            "kl/token": 0.05,
            "completion/tokens_mean": 5.0,
            "completion/tokens_max": 8,
            "completion/truncated": 0.25,
            "policy/entropy": 0.5,
            "engine/logprob_gap": 1e-6,
            "throughput/completion_tokens_per_second": 10.0,
        }
    )
    nothing = summarise_records([unjudged, skipped], seconds=1.0, drawn=True)
    assert all(math.isnan(nothing[name]) for name in ("loss/regression", "kl/token"))
    assert math.isnan(summarise_records([unjudged], seconds=1.0, drawn=True)["reward/mean"])


def test_a_log_file_gets_lines_and_a_terminal_a_bar_with_the_time_left(
    setting: tuple[Config, Path], artifacts: Path
) -> None:
    config, _ = setting
    paths = run_paths(config.run)
    paths.root.mkdir(parents=True)
    metrics = dict.fromkeys(
        ("reward/mean", "loss/regression", "kl/sequence", "completion/tokens_mean", "time/iteration"), 0.5
    )
    written = {}
    for is_terminal in (False, True):
        output = StringIO()
        console = Terminal(file=output, width=100, force_terminal=is_terminal)
        log = MetricsLog(config, paths, console, first_iteration=1, last=4)
        log.write(1, metrics | {"reward/unjudged": 0.25, "train/skipped_steps": 1.0})
        log.write(2, metrics | {"reward/unjudged": 0.0, "train/skipped_steps": 0.0})
        log.close()
        written[is_terminal] = output.getvalue()
    first, second = written[False].splitlines()
    assert first.endswith("0.50 s  25.0% unjudged  1 steps skipped")
    assert second.strip().startswith("2/4  reward 0.500")
    assert second.endswith("0.50 s")
    assert "\x1b" not in written[False]
    assert "iteration 2/4" in written[True]
    assert "left" in written[True]


def test_a_policy_that_does_not_sample_from_its_own_distribution_is_refused(
    setting: tuple[Config, Path],
) -> None:
    config, vstar = setting
    with pytest.raises(UserError, match=r"sampling\.top_p is 0\.9"):
        prepare(changed(config, "sampling", top_p=0.9), vstar)
