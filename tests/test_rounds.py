"""`rounds`: plans, the order of steps, restarts, pointers, mistakes, and the page."""

import io
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file, save_file

from common.config import RunConfig
from common.contract import polars_schema
from common.errors import UserError
from common.evaluations import Comparison, Figures, Results, read_results
from common.model.files import model_identity, reference_model
from common.processes import Finished
from common.provenance import Provenance, read_provenance
from common.report.sheet import Sheet
from common.rounds import run_rounds
from common.rounds.plan import Plan
from common.rounds.steps import Pointer
from common.rounds.summary import reached, table
from common.runs import RunPaths, exclusive_run, run_paths
from common.segments.files import ADVANTAGES, ADVANTAGES_TABLE
from common.settings import as_document
from common.store import addresses, sample_files
from common.terminal.console import Terminal
from common.vstar_file import read_vstar
from stage2_train.config import load_config, load_with_inputs
from stage2_train.sources.pipeline import RolloutPipeline
from stage2_train.sources.sampler import Draw, Sampler
from tests import step_tables as steps
from tests import warm
from tests.chromium import Browser, needs_chromium
from tests.conftest import ROOT, RunCli
from tests.fakes import CONTEXT, IDENTITY, sample_rows, write_artifact
from tests.killing import Killed, kill_five_times
from tests.tiny_config import write_config

CONFIG = """
run = "any"
[model]
path = "{run}/base_model"
dtype = "float32"
[data]
format = "word_problems"
limit = 8
[sampling]
max_completion_tokens = 12
[grader]
name = "gsm8k"
[vstar]
num_samples = 4
[train]
iterations = 2
batch_size = 4
mini_batch_size = 4
"""
HELD_OUT = """
[evaluate.data]
format = "word_problems"
split = "test"
limit = 8
"""


class Commands:
    """Stands where processes are started: does at once what each command would leave behind, and lists the commands.

    `dies` says, by the number of a command, whether it dies before or after its work; `fails` names those that fail.
    """

    def __init__(self, dies: Mapping[int, str] | None = None, fails: Collection[str] = ()) -> None:
        self.done: list[str] = []
        self.given: list[Sequence[str]] = []
        self.seconds = 0.0
        self.evaluated: list[list[Any]] = []
        """The run of each evaluation, and the weights of its models."""
        self._dies = dies or {}
        self._fails = fails

    def __call__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
        number = len(self.done)
        if self._dies.get(number) == "before":
            raise Killed
        name, *arguments = command[command.index(str(ROOT / "cli.py")) + 1 :]
        if name == "filter":
            paths = run_paths(arguments[arguments.index("--run") + 1])
        else:
            overrides = [arguments[place + 1] for place, part in enumerate(arguments) if part == "--set"]
            config = load_config(Path(arguments[arguments.index("--config") + 1]), overrides)
            paths = run_paths(config.run)
            assert name == "base-model" or reference_model(config).is_dir()
            self.seed = config.seed
        self.done.append(f"{name} {paths.root.name}")
        self.given.append(command)
        if self.done[-1] in self._fails:
            raise UserError("error: it diverged")
        paths.root.mkdir(parents=True, exist_ok=True)
        self.seconds = 32.0
        getattr(self, f"_{name.replace('-', '_')}")(paths, arguments)
        if self._dies.get(number) == "after":
            raise Killed
        return Finished(seconds=self.seconds, cpu_seconds=40.0, peak_gib=1.5)

    def _base_model(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        write_model(paths.base_model, 0)

    def _vstar(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        outcomes = {"p": ["correct"] * number_of(paths) + ["wrong"], "q": ["wrong"]}
        write_artifact(paths.vstar, outcomes)
        paths.samples.mkdir(exist_ok=True)
        sample_rows(outcomes).write_parquet(paths.samples / "part-0.parquet")

    def _filter(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        assert paths.vstar.exists()

    def _segments(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        if paths.segments.exists():
            self.seconds = 1.0  # nothing to do
        rows = [steps.state((), [((1,), 3, False, 0.5, 3)]), steps.state((1,), [((2,), 4, True, 1.0, 4)])]
        identity = {"model": "m", "segments": {"completer": "m"}}
        steps.write_segments(paths.segments, rows, identity, cost={"seconds": 32.0, "devices": 1})
        for store, count in ((paths.samples, 3), (paths.continuations, 4)):
            store.mkdir(exist_ok=True)
            sample_rows({"p": ["wrong"] * count}).write_parquet(store / "part-0.parquet")

    def _critic(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        assert paths.segments.exists()
        if paths.critic.exists():
            self.seconds = 1.0  # nothing to do
        paths.critic.mkdir(exist_ok=True)

    def _advantages(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        assert paths.segments.exists()
        if paths.advantages.exists():
            self.seconds = 1.0  # nothing to do
        states = [state("p", 0, keep=True), state("p", 1, keep=True), state("q", 0, keep=False)]
        rows = pl.DataFrame(states, schema=polars_schema(ADVANTAGES))
        ADVANTAGES_TABLE.write(rows, Provenance(identity=IDENTITY, context=CONTEXT), paths.advantages)

    def _train(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        rate = "throughput/completion_tokens_per_second"
        lines = [
            {key: line[key] for key in line if key != rate or not paths.advantages.exists()}
            for line in METRICS
        ]
        paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_model(paths.model, number_of(paths))
        paths.checkpoints.mkdir(exist_ok=True)
        paths.config.write_text("{}")

    def _evaluate(self, paths: RunPaths, arguments: Sequence[str]) -> None:
        names = [arguments[place + 1] for place, part in enumerate(arguments) if part == "--model"]
        before = read_results(paths) or Results(results=[])
        found = [*before.results, *(evaluated(name) for name in names)]
        models = list(dict.fromkeys(each.model for each in found))
        pairs = [(first, second) for place, second in enumerate(models) for first in models[:place]]
        store = paths.evaluations / "samples" / "held_out-sampled-0"
        store.mkdir(parents=True, exist_ok=True)
        for name in names:
            (store / f"part-{Path(name).parent.name or name}-{paths.root.name}.parquet").write_text(name)
        self.evaluated.append([paths.root.name, *(weight_of(paths, name) for name in names)])
        results = Results(results=found, comparisons=[compared(*pair) for pair in pairs])
        paths.results("json").write_text(results.model_dump_json())


METRICS = [
    {"iteration": 0, "evaluate/pass_at_1": 0.4, "time/evaluate": 1.0},
    {"iteration": 1, "time/iteration": 2.0, "throughput/completion_tokens_per_second": 10.0},
    {"iteration": 2, "time/iteration": 48.0, "throughput/completion_tokens_per_second": 0.5},
]


def state(prompt: str, step: int, *, keep: bool) -> dict[str, Any]:
    """A row of advantages.parquet."""
    return {
        "state_id": f"{prompt} {step}",
        **dict.fromkeys(("prompt", "answer", "prefix"), "text"),
        "prompt_id": prompt,
        "prompt_token_hash": "hash",
        "prefix_token_ids": [1] * step,
        "step": step,
        "action_texts": ["a", "b"],
        "action_token_ids": [[1], [2]],
        "action_counts": [1, 1],
        "action_ends": [False, False],
        "action_values": [0.0, 1.0],
        "action_samples": [1, 1],
        "values_from": "monte_carlo",
        "values": [0.0, 1.0],
        "standard_errors": [0.1, 0.1],
        "advantages": [-0.5, 0.5],
        "gap": 1.0,
        "keep": keep,
        "dropped_by": None if keep else "gap",
    }


def number_of(paths: RunPaths) -> int:
    return int(paths.root.name.rpartition("round")[2])


def write_model(folder: Path, number: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    save_file({"weight": np.array([float(number)], dtype=np.float32)}, folder / "model.safetensors")


def weight_of(paths: RunPaths, model: str) -> float:
    """What tells a model of these tests from others."""
    folder = {"reference": run_paths("mine").base_model, "trained": paths.model}.get(model, Path(model))
    file = folder / "model.safetensors"
    return float(load_file(file)["weight"][0]) if file.exists() else -1.0


def evaluated(model: str) -> Figures:
    number = 0 if model == "reference" else int(Path(model).parent.name[-1]) if "/" in model else 9
    accuracy = 0.4 + number / 100
    return Figures(
        model=model,
        path=model,
        benchmark="held_out",
        grader="gsm8k/1",
        prompts=8,
        greedy_accuracy=accuracy + 0.1,
        greedy_accuracy_interval_95=(accuracy, accuracy + 0.2),
        samples_per_prompt=4,
        pass_at_1=accuracy,
        pass_at_1_interval_95=(accuracy - 0.1, accuracy + 0.1),
        reward_mean=accuracy,
        completion_tokens_mean=20.0,
        truncated=0.0,
        outcomes={},
        kl_sequence=number / 10,
        sampling={},
    )


def compared(first: str, second: str) -> Comparison:
    return Comparison(
        benchmark="held_out",
        first=first,
        second=second,
        prompts=8,
        difference=evaluated(second).accuracy - evaluated(first).accuracy,
        interval_95=(0.001, 0.125),
        p_value=0.01,
    )


def load_step_level(
    path: Path, overrides: Sequence[str] = (), run: str | None = None
) -> tuple[RunConfig, Sequence[str]]:
    return load_with_inputs(path, [*overrides, "train.objective.name=direct_advantage"], run)


@pytest.fixture
def config(tmp_path: Path, artifacts: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG + HELD_OUT)
    return path


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, which take seconds of drawing, only in the tests that are about them."""
    if "with_page" not in request.fixturenames:
        nothing = Sheet(title="", header=[], rows=[])
        monkeypatch.setattr("common.rounds.write_rounds", lambda plan: nothing)


@pytest.fixture
def with_page() -> None:
    """For a test that writes the page."""


def run(path: Path, commands: Commands, count: int, **options: Any) -> str:
    """The output of `rounds`."""
    output = io.StringIO()
    arguments = {"load": load_with_inputs, "run": "mine", **options}
    run_rounds(path, console=Terminal(file=output, width=200), count=count, execute=commands, **arguments)
    return output.getvalue()


def plan_of(path: Path, name: str = "mine", **options: Any) -> Plan:
    config, inputs = load_with_inputs(path, (), name)
    return Plan(config=config, inputs=inputs, **options)


def pointer_of(name: str) -> Pointer:
    return Pointer.model_validate_json(run_paths(name).pointer.read_bytes())


def test_each_round_samples_trains_and_is_evaluated_with_the_model_of_the_one_before(
    config: Path, artifacts: Path
) -> None:
    commands = Commands()
    run(config, commands, 2)
    assert commands.done == [
        "base-model mine",
        *("vstar mine-round1", "train mine-round1", "evaluate mine-round1", "evaluate mine"),
        *("vstar mine-round2", "train mine-round2", "evaluate mine-round2", "evaluate mine"),
    ]
    references = [reference_model(load_config(run_paths(f"mine-round{k}").settings)) for k in (1, 2)]
    assert [folder.resolve() for folder in references] == [
        artifacts / "mine" / "base_model",
        artifacts / "mine-round1" / "model",
    ]
    assert commands.given[4][-4:] == [
        *("--model", "reference"),
        *("--model", str(artifacts / "mine-round1" / "model")),
    ]
    assert commands.given[8][-2:] == ["--model", str(artifacts / "mine-round2" / "model")]


def test_an_objective_without_stage_1_only_trains(config: Path) -> None:
    commands = Commands()
    run(config, commands, 2, overrides=["train.objective.name=grpo"])
    assert [line for line in commands.done if "round2" in line] == [
        "train mine-round2",
        "evaluate mine-round2",
    ]
    assert load_config(run_paths("mine-round2").settings).train.objective.name == "grpo"


@pytest.mark.parametrize(("values", "critic"), [("critic", ["critic"]), ("monte_carlo", [])])
def test_the_step_level_method_makes_states_values_and_advantages(
    config: Path, values: str, critic: Sequence[str]
) -> None:
    commands = Commands()
    run(config, commands, 1, load=load_step_level, overrides=[f"advantages.values={values}"])
    of_round = [line.split()[0] for line in commands.done if line.endswith("round1")]
    assert of_round == ["segments", *critic, "advantages", "train", "evaluate"]


def test_conditions_on_prompts_are_a_filter_after_stage_1(config: Path) -> None:
    commands = Commands()
    conditions = ["pass_rate < 1", "vstar_se < 0.2"]
    run(config, commands, 1, where=conditions)
    assert commands.done[1:4] == ["vstar mine-round1", "filter mine-round1", "train mine-round1"]
    assert commands.given[2][2:] == [
        *("filter", "--run", "mine-round1", "--no-drop-unsolved"),
        *("--where", "pass_rate < 1", "--where", "vstar_se < 0.2"),
    ]
    run(config, commands, 1, run="other", where=conditions, overrides=["vstar.drop_unsolved=true"])
    assert "--drop-unsolved" in commands.given[commands.done.index("filter other-round1")]


def test_each_round_has_a_seed_of_its_own_and_evaluations_have_the_first_ones(config: Path) -> None:
    seeds: dict[str, int] = {}

    class Noting(Commands):
        def _train(self, paths: RunPaths, arguments: Sequence[str]) -> None:
            super()._train(paths, arguments)
            seeds[f"train {number_of(paths)}"] = self.seed

        def _evaluate(self, paths: RunPaths, arguments: Sequence[str]) -> None:
            super()._evaluate(paths, arguments)
            assert self.seed == 3

    run(config, Noting(), 3, overrides=["seed=3"])
    assert seeds["train 1"] == 3, "round 1 is what a run of this config would be"
    assert len(set(seeds.values())) == 3
    assert seeds["train 2"] == pointer_of("mine-round2").seed
    run(config, Noting(), 2, overrides=["seed=3"], run="again")
    assert pointer_of("again-round2").seed == seeds["train 2"]


def test_a_round_points_to_the_one_before_and_to_the_first_reference(config: Path, artifacts: Path) -> None:
    run(config, Commands(), 3)
    first, third = pointer_of("mine-round1"), pointer_of("mine-round3")
    assert (first.number, first.before, first.run) == (1, None, "mine")
    assert (third.number, third.before) == (3, "mine-round2")
    assert third.first_reference == first.reference
    assert first.reference.identity == model_identity(artifacts / "mine" / "base_model")
    assert third.reference.identity == model_identity(artifacts / "mine-round2" / "model")


def test_several_processes_train_and_do_nothing_else(config: Path) -> None:
    commands = Commands()
    run(config, commands, 1, load=load_step_level, processes=4)
    launched = [
        line
        for line, command in zip(commands.done, commands.given, strict=True)
        if "--nproc-per-node" in command
    ]
    assert launched == ["critic mine-round1", "train mine-round1"]


def test_what_is_done_is_done_and_a_higher_number_adds_rounds(config: Path, artifacts: Path) -> None:
    run(config, Commands(), 2)
    again, more = Commands(), Commands()
    run(config, again, 2)
    run(config, again, 1)
    assert again.done == []
    run(config, more, 3)
    assert more.done == ["vstar mine-round3", "train mine-round3", "evaluate mine-round3", "evaluate mine"]
    assert not list(artifacts.glob("*/checkpoints"))


def test_the_base_model_is_made_once_and_taken_if_it_is_there(config: Path, artifacts: Path) -> None:
    (artifacts / "mine").mkdir(parents=True)
    write_model(artifacts / "mine" / "base_model", 7)
    commands = Commands()
    run(config, commands, 1)
    assert "base-model mine" not in commands.done


def test_the_completions_of_an_evaluation_are_not_drawn_a_second_time(config: Path, artifacts: Path) -> None:
    run(config, Commands(), 1)
    store = Path("evaluations", "samples", "held_out-sampled-0")
    (drawn,) = (artifacts / "mine-round1" / store).iterdir()
    assert (artifacts / "mine" / store / drawn.name).read_text() == "trained"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_job_that_is_killed_anywhere_ends_with_the_same_rounds(config: Path, moment: str) -> None:
    conditions = ["pass_rate < 1"]
    whole = Commands()
    run(config, whole, 2, run="whole", where=conditions)
    expected = table(reached(plan_of(config, "whole", where=conditions)))
    assert len(whole.done) == 11
    for number in range(len(whole.done)):
        name = f"killed-{moment}-{number}"
        first, second = Commands({number: moment}), Commands()
        with pytest.raises(Killed):
            run(config, first, 2, run=name, where=conditions)
        run(config, second, 2, run=name, where=conditions)
        repeated = [line.replace(name, "whole") for line in second.done]
        # The base model is there; another step whose record could not be written is done again.
        assert repeated == whole.done[number + (moment == "after" and number == 0) :]
        assert table(reached(plan_of(config, name, where=conditions))) == expected


def test_a_kill_while_a_round_begins_leaves_nothing_that_is_in_the_way(config: Path, artifacts: Path) -> None:
    run(config, Commands(), 1)
    shutil.copytree(artifacts / "mine-round1", artifacts / "half")
    plan = plan_of(config)
    second = plan.round(2)
    second.paths.root.mkdir()
    second.paths.settings.write_text(as_document(second.config))  # what is written before the pointer
    commands = Commands()
    run(config, commands, 2)
    assert commands.done[0] == "vstar mine-round2"


def test_a_step_that_fails_is_named_and_repeated(config: Path) -> None:
    failing = Commands(fails=["train mine-round2"])
    with pytest.raises(UserError, match=r"^round 2, train: error: it diverged; mend the cause"):
        run(config, failing, 3)
    assert failing.done[-1] == "train mine-round2"
    commands = Commands()
    run(config, commands, 2)
    assert commands.done == ["train mine-round2", "evaluate mine-round2", "evaluate mine"]


def test_a_changed_config_is_refused_and_resources_may_change(config: Path) -> None:
    run(config, Commands(), 1)
    commands = Commands()
    with pytest.raises(
        UserError, match=r"mine-round1 began with other settings .*: vstar.beta1 was 0.5 and is 1;"
    ):
        run(config, commands, 2, overrides=["vstar.beta1=1.0"])
    with pytest.raises(UserError, match=r"seed was 0 and is 4"):
        run(config, commands, 2, overrides=["seed=4"])
    with pytest.raises(UserError, match=r"chosen by --where nothing, now by \['pass_rate < 1'\]"):
        run(config, commands, 2, where=["pass_rate < 1"])
    assert commands.done == []
    values = ["engine.max_num_seqs=8", "train.tokens_per_micro_batch=512", "train.zero_stage=3"]
    run(config, commands, 2, overrides=values)
    found = load_config(run_paths("mine-round2").settings)
    assert (found.engine.max_num_seqs, found.train.zero_stage) == (8, 3)


def test_another_reference_than_a_round_began_with_is_refused(config: Path, artifacts: Path) -> None:
    run(config, Commands(), 2)
    write_model(artifacts / "mine-round1" / "model", 5)
    with pytest.raises(UserError, match=r"mine-round1/model is not the model that mine-round2 began with"):
        run(config, Commands(), 2)
    shutil.rmtree(artifacts / "mine-round2")
    again = Commands()
    run(config, again, 2)
    assert again.done[0] == "vstar mine-round2"


def test_a_round_that_is_done_again_is_evaluated_again(config: Path, artifacts: Path) -> None:
    """As docs/rounds.md says: its folder is removed; another model comes of it."""

    class Another(Commands):
        def _train(self, paths: RunPaths, arguments: Sequence[str]) -> None:
            super()._train(paths, arguments)
            write_model(paths.model, 7)

    first, again = Commands(), Another()
    run(config, first, 2)
    assert first.evaluated[-1] == ["mine", 2.0]
    shutil.rmtree(artifacts / "mine-round2")
    run(config, again, 2)
    assert again.done[-2:] == ["evaluate mine-round2", "evaluate mine"]
    assert again.evaluated == [["mine-round2", 7.0], ["mine", 7.0]]


def test_a_round_under_way_has_no_figures_of_one_that_was_removed(config: Path, artifacts: Path) -> None:
    run(config, Commands(), 2)
    shutil.rmtree(artifacts / "mine-round2")
    with pytest.raises(UserError):
        run(config, Commands(fails=["train mine-round2"]), 2)
    assert cells(config)["held-out: pass@1"] == ["0.400", "0.410", "–"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_step_level_rounds_have_whole_times_wherever_they_are_killed(config: Path, moment: str) -> None:
    whole = Commands()
    run(config, whole, 1, run="whole", load=load_step_level)
    settings, inputs = load_step_level(config, (), "whole")
    expected = table(reached(Plan(config=settings, inputs=inputs)))
    for number in range(len(whole.done)):
        name = f"killed-{number}"
        with pytest.raises(Killed):
            run(config, Commands({number: moment}), 1, run=name, load=load_step_level)
        run(config, Commands(), 1, run=name, load=load_step_level)
        settings, inputs = load_step_level(config, (), name)
        assert table(reached(Plan(config=settings, inputs=inputs))) == expected


def test_a_table_of_another_model_in_the_first_runs_folder_is_refused_before_anything_trains(
    config: Path, artifacts: Path
) -> None:
    """`evaluate` would refuse it, after the first round was trained."""
    table = write_artifact(artifacts / "mine" / "vstar.parquet", {"p": ["wrong"]})
    commands = Commands()
    with pytest.raises(UserError, match=r"vstar.parquet is of another model than .*base_model.*weights is"):
        run(config, commands, 1)
    assert commands.done == ["base-model mine"]
    table.unlink()
    identity = {**IDENTITY, "model": model_identity(artifacts / "mine" / "base_model")}
    write_artifact(table, {"p": ["wrong"]}, identity=identity)
    run(config, commands, 1)


def test_a_completer_in_the_runs_own_folder_is_the_first_runs_in_every_round(
    config: Path, artifacts: Path
) -> None:
    completer = "segments.completer={run}/base_model"
    run(config, Commands(), 2, load=load_step_level, overrides=[completer])
    for number in (1, 2):
        settings = load_config(run_paths(f"mine-round{number}").settings)
        assert settings.segments.completer == str(artifacts / "mine" / "base_model")


def test_a_run_of_that_name_that_is_no_round_is_left_alone(config: Path, artifacts: Path) -> None:
    (artifacts / "mine-round1").mkdir(parents=True)
    (artifacts / "mine-round1" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="mine-round1 is another run, not a round of mine"):
        run(config, Commands(), 1)


def test_only_one_job_at_a_time(config: Path) -> None:
    with exclusive_run(run_paths("mine"), "rounds"), pytest.raises(UserError, match="another rounds job"):
        run(config, Commands(), 1)


def test_conditions_need_stage_1(config: Path) -> None:
    with pytest.raises(UserError, match=r"--where chooses among the prompts of vstar\.parquet"):
        run(config, Commands(), 1, where=["pass_rate < 1"], overrides=["train.objective.name=grpo"])


def test_a_hub_models_revision_is_that_of_round_1_only(config: Path) -> None:
    options = ["model.path=some/model", "model.revision=abc"]
    settings, inputs = load_with_inputs(config, options, "mine")
    plan = Plan(config=settings, inputs=inputs)
    assert plan.base_model is None
    assert plan.round(1).config.model == settings.model
    assert plan.round(2).config.model.revision is None
    assert "revision =" not in as_document(plan.round(2).config)


HOSTILE = [
    'train.objective={name="grpo"}',
    "vstar.beta1=inf",
    r'data.few_shot=[{prompt="a\nb\u007f é \"q\"", completion="c"}]',
    r'sampling.stop=["\n\n", "x"]',
    'train.lora={rank=4, target_modules=["q_proj"]}',
]


def test_a_config_that_is_written_is_read_as_the_same(tmp_path: Path) -> None:
    files = sorted((ROOT / "configs").glob("*.toml"))
    assert len(files) >= 8
    for file in files:
        for overrides in ([], HOSTILE):
            before = load_config(file, overrides)
            (tmp_path / "written.toml").write_text(as_document(before))
            assert load_config(tmp_path / "written.toml") == before


def test_a_lag_of_a_whole_round_draws_every_batch_from_the_reference() -> None:
    """As OAPL does between two synchronisations; a shorter lag brings newer weights."""
    iterations = 6

    def weights_loaded(staleness: int) -> int:
        loaded = 0

        class Counting:
            def attempt(self, draw: Any, weights: object = None) -> list[Any]:
                nonlocal loaded
                loaded += weights is not None
                return []

            def settle(self, draw: Any, groups: list[Any], weights: object) -> tuple[list[Any], int]:
                return groups, 0

            def load_weights(self, weights: object) -> None:
                nonlocal loaded
                loaded += 1

            def end(self) -> None:
                pass

        draw = Draw(prompts=[], places=[], seed=0)
        pipeline = RolloutPipeline(
            cast(Sampler, Counting()), staleness, lambda number: draw, lambda: [("weight", torch.zeros(1))]
        )
        for number in range(1, iterations + 1):
            pipeline.groups(number, iterations, {})
        pipeline.close()
        return loaded

    assert weights_loaded(iterations - 1) == 0
    assert weights_loaded(iterations - 2) == 1


def test_the_settings_for_oapl_in_the_docs_train_on_the_samples_of_v_star(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "rounds.md").read_text(), re.DOTALL)
    (tmp_path / "base.toml").write_text((ROOT / "configs" / "math-qwen2.5-1.5b.toml").read_text())
    (tmp_path / "oapl.toml").write_text(f'include = ["base.toml"]\n{block}')
    settings = load_config(tmp_path / "oapl.toml")
    assert not settings.train.draws
    assert settings.vstar.keep_token_ids
    assert settings.train.iterations_over(1000) * settings.train.steps_per_iteration == 50
    assert settings.train.objective.group_size == settings.vstar.num_samples == 8
    assert settings.vstar.beta1 == 1.0


def cells(config: Path, name: str = "mine") -> dict[str, list[str]]:
    sheet = table(reached(plan_of(config, name)))
    assert sheet.header[0] == "reference"
    return {row: [cell.text for cell in line] for row, line in sheet.rows}


def test_the_table_has_the_rounds_side_by_side(config: Path) -> None:
    run(config, Commands(), 2)
    found = cells(config)
    assert found["held-out: pass@1"] == ["0.400", "0.410", "0.420"]
    assert found["held-out: pass@1, 95 %"][2] == "0.320 to 0.520"
    assert found["held-out: greedy"] == ["0.500", "0.510", "0.520"]
    assert found["held-out: greedy, 95 %"][2] == "0.420 to 0.620"
    assert found["held-out: gain"] == ["–", "+0.010", "+0.010"]
    assert found["held-out: gain, 95 %"] == ["–", *["+0.001 to +0.125"] * 2]
    assert found["KL to the first reference"] == ["0.000", "0.100", "0.200"]
    assert found["KL to the round's own reference"] == ["–", "0.900", "0.900"]
    assert found["pass rate in stage 1"] == ["–", "0.250", "0.333"]
    assert found["prompts trained on"] == ["–", "2 of 2", "2 of 2"]
    # Stage 1: 3 + 4 tokens of p and 3 of q, in round 2 one completion more; training: 2 × 10 + 48 × 0.5.
    assert found["tokens drawn"] == ["–", "54", "59"]
    # Training's files know of 51 s, its last process took 32 s; two evaluations.
    assert [found[f"time: {name}"][1] for name in ("vstar", "train", "evaluate")] == [
        *("32.0 s", "51.0 s", "1 min 04 s")
    ]


def test_a_gain_has_its_sign_in_whichever_order_the_models_were_evaluated(config: Path) -> None:
    run(config, Commands(), 2)
    file = run_paths("mine").results("json")
    results = Results.model_validate_json(file.read_bytes())
    turned = [
        each.model_copy(
            update={
                "first": each.second,
                "second": each.first,
                "difference": -each.difference,
                "interval_95": (-0.125, -0.001),
            }
        )
        for each in results.comparisons
    ]
    file.write_text(results.model_copy(update={"comparisons": turned}).model_dump_json())
    assert cells(config)["held-out: gain"] == ["–", "+0.010", "+0.010"]
    assert cells(config)["held-out: gain, 95 %"] == ["–", *["+0.001 to +0.125"] * 2]


def test_the_step_level_method_counts_prompts_with_a_state_to_train_on_and_tokens_of_states(
    config: Path,
) -> None:
    run(config, Commands(), 1, load=load_step_level)
    settings, inputs = load_step_level(config, (), "mine")
    sheet = table(reached(Plan(config=settings, inputs=inputs)))
    found = {row: line[1].text for row, line in sheet.rows}
    assert found["prompts trained on"] == "1"
    # 3 + 4 + 5 tokens of solutions, and 4 completions of a token each from the state that is not the prompt's.
    assert found["tokens drawn"] == "16", "training draws none, and a prefix is not drawn"
    assert "mean V̂* in stage 1" not in found


def test_a_round_that_is_under_way_has_what_there_is(config: Path) -> None:
    with pytest.raises(UserError):
        run(config, Commands(fails=["train mine-round2"]), 2)
    found = cells(config)
    assert found["held-out: pass@1"][2] == "–"
    assert found["mean V̂* in stage 1"][2] != "–"
    assert found["time: train"][1:] == ["51.0 s", "–"]


@pytest.mark.usefixtures("with_page")
def test_without_benchmarks_nothing_is_evaluated_and_the_page_says_so(config: Path, artifacts: Path) -> None:
    config.write_text(CONFIG)
    commands = Commands()
    output = run(config, commands, 1)
    assert not [line for line in commands.done if line.startswith("evaluate")]
    assert output.startswith("no evaluation: the config has neither [evaluate.data] nor")
    page = (artifacts / "mine" / "rounds.html").read_text()
    assert "nothing was evaluated" in page
    assert "<img" not in page
    assert "pass@1" not in (artifacts / "mine" / "rounds.md").read_text()


@pytest.fixture
def page(config: Path, artifacts: Path, with_page: None) -> Path:
    """The page of two rounds whose config has a hostile text."""
    run(config, Commands(), 2, overrides=["data.instruction=<script>1</script>"])
    return artifacts / "mine" / "rounds.html"


def test_the_page_has_the_table_and_two_figures(page: Path) -> None:
    html = page.read_text()
    assert html.count('<img class="picture" src="data:image/svg+xml;base64,') == html.count("<img") == 2
    assert (
        "Accuracy against KL to the first reference. held-out: 0.400 at 0, 0.410 at 0.1, 0.420 at 0.2."
        in html
    )
    assert "0.320 to 0.520" in html
    assert "<dt>accuracy, held-out, round 2</dt><dd>0.420</dd>" in html
    assert "<dt>rounds, finished</dt><dd>2 of 2</dd>" in html
    assert "vstar, train, evaluate, evaluate-all" in html
    assert "<script" not in html
    assert "| held-out: pass@1 | 0.400 | 0.410 | 0.420 |" in page.with_suffix(".md").read_text()


@pytest.mark.parametrize("rounds", [3, 6])
def test_the_table_fits_a_terminal_and_breaks_no_cell(config: Path, rounds: int) -> None:
    run(config, Commands(), rounds)
    printed = io.StringIO()
    sheet = table(reached(plan_of(config)), is_short=True)
    Terminal(file=printed, width=80).print(sheet.on_terminal())
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert all(cell.text in words for _, row in sheet.rows for cell in row)
    assert lines[0].split()[0] == "reference"
    assert [name for name, _ in sheet.rows] == [
        *("held-out: pass@1", "held-out: greedy", "held-out: gain"),
        *("KL to the first reference", "KL to the round's own reference"),
    ]


@needs_chromium
def test_the_page_fits_a_phone_and_loads_nothing(page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(page, width=360)
        assert browser.content_width() == 360
        first = "document.querySelector('tbody tr td').getBoundingClientRect()"
        assert browser.evaluate(f"{first}.right") <= 360, "a figure is beside the names of the rows"
        browser.evaluate("document.querySelector('.scroll').scrollTo(1000, 0)")
        name = "document.querySelector('tbody th').getBoundingClientRect()"
        assert browser.evaluate(f"{name}.left") >= 0, "the names stay"
        assert browser.requests() == []
        assert browser.complaints() == []
        assert browser.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        links = browser.evaluate("[...document.querySelectorAll('nav a')].map(each => each.hash.slice(1))")
        assert links == browser.evaluate("[...document.querySelectorAll('section')].map(each => each.id)")


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no number of rounds": ([], "--rounds"),
    "no round": (["--rounds", "0"], "--rounds"),
    "no such column": (["--rounds", "1", "--where", "colour = 1"], "there is no column colour"),
    "no process": (["--rounds", "1", "--nproc", "0"], "--nproc"),
    "an unknown key": (["--rounds", "1", "--set", "train.steps=1"], "unknown key train.steps"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_anything_runs(
    run_cli: RunCli, config: Path, artifacts: Path, mistake: str
) -> None:
    arguments, says = MISTAKES[mistake]
    result = run_cli("rounds", "--config", config, *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not artifacts.exists()


def test_two_real_rounds(tiny_model: Path, data_file: Path, tmp_path: Path, artifacts: Path) -> None:
    """Real commands, started warm."""
    path = write_config(tmp_path, tiny_model, data_file)
    said: dict[str, str] = {}

    def started_warm(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
        began = time.monotonic()
        variables = {**os.environ, **environment, "HF_HUB_OFFLINE": "1"}
        result = warm.run(command[1:], cwd=tmp_path, env=variables, timeout=120, cold=False)
        assert result.returncode == 0, result.stderr
        said[log.parent.parent.name + " " + log.stem] = result.stderr
        return Finished(seconds=time.monotonic() - began, cpu_seconds=1.0, peak_gib=1.0)

    output = io.StringIO()
    console = Terminal(file=output, width=200)
    run_rounds(path, load_with_inputs, console, count=2, where=["pass_rate < 1"], execute=started_warm)
    first, second = reached(plan_of(path))[1:]
    assert first.figures["held_out"].prompts == 6
    # Round 1's own reference is the first one, and its completions were not drawn again.
    assert first.own_kl == pytest.approx(_kl(first.figures))
    assert "to draw" in said["mine-round1 evaluate"]
    assert "to draw" not in said["mine-round2 evaluate-all"]
    # Round 2's is round 1's model.
    assert second.own_kl is not None
    assert second.own_kl != pytest.approx(_kl(second.figures))
    sampled = read_provenance(artifacts / "mine-round2" / "vstar.parquet").identity
    assert sampled["model"] == model_identity(artifacts / "mine-round1" / "model")
    assert sampled["seed"] == pointer_of("mine-round2").seed
    assert (artifacts / "mine-round2" / "model" / RunPaths.TRAINED_WITH).exists()


def _kl(figures: Mapping[str, Figures]) -> float:
    found = figures["held_out"].kl_sequence
    assert found is not None
    return found


@pytest.mark.slow
def test_real_rounds_that_are_killed_five_times_are_the_same(
    tiny_model: Path, data_file: Path, tmp_path: Path, artifacts: Path
) -> None:
    path = write_config(tmp_path, tiny_model, data_file)
    kill_five_times(lambda _: ["rounds", "-c", path, "--rounds", "2"], artifacts)
    for number in (1, 2):
        whole, killed = (RunPaths(artifacts / name / f"mine-round{number}") for name in ("whole", "killed"))
        ours, theirs = (load_file(paths.model / "model.safetensors") for paths in (whole, killed))
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours | theirs)
        assert read_vstar(whole.vstar)[0].equals(read_vstar(killed.vstar)[0])
        for folder in (killed.samples, *killed.evaluations.glob("samples/*")):
            found = addresses(sample_files(folder))
            assert found.n_unique() == found.height
    whole_results, killed_results = (
        read_results(RunPaths(artifacts / name / "mine")) for name in ("whole", "killed")
    )
    assert whole_results is not None
    assert killed_results is not None
    assert [each.model_copy(update={"model": "", "path": ""}) for each in whole_results.results] == [
        each.model_copy(update={"model": "", "path": ""}) for each in killed_results.results
    ]
