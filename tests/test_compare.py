"""`compare`: plans, shared work, restarts, records, and the tables, figures and page that are made of them."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from common.errors import DamagedFile, UserError
from common.evaluations import Figures, Results
from common.processes import Finished, execute, program
from common.runs import RunPaths
from common.settings import as_toml
from common.store import addresses, sample_files
from common.study import compare
from common.study.figures import study_figures
from common.study.plan import AdvantagesTable, Plan, VstarTable, read_plan
from common.study.records import (
    Conditions,
    Point,
    Record,
    Seconds,
    finished,
    read_figures,
    training_curve,
)
from common.study.summary import Mean, Summary
from common.terminal.console import Terminal
from stage2_train.config import load_with_inputs
from tests import warm
from tests.chromium import Browser, needs_chromium
from tests.conftest import ROOT, RunCli
from tests.fakes import sample_rows, write_artifact
from tests.killing import Killed, kill_five_times
from tests.step_tables import state, write_segments
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
[train]
iterations = 4
batch_size = 4
mini_batch_size = 4
[evaluate.data]
format = "word_problems"
split = "test"
limit = 8
"""
HEAD = 'study = "methods"\nconfig = "run.toml"\nseeds = [0, 1]\n'
A_STAR = '[[arms]]\nname = "A*-PO"\nsettings = { "train.objective.name" = "astar_po" }\n'
GRPO = '[[arms]]\nname = "GRPO"\nsettings = { "train.objective.name" = "grpo" }\n'
BY_N = '[[arms]]\nname = "N"\nvary = { "vstar.num_samples" = [1, 4, 2] }\n'
BY_BETA = '[[arms]]\nname = "β1"\nvary = { "vstar.beta1" = [inf, 0.25] }\n'


class Commands:
    """Stands where processes are started: does at once what each command would leave behind, and lists the commands.

    `dies` says, by the number of a command, whether it dies before or after its work; `fails` names those that fail.
    """

    def __init__(self, dies: Mapping[int, str] | None = None, fails: Sequence[str] = ()) -> None:
        self.done: list[str] = []
        self.models: dict[str, str] = {}
        self.seconds = 0.0
        self._dies = dies or {}
        self._fails = fails

    def __call__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
        number = len(self.done)
        if self._dies.get(number) == "before":
            raise Killed
        arguments = command[command.index(str(ROOT / "cli.py")) + 1 :]
        name, run = arguments[0], arguments[arguments.index("--run") + 1]
        given = [arguments[place + 1] for place, part in enumerate(arguments) if part == "--set"]
        values = dict(override.split("=", 1) for override in given)
        self.done.append(f"{name} {run}" + (f" {values['vstar.num_samples']}" if name == "vstar" else ""))
        if self.done[-1] in self._fails:
            raise UserError("error: it diverged")
        paths = RunPaths(Path(environment["ASTAR_PO_ARTIFACTS"]) / run)
        self.models = {key: json.loads(value) for key, value in values.items() if value.startswith('"/')}
        self.seconds = 32.0
        paths.root.mkdir(parents=True, exist_ok=True)
        if name != "base-model":
            assert all(Path(folder).is_dir() for folder in self.models.values())
            assert "model.path" in self.models
        getattr(self, f"_{name.replace('-', '_')}")(paths, values, arguments)
        if self._dies.get(number) == "after":
            raise Killed
        return Finished(seconds=self.seconds, cpu_seconds=1.25 * self.seconds, peak_gib=1.5)

    def _base_model(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        paths.base_model.mkdir()

    def _vstar(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        outcomes = ["correct", "wrong"] * int(values["vstar.num_samples"])
        samples = {"p": outcomes[: int(values["vstar.num_samples"])]}
        cost = {"seconds": 30.0, "loading_seconds": 10.0}
        write_artifact(paths.vstar, samples, beta1=float(values["vstar.beta1"]), cost=cost)

    def _segments(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        rows = [state((), [((1,), 3, False, 0.5, 3)]), state((1,), [((2,), 4, True, 1.0, 4)])]
        identity = {"model": "m", "segments": {"completer": "m"}}
        if paths.segments.exists():
            self.seconds = 1.0  # nothing to do
        write_segments(paths.segments, rows, identity, cost={"seconds": 32.0, "devices": 1})
        paths.samples.mkdir(exist_ok=True)
        sample_rows({"p": ["correct"] * 3}).write_parquet(paths.samples / "part-1.parquet")

    def _critic(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        assert Path(arguments[arguments.index("--segments") + 1]).is_file()
        if paths.critic.exists():
            self.seconds = 1.0  # nothing to do
        paths.critic.mkdir(exist_ok=True)

    def _advantages(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        assert Path(arguments[arguments.index("--segments") + 1]).is_file()
        assert paths.critic.exists() == ("advantages.values" not in values)
        if paths.advantages.exists():
            self.seconds = 2.0  # it computes them from the values that it has
        paths.advantages.write_text("")

    def _train(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        for option in {"--vstar", "--advantages"} & set(arguments):
            assert Path(arguments[arguments.index(option) + 1]).is_file()
        lines = metrics(float(values["seed"]))
        if "--advantages" in arguments:
            lines = [{key: line[key] for key in OFFLINE if key in line} for line in lines[1:]]
        paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.model.mkdir()
        paths.checkpoints.mkdir()
        paths.trained_with.write_text("{}")

    def _evaluate(self, paths: RunPaths, values: Mapping[str, str], arguments: Sequence[str]) -> None:
        model = arguments[arguments.index("--model") + 1]
        assert model == "reference" or paths.model.is_dir()
        paths.evaluations.mkdir()
        figures = evaluated(0.4 if model == "reference" else 0.8 + float(values["seed"]) / 100)
        results = Results(results=[figures.model_copy(update={"model": model})])
        paths.results("json").write_text(results.model_dump_json())


OFFLINE = ("iteration", "time/iteration", "memory/peak_gib", "completion/tokens_mean", "kl/sequence")
"""What training on known advantages logs."""


def metrics(seed: float = 0.0) -> list[dict[str, float]]:
    step = {
        "time/iteration": 2.0,
        "throughput/completion_tokens_per_second": 100.0,
        "memory/peak_gib": 3.0,
        "completion/tokens_mean": 9.0,
        "reward/mean": 0.5,
    }
    lines: list[dict[str, float]] = [{"iteration": 0, "evaluate/pass_at_1": 0.4, "time/evaluate": 1.0}]
    for number in (1, 2, 3, 4):
        lines.append({"iteration": number, **step, "kl/sequence": number / 10, "loss/regression": 1 / number})
    lines[-1] |= {"evaluate/pass_at_1": 0.8 + seed / 100, "time/evaluate": 1.0}
    return lines


def evaluated(accuracy: float, kl: float = 0.5) -> Figures:
    return Figures(
        model="trained",
        path="/somewhere/model",
        benchmark="held_out",
        grader="gsm8k/1",
        prompts=8,
        greedy_accuracy=accuracy,
        samples_per_prompt=4,
        pass_at_1=accuracy,
        reward_mean=accuracy,
        completion_tokens_mean=20.0,
        truncated=0.0,
        outcomes={},
        kl_sequence=kl,
        sampling={},
    )


def record(arm: str, seed: int, accuracy: float, *, seconds: float = 60.0) -> Record:
    return Record(
        study="methods",
        arm=arm,
        seed=seed,
        config={},
        trained={"held_out": evaluated(accuracy)},
        reference={"held_out": evaluated(0.4, 0.0)},
        curve=training_curve(metrics(seed)),
        iterations=4,
        cpu_seconds=70.0,
        seconds=Seconds(stage1=0.0, setup=0.0, training=seconds, evaluating=5.0),
        peak_gib=2.0,
        stage1_peak_gib=None,
        completion_tokens=9.0,
        sampled_tokens=9000.0,
        conditions=Conditions(
            processor="some",
            cores=2,
            gpu=None,
            load_average=1.0,
            python="3",
            versions={"torch": "2"},
            commit=None,
        ),
    )


@pytest.fixture
def study(tmp_path: Path, artifacts: Path) -> Callable[..., Path]:
    """Writes a study of these parts."""

    def write(*parts: str) -> Path:
        (tmp_path / "run.toml").write_text(CONFIG)
        path = tmp_path / "study.toml"
        path.write_text("".join(parts))
        return path

    return write


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, which take seconds of drawing, only in the tests that are about them."""
    if not {"reported", "with_report"} & set(request.fixturenames):
        monkeypatch.setattr("common.study.write_report", lambda plan, summary, folder, failures: folder)


@pytest.fixture
def with_report() -> None:
    """For a test whose study writes its report."""


def run(path: Path, commands: Commands, **options: Any) -> str:
    """The output of `compare`."""
    output = io.StringIO()
    compare(path, load_with_inputs, Terminal(file=output, width=200), execute=commands, **options)
    return output.getvalue()


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of a folder, without what differs between any two runs."""
    found = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for each in found.values():
        del each["conditions"]
    return found


def plan_of(path: Path) -> Plan:
    return read_plan(path, load_with_inputs)


def test_each_arm_and_seed_is_a_run_and_a_grid_is_an_arm_for_each_value(study: Callable[..., Path]) -> None:
    plan = plan_of(study(HEAD, A_STAR, GRPO, BY_N))
    assert [run.title for run in plan.runs[:5]] == [
        *("A*-PO, seed 0", "GRPO, seed 0", "N = 1, seed 0", "N = 4, seed 0", "N = 2, seed 0"),
    ]
    assert len(plan.runs) == 10
    assert plan.runs[0].record_name == "Astar-PO-seed0.json"
    assert plan.runs[3].config.vstar.num_samples == 4
    assert plan.runs[1].table is None, "GRPO needs no stage 1"


def test_settings_are_dotted_keys_or_tables(study: Callable[..., Path]) -> None:
    dotted = plan_of(study(HEAD, '[settings]\n"vstar.beta1" = inf\n', A_STAR))
    tables = plan_of(study(HEAD, "[settings.vstar]\nbeta1 = inf\n", A_STAR))
    assert dotted.runs[0].digest == tables.runs[0].digest
    assert dotted.runs[0].config.vstar.beta1 == float("inf")


def test_a_table_under_a_dotted_key_replaces_the_configs_own(
    study: Callable[..., Path], tmp_path: Path
) -> None:
    arm = '[[arms]]\nname = "a"\nsettings = { "train.objective" = { name = "astar_po" } }\n'
    for arms, valid in ((arm, True), (A_STAR, False)):
        path = study(HEAD, arms)
        (tmp_path / "run.toml").write_text(CONFIG + '[train.objective]\nname = "grpo"\nkl = 0.5\n')
        if valid:
            assert plan_of(path).runs[0].settings["train.objective.name"] == "astar_po"
        else:
            with pytest.raises(UserError, match=r"unknown key train.objective.kl"):
                plan_of(path)


@pytest.mark.parametrize(
    "value", [True, 3, 0.5, float("inf"), "astar_po", "3", [1, "a"], [{"prompt": "a b"}]]
)
def test_values_reach_the_command_line_as_they_are(value: Any) -> None:
    from common.config import _parse_value

    assert _parse_value(as_toml(value)) == value


def test_runs_share_what_they_can(study: Callable[..., Path], artifacts: Path) -> None:
    commands = Commands()
    run(study(HEAD, GRPO, BY_N, BY_BETA), commands)
    of_seed_0 = [line for line in commands.done if "seed0" in line]
    assert len([line for line in of_seed_0 if line.startswith("base-model")]) == 1
    drawn = [line for line in of_seed_0 if line.startswith("vstar")]
    assert len({line.split()[1] for line in drawn}) == 1, "one folder of samples"
    # The largest first: it draws. Then N = 1, 4, 2 under β1 = 0.5 and N = 8 under both other β1.
    assert [line.split()[2] for line in drawn] == ["8", "1", "4", "2", "8"]
    assert of_seed_0[0].startswith("base-model")
    assert len([line for line in of_seed_0 if line.startswith("evaluate reference")]) == 1
    assert [line.split("-")[0] for line in of_seed_0[1:4]] == [
        "train GRPO",
        "evaluate reference",
        "evaluate GRPO",
    ]
    found = records(artifacts / "methods" / "results")
    stage1 = {name: each["seconds"]["stage1"] for name, each in found.items() if "seed0" in name}
    assert stage1 == {
        "GRPO-seed0.json": 0.0,
        "N-1-seed0.json": 12.0 + 20.0 / 8,
        "N-2-seed0.json": 12.0 + 20.0 / 4,
        "N-4-seed0.json": 12.0 + 20.0 / 2,
        "beta1-0.25-seed0.json": 32.0,
        "beta1-inf-seed0.json": 32.0,
    }
    assert found["GRPO-seed0.json"]["stage1_peak_gib"] is None


STEP_LEVEL = """
[[arms]]
name = "critic"
settings = { "train.objective.name" = "direct_advantage" }
[[arms]]
name = "larger gap"
settings = { "train.objective.name" = "direct_advantage", "advantages.min_gap" = 0.3 }
[[arms]]
name = "Monte Carlo"
settings = { "train.objective.name" = "direct_advantage", "advantages.values" = "monte_carlo" }
"""


def test_step_level_arms_share_states_and_critic(study: Callable[..., Path], artifacts: Path) -> None:
    path, commands = study(HEAD.replace("[0, 1]", "[0]"), STEP_LEVEL, A_STAR), Commands()
    run(path, commands)
    assert [line.split()[0] for line in commands.done if not line.startswith("evaluate")] == [
        *("base-model", "segments", "critic", "advantages", "train"),
        *("advantages", "train"),
        *("advantages", "train"),
        *("vstar", "train"),
    ]
    found = records(artifacts / "methods" / "results")
    costs = {name: each["seconds"]["stage1"] for name, each in found.items()}
    # The larger gap's advantages took 2 s, since the critic's values were there: it is charged the whole step.
    assert costs == {
        "critic-seed0.json": 3 * 32.0,
        "larger-gap-seed0.json": 3 * 32.0,
        "Monte-Carlo-seed0.json": 2 * 32.0,
        "Astar-PO-seed0.json": 32.0,
    }
    # 3 + 4 + 5 tokens of solutions, which complete the prompt too, and 4 completions of a token from the other state.
    assert found["critic-seed0.json"]["sampled_tokens"] == 12 + 4
    of_stage1 = sum(3 + index for index in range(8))
    assert found["Astar-PO-seed0.json"]["sampled_tokens"] == of_stage1 + 4 * 2 * 100


def test_the_table_that_keeps_the_most_states_is_made_first(study: Callable[..., Path]) -> None:
    smaller = STEP_LEVEL.replace('"advantages.min_gap" = 0.3', '"advantages.min_gap" = 0.01')
    path, commands = study(HEAD.replace("[0, 1]", "[0]"), smaller), Commands()
    lines = run(path, commands, dry_run=True).splitlines()
    wide, narrow = (run.table for run in reversed(plan_of(path).runs[:2]))
    assert isinstance(wide, AdvantagesTable)
    assert isinstance(narrow, AdvantagesTable)
    made = [step for step in lines[1].split(", ") if step.startswith("advantages")]
    assert [step.split()[-1] for step in made] == [wide.name, narrow.name]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_step_level_arms_are_charged_whole_steps_wherever_the_study_is_killed(
    study: Callable[..., Path], artifacts: Path, moment: str
) -> None:
    path, whole = study(HEAD.replace("[0, 1]", "[0]"), STEP_LEVEL), Commands()
    run(path, whole)
    expected = records(artifacts / "methods" / "results")
    for number in range(len(whole.done)):
        name = f"killed-{number}"
        killed = path.with_name("killed.toml")
        killed.write_text(path.read_text().replace("methods", name))
        with pytest.raises(Killed):
            run(killed, Commands({number: moment}))
        run(killed, Commands())
        found = records(artifacts / name / "results")
        assert {key: each["seconds"] for key, each in found.items()} == {
            key: each["seconds"] for key, each in expected.items()
        }
        of_repeated = whole.done[number].split()[0] == "segments" and moment == "after"
        assert (found["critic-seed0.json"]["cpu_seconds"] is None) is of_repeated, (
            "no file knows the processor time of an earlier process"
        )


def test_the_processor_time_is_that_of_everything_that_time_counts(
    study: Callable[..., Path], artifacts: Path
) -> None:
    run(study(HEAD.replace("[0, 1]", "[0]"), STEP_LEVEL, GRPO, A_STAR, BY_N), Commands())
    found = records(artifacts / "methods" / "results")
    cpu = {name: each["cpu_seconds"] for name, each in found.items()}
    training = 1.25 * 32
    assert cpu["GRPO-seed0.json"] == training
    assert cpu["critic-seed0.json"] == cpu["larger-gap-seed0.json"] == 3 * 40 + training
    assert cpu["Astar-PO-seed0.json"] == 40 + training
    # Loading 12 s of 32, and of sampling the part of its N.
    assert cpu["N-2-seed0.json"] == pytest.approx(40 * (12 + 20 * 2 / 8) / 32 + training)


def critics_of(path: Path) -> set[str]:
    tables = [run.table for run in plan_of(path).runs if run.seed == 0]
    return {table.values for table in tables if isinstance(table, AdvantagesTable)}


def test_arms_share_a_critic_unless_a_key_that_shapes_it_differs(study: Callable[..., Path]) -> None:
    step_level = '{ "train.objective.name" = "direct_advantage", %s }'
    keys = ["train.learning_rate = 1e-3", "train.tokens_per_micro_batch = 99", "train.objective.beta = 0.5"]

    def of(setting: str) -> str:
        key, value = setting.split(" = ")
        arm = step_level % f'"{key}" = {value}'
        return f'[[arms]]\nname = "{setting}"\nsettings = {arm}\n'

    assert len(critics_of(study(HEAD, *map(of, keys)))) == 1
    assert len(critics_of(study(HEAD, *map(of, keys), of("train.weight_decay = 0.5")))) == 2


def test_a_completer_in_the_runs_own_folder_is_the_base_runs(
    study: Callable[..., Path], artifacts: Path
) -> None:
    completer = '[settings]\n"segments.completer" = "{run}/base_model"\n'
    commands = Commands()
    run(study(HEAD.replace("[0, 1]", "[0]"), completer, STEP_LEVEL), commands)
    base = artifacts / "methods" / "runs" / "base-seed0" / "base_model"
    assert {name: Path(path) for name, path in commands.models.items()} == {
        "model.path": base,
        "segments.completer": base,
    }


def test_figures_without_a_point_are_left_out(study: Callable[..., Path], artifacts: Path) -> None:
    grid = (
        '[[arms]]\nname = "β"\nsettings = { "train.objective.name" = "direct_advantage" }\n'
        'vary = { "train.objective.beta" = [0.01, 0.1] }\n'
    )
    path = study(HEAD.replace("[0, 1]", "[0]"), grid)
    run(path, Commands())
    plan = plan_of(path)
    figures = study_figures(Summary.of(plan, finished(plan, artifacts / "methods" / "results")))
    assert [(figure.title, len(figure.panels)) for figure in figures] == [
        ("Accuracy against time, memory and KL", 3),
        ("The effect of β", 2),
    ]


def test_a_figure_has_the_numbers_of_a_grid_by_size(study: Callable[..., Path]) -> None:
    rates = "[2e-4, 1e-4, 4e-4]"
    grid = f'[[arms]]\nname = "rate"\nvary = {{ "train.learning_rate" = {rates} }}\n'
    accuracies = {"rate = 0.0002": [0.8], "rate = 0.0001": [0.7], "rate = 0.0004": [0.9]}
    summary = summary_of(study(HEAD.replace("[0, 1]", "[0]"), grid), accuracies)
    effect = next(figure for figure in study_figures(summary) if figure.name == "effect-train-learning_rate")
    expected = "pass@1 by learning rate. rate: 0.700 at 0.0001, 0.800 at 0.0002, 0.900 at 0.0004."
    assert expected in [panel.alt for panel in effect.panels]


def test_other_data_or_sampling_is_another_stage_1(study: Callable[..., Path]) -> None:
    other = '[[arms]]\nname = "cold"\nsettings = { "sampling.temperature" = 0.5 }\n'
    tables = [run.table for run in plan_of(study(HEAD, A_STAR, other)).runs]
    samples = {table.samples for table in tables if isinstance(table, VstarTable)}
    assert len(samples) == 4, "two for each seed"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_study_that_is_killed_anywhere_ends_with_the_same_records(
    study: Callable[..., Path], artifacts: Path, moment: str
) -> None:
    path = study(HEAD.replace("[0, 1]", "[0]"), GRPO, BY_N)
    whole = Commands()
    run(path, whole, results=artifacts / "whole")
    number = 0
    while number < len(whole.done):
        killed = path.with_name("killed.toml")
        killed.write_text(path.read_text().replace("methods", f"killed-{moment}-{number}"))
        folder = artifacts / f"records-{number}"
        first, second = Commands({number: moment}), Commands()
        with pytest.raises(Killed):
            run(killed, first, results=folder)
        kept = records(folder)
        run(killed, second, results=folder)
        found = records(folder)
        assert kept.items() <= found.items()
        assert all(each.pop("study") for each in found.values())
        expected = records(artifacts / "whole")
        assert all(each.pop("study") for each in expected.values())
        assert found == expected
        twice = set(first.done) & set(second.done)
        assert len(twice) <= (moment == "after"), "at most the step whose cost could not be written"
        number += 1


def test_what_is_done_is_done(study: Callable[..., Path], artifacts: Path) -> None:
    path = study(HEAD, A_STAR, GRPO)
    run(path, Commands())
    again = Commands()
    output = run(path, again)
    assert again.done == []
    assert "4 of 4 runs done" in output
    assert not list((artifacts / "methods" / "runs").glob("*/checkpoints"))


def test_a_folder_of_records_is_continued_elsewhere(
    study: Callable[..., Path], artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "records"
    run(study(HEAD, A_STAR), Commands(), results=folder)
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(tmp_path / "elsewhere"))
    there = Commands()
    run(study(HEAD, A_STAR, GRPO), there, results=folder)
    assert not [line for line in there.done if "Astar" in line or line.startswith("vstar")]
    assert len(list(folder.glob("*.json"))) == 4


def test_a_dry_run_lists_and_does_nothing(study: Callable[..., Path], artifacts: Path) -> None:
    path = study(HEAD, A_STAR, GRPO)
    run(path, Commands(), results=artifacts / "records")
    (artifacts / "records" / "GRPO-seed1.json").unlink()
    commands = Commands()
    lines = run(path, commands, results=artifacts / "records", dry_run=True).splitlines()
    assert commands.done == []
    assert lines[0] == "methods: 2 arms × 2 seeds, 3 of 4 runs done"
    assert lines[1] == "A*-PO, seed 0: done"
    assert lines[4] == "GRPO, seed 1: its record", "all steps are done"
    new = run(study(HEAD.replace("methods", "new"), A_STAR), commands, dry_run=True).splitlines()
    assert re.fullmatch(
        r"A\*-PO, seed 0: base-model base-seed0, vstar stage1-seed0-\w+ n8-beta0.5, train Astar-PO-seed0-\w+, "
        r"evaluate reference-seed0-\w+, evaluate Astar-PO-seed0-\w+",
        new[1],
    )


@pytest.mark.usefixtures("with_report")
def test_a_run_that_fails_does_not_stop_the_others(study: Callable[..., Path], artifacts: Path) -> None:
    path = study(HEAD, GRPO, A_STAR)
    name = plan_of(path).runs[0].name
    with pytest.raises(UserError, match=r"1 of 4 runs failed: GRPO, seed 0; mend the cause"):
        run(path, Commands(fails=[f"train {name}"]))
    assert len(records(artifacts / "methods" / "results")) == 3
    page = (artifacts / "methods" / "report.html").read_text()
    assert "GRPO, seed 0: error: it diverged" in page
    assert "Not all arms have all seeds yet" in page


def test_a_shared_step_that_fails_is_not_repeated_for_each_run(study: Callable[..., Path]) -> None:
    path = study(HEAD.replace("[0, 1]", "[0]"), BY_N)
    failing = Commands(fails=["base-model base-seed0"])
    with pytest.raises(UserError, match=r"no run of methods has finished: error: it diverged"):
        run(path, failing)
    assert failing.done == ["base-model base-seed0"]


MISTAKES = {
    "an unknown key": ("seed = 3\n", A_STAR, "unknown key seed; use one of study, config, seeds"),
    "no arms": ("", "", "arms is missing"),
    "an arm twice": ("", A_STAR + A_STAR, 'the arms "A*-PO" and "A*-PO" have the same name'),
    "two names for one file": (
        "",
        A_STAR + A_STAR.replace("A*-PO", "Astar PO"),
        'the arms "A*-PO" and "Astar PO"',
    ),
    "arms with the same settings": (
        "",
        A_STAR + '[[arms]]\nname = "plain"\n',
        'the arms "A*-PO" and "plain" have the same settings',
    ),
    "a name without a letter": ("", '[[arms]]\nname = "π"\n', "needs a letter or digit in its name"),
    "a wrong value": (
        "",
        '[[arms]]\nname = "N"\nvary = { "vstar.num_samples" = [1, 0] }\n',
        'arm "N = 0": ',
    ),
    "an unknown setting": (
        "",
        '[[arms]]\nname = "a"\nsettings = { "train.steps" = 1 }\n',
        "unknown key train.steps",
    ),
    "a seed among the settings": (
        "",
        '[[arms]]\nname = "a"\nvary = { "seed" = [1, 2] }\n',
        "cannot set seed; give the study's `seeds`",
    ),
    "two keys in a grid": (
        "",
        '[[arms]]\nname = "a"\nvary = { "vstar.beta1" = [1], "vstar.num_samples" = [2] }\n',
        "takes one key and a list of its values",
    ),
    "no list in a grid": (
        "",
        '[[arms]]\nname = "a"\nvary = { "vstar.beta1" = 1 }\n',
        "takes one key and a list",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_runs(study: Callable[..., Path], mistake: str) -> None:
    top, arms, says = MISTAKES[mistake]
    commands = Commands()
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        run(study(HEAD, top, arms), commands)
    assert "study.toml" in str(refused.value)
    assert commands.done == []


def test_other_mistakes_are_refused_too(study: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed 1 is there twice"):
        plan_of(study(HEAD.replace("[0, 1]", "[1, 1]"), A_STAR))
    with pytest.raises(UserError, match=r"cannot read the config .*none\.toml"):
        plan_of(study(HEAD.replace("run.toml", "none.toml"), A_STAR))
    path = study(HEAD, A_STAR)
    (tmp_path / "run.toml").write_text(CONFIG[: CONFIG.index("[evaluate.data]")])
    with pytest.raises(UserError, match=r"has no \[evaluate.data\] section"):
        plan_of(path)


def test_a_record_is_valid_after_the_config_got_new_keys_but_not_after_a_default_changed(
    study: Callable[..., Path], artifacts: Path
) -> None:
    one_seed = HEAD.replace("[0, 1]", "[0]")
    run(study(one_seed, A_STAR), Commands())
    path = artifacts / "methods" / "results" / "Astar-PO-seed0.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["train.max_grad_norm"]
    path.write_text(json.dumps(recorded))
    again = Commands()
    run(study(one_seed, A_STAR), again)
    assert again.done == []
    with pytest.raises(UserError, match=r"train.max_grad_norm was not set and is 3"):
        run(study(one_seed, '[settings]\n"train.max_grad_norm" = 3\n', A_STAR), Commands())
    recorded["config"]["train.max_grad_norm"] = 7.5
    path.write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"train.max_grad_norm was 7.5 and is 1"):
        run(study(one_seed, A_STAR), Commands())


def test_a_record_of_other_settings_or_a_damaged_one_is_refused(
    study: Callable[..., Path], artifacts: Path
) -> None:
    run(study(HEAD, A_STAR), Commands())
    changed = study(HEAD, '[settings]\n"train.iterations" = 9\n', A_STAR)
    with pytest.raises(
        UserError,
        match=r"Astar-PO-seed0.json is the result of other settings than .*: train.iterations was 4 and is 9;",
    ):
        run(changed, Commands())
    (artifacts / "methods" / "results" / "Astar-PO-seed0.json").write_text("{")
    with pytest.raises(DamagedFile, match="remove it: the run is then measured again"):
        run(study(HEAD, A_STAR), Commands())


@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ('"train.lora" = { rank = 4 }\n', "", "train.lora was a table and is not set"),
        ("", '"train.lora" = {}\n', "train.lora was not set and is a table"),
    ],
)
def test_a_record_with_a_table_that_its_arm_has_not_is_refused(
    study: Callable[..., Path], before: str, now: str, change: str
) -> None:
    one_seed = HEAD.replace("[0, 1]", "[0]") + "[settings]\n"
    run(study(one_seed, before, A_STAR), Commands())
    with pytest.raises(UserError, match=change):
        run(study(one_seed, now, A_STAR), Commands())


def test_a_record_of_another_number_of_processes_is_refused_and_nothing_of_its_run_is_used(
    study: Callable[..., Path], artifacts: Path
) -> None:
    one, four = HEAD.replace("[0, 1]", "[0]"), HEAD.replace("[0, 1]", "[0]") + "processes = 4\n"
    run(study(one, A_STAR), Commands())
    path = artifacts / "methods" / "results" / "Astar-PO-seed0.json"
    with pytest.raises(UserError, match="processes was 1 and is 4; remove it"):
        run(study(four, A_STAR), Commands())
    recorded = json.loads(path.read_text())
    del recorded["config"]["processes"]  # as an earlier version wrote it
    path.write_text(json.dumps(recorded))
    run(study(one, A_STAR), Commands())
    with pytest.raises(UserError, match="processes was not set and is 4; remove it"):
        run(study(four, A_STAR), Commands())
    path.unlink()
    again = Commands()
    run(study(four, A_STAR), again)
    assert [line.split()[0] for line in again.done] == ["train", "evaluate"]


def test_the_command_says_a_mistake_in_one_line(run_cli: RunCli, study: Callable[..., Path]) -> None:
    result = run_cli("compare", study(HEAD, "seed = 3\n", A_STAR))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_studies_in_configs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((ROOT / "configs" / "studies").glob("demo-*.toml"))
    assert len(files) >= 6
    for file in files:
        assert plan_of(file).runs


def test_time_of_a_continued_training_is_that_of_one_process(
    study: Callable[..., Path], artifacts: Path
) -> None:
    """An earlier process did iterations 1 and 2; the last one spends 32 s, of them 2 × 2 s on iterations, 1 s on one
    evaluation."""
    path = study(HEAD.replace("[0, 1]", "[0]"), GRPO)
    paths = RunPaths(artifacts / "methods" / "runs" / plan_of(path).runs[0].name)
    paths.root.mkdir(parents=True)
    old = [
        *metrics()[:3],
        metrics()[3] | {"time/iteration": 99.0},
    ]  # its iteration 3 was after the checkpoint
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in old))
    run(path, Commands())
    seconds = records(artifacts / "methods" / "results")["GRPO-seed0.json"]["seconds"]
    assert seconds == {"stage1": 0.0, "setup": 32.0 - 5.0, "training": 8.0, "evaluating": 2.0}


def test_the_curve_has_a_point_for_each_evaluation_with_means_since_the_one_before() -> None:
    first, last = training_curve(metrics())
    assert first == Point(iteration=0, seconds=0.0, accuracy=0.4)
    assert (last.iteration, last.seconds, last.accuracy) == (4, 8.0, 0.8)
    assert last.kl == pytest.approx(0.25)
    assert last.loss == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_the_figures_of_other_models_are_left_out(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert read_figures(paths, "trained") == {}
    both = [evaluated(0.8), evaluated(0.4).model_copy(update={"model": "reference"})]
    paths.evaluations.mkdir()
    paths.results("json").write_text(Results(results=both).model_dump_json())
    found = read_figures(paths, "trained")
    assert found == {"held_out": both[0].model_copy(update={"path": ""})}


def test_a_mean_has_students_interval() -> None:
    assert Mean.of([]) is None
    assert Mean.of([2.0]) == Mean(2.0, None, 1)
    three = Mean.of([1.0, 2.0, 3.0])
    assert three is not None
    assert three.value == 2.0
    assert three.half == pytest.approx(4.302653 / 3**0.5)
    assert three.text(2) == "2.00 ± 2.48"
    assert three.text(1, signed=True) == "+2.0 ± 2.5"


def summary_of(path: Path, figures: Mapping[str, Sequence[float]]) -> Summary:
    """A summary of these accuracies by arm, one for each seed; times are 60 s, and for GRPO 120 s."""
    plan = plan_of(path)
    made = {
        run.record_name: record(
            run.arm.name,
            run.seed,
            figures[run.arm.name][run.seed],
            seconds=120.0 if run.arm.name == "GRPO" else 60.0,
        )
        for run in plan.runs
        if run.arm.name in figures and run.seed < len(figures[run.arm.name])
    }
    return Summary.of(plan, made)


def test_the_table_has_means_ranks_and_the_reference(study: Callable[..., Path]) -> None:
    rebel = GRPO.replace("GRPO", "REBEL").replace("grpo", "rebel")
    summary = summary_of(
        study(HEAD, A_STAR, GRPO, rebel), {"A*-PO": [0.9, 0.9], "GRPO": [0.8, 0.84], "REBEL": [0.7, 0.7]}
    )
    sheet = summary.main_table()
    assert sheet.header == ["time, min", "memory, GiB", "KL(π‖π_ref)", "pass@1", "greedy", "tokens", "seeds"]
    cells = {name: dict(zip(sheet.header, row, strict=True)) for name, row in sheet.rows}
    assert cells["reference"]["pass@1"].text == "0.400 ± 0.000"
    assert cells["reference"]["time, min"].text == "/"
    assert cells["GRPO"]["pass@1"].text == "0.820 ± 0.254"
    assert [cells[name]["pass@1"].rank for name in ("A*-PO", "GRPO", "REBEL")] == [1, 2, None]
    assert [cells[name]["time, min"].rank for name in ("A*-PO", "GRPO", "REBEL")] == [1, None, 1]
    assert cells["REBEL"]["seeds"].text == "2"
    assert "| A\\*-PO | **1.00 ± 0.00** |" in sheet.markdown()


def test_an_arm_with_fewer_seeds_than_another_has_no_rank(study: Callable[..., Path]) -> None:
    summary = summary_of(study(HEAD, A_STAR, GRPO), {"A*-PO": [0.9, 0.7], "GRPO": [0.85]})
    rows = dict(summary.main_table().rows)
    assert [cell.text for cell in rows["GRPO"]][3] == "0.850"
    assert [cell.rank for cell in rows["GRPO"]] == [None] * 7


def with_curve(of: Record, accuracies: Sequence[float], *, stage1: float = 0.0) -> Record:
    """A record with an evaluation every 10 s; each iteration takes 1 s."""
    curve = [
        Point(iteration=10 * number, seconds=10.0 * number, accuracy=accuracy)
        for number, accuracy in enumerate(accuracies)
    ]
    seconds = Seconds(stage1=stage1, setup=5.0, training=curve[-1].seconds, evaluating=9.0)
    return of.model_copy(update={"curve": curve, "seconds": seconds})


def test_the_time_to_an_accuracy_counts_stage_1_and_lies_between_evaluations() -> None:
    made = with_curve(record("A*-PO", 0, 0.9), [0.4, 0.6, 0.5, 0.9], stage1=20.0)
    assert made.seconds_to(0.5) == pytest.approx(20 + 5 + 5)
    assert made.seconds_to(0.7) == pytest.approx(20 + 5 + 20 + 5)
    assert made.seconds_to(0.4) == pytest.approx(25)
    assert made.iterations_to(0.5) == pytest.approx(5)
    assert made.iterations_to(0.7) == pytest.approx(25)
    assert made.seconds_to(0.91) is made.iterations_to(0.91) is None
    assert made.accuracy_at(3.0) == 0.4, "before the first iteration it is the reference's"
    assert made.accuracy_at(20 + 5 + 15) == pytest.approx(0.55)
    assert made.accuracy_at(1000.0) == 0.9


def test_the_table_of_speed_says_how_many_seeds_reach_an_accuracy(study: Callable[..., Path]) -> None:
    path = study(HEAD, "targets = [0.8]\n", A_STAR, GRPO)
    summary = summary_of(path, {"A*-PO": [0.9, 0.9], "GRPO": [0.8, 0.8]})
    assert summary.speed_table() is None, "two evaluations are no curve"
    curves = {
        ("A*-PO", 0): ([0.4, 0.6, 0.8, 0.9], 15.0),
        ("A*-PO", 1): ([0.4, 0.6, 0.8, 0.9], 15.0),
        ("GRPO", 0): ([0.4, 0.6, 0.7, 0.8, 0.8], 0.0),
        ("GRPO", 1): ([0.4, 0.6, 0.7, 0.7, 0.7], 0.0),
    }
    records = {
        key: with_curve(summary.records[key], accuracies, stage1=stage1)
        for key, (accuracies, stage1) in curves.items()
    }
    sheet = Summary(plan=summary.plan, records=records).speed_table()
    assert sheet is not None
    # The fastest run of each seed is GRPO's: 45 s.
    after = ["pass@1 after 0.38 min", "pass@1 after 0.75 min"]
    assert sheet.header == ["time to 0.8, min", "iterations to 0.8", *after]
    cells = {name: [(cell.text, cell.rank) for cell in row] for name, row in sheet.rows}
    assert cells == {
        "A*-PO": [("0.67 ± 0.00", None), ("20 ± 0", None), ("0.450 ± 0.000", None), ("0.850 ± 0.000", 1)],
        "GRPO": [
            ("0.58, in 1 of 2", None),
            ("30, in 1 of 2", None),
            ("0.675 ± 0.000", 1),
            ("0.750 ± 0.635", None),
        ],
    }


def test_without_times_the_table_of_speed_has_iterations(study: Callable[..., Path]) -> None:
    summary = summary_of(study(HEAD, "times = false\ntargets = [0.8]\n", A_STAR), {"A*-PO": [0.9, 0.9]})
    records = {key: with_curve(each, [0.4, 0.6, 0.7, 0.9]) for key, each in summary.records.items()}
    sheet = Summary(plan=summary.plan, records=records).speed_table()
    assert sheet is not None
    assert sheet.header == ["iterations to 0.8"]
    assert [cell.text for _, row in sheet.rows for cell in row] == ["25 ± 0"]
    without = summary_of(study(HEAD, "times = false\n", A_STAR), {"A*-PO": [0.9, 0.9]})
    assert Summary(plan=without.plan, records=records).speed_table() is None


def test_arms_are_compared_seed_by_seed(study: Callable[..., Path]) -> None:
    summary = summary_of(study(HEAD, A_STAR, GRPO), {"A*-PO": [0.5, 0.9], "GRPO": [0.6, 1.0]})
    sheet = summary.paired_table()
    assert sheet is not None
    ((name, cells),) = sheet.rows
    assert name == "GRPO"
    assert cells[0].text == "+0.100 ± 0.000", "the spread of seeds cancels"
    assert cells[3].text == "2.00 × (2.00–2.00)"


def test_a_comparison_says_of_how_many_common_seeds_it_is(study: Callable[..., Path]) -> None:
    path = study(HEAD.replace("[0, 1]", "[0, 1, 2]"), "targets = [0.8]\n", A_STAR, GRPO)
    summary = summary_of(path, {"A*-PO": [0.9, 0.9, 0.9], "GRPO": [0.8, 0.8]})
    curves = {("A*-PO", 0): 0.9, ("A*-PO", 1): 0.9, ("A*-PO", 2): 0.9, ("GRPO", 0): 0.8, ("GRPO", 1): 0.7}
    records = {key: with_curve(summary.records[key], [0.4, last]) for key, last in curves.items()}
    sheet = Summary(plan=summary.plan, records=records).paired_table()
    assert sheet is not None
    ((_, cells),) = sheet.rows
    found = {title: cell.text for title, cell in zip(sheet.header, cells, strict=True)}
    assert found["iterations to 0.8, ratio"] == "1.25 ×, in 1 of 2"
    assert found["time, ratio"] == "1.00 × (1.00–1.00)", "of the two seeds that both have"
    assert found["time to 0.8, ratio"].endswith(" ×, in 1 of 2"), "the other never got there"


@pytest.fixture
def reported(study: Callable[..., Path], artifacts: Path) -> Path:
    """The folder of a study with methods, two grids and a hostile name, whose report is written once."""
    hostile = '[[arms]]\nname = "<script>1</script>"\nsettings = { "train.learning_rate" = 0.1 }\n'
    path = study(HEAD, A_STAR, GRPO, hostile, BY_N, BY_BETA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.study.write_report", lambda plan, summary, folder, failures: folder)
        run(path, Commands())
    run(path, Commands())
    return artifacts / "methods"


def test_the_page_has_every_figure_and_beside_it_are_files(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    names = ["curves", "effect-vstar-beta1", "effect-vstar-num_samples", "trade-offs"]
    assert sorted(file.stem for file in reported.glob("*.svg")) == names
    assert sorted(file.stem for file in reported.glob("*.png")) == names
    assert all((reported / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    assert page.count("<img") == 3 + 2 + 4 + 4
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img")
    assert "<script" not in page
    assert "| GRPO |" in (reported / "tables.md").read_text()


def test_a_study_without_times_compares_none(
    study: Callable[..., Path], artifacts: Path, with_report: None
) -> None:
    path = study(HEAD, "times = false\n", A_STAR, GRPO, BY_N)
    run(path, Commands())
    folder = artifacts / "methods"
    tables = (folder / "tables.md").read_text()
    assert "The study compares no times" in tables
    lines = tables.splitlines()
    headers = [line for line, below in pairwise(lines) if below.startswith(("|---", "| ---"))]
    titles = [cell.strip() for line in headers for cell in line.split("|")]
    assert {"memory, GiB", "sampled tokens, k"} <= set(titles)
    assert not [title for title in titles if re.search(r"time|, s$|, min", title)]
    drawn = " ".join(file.read_text() for file in folder.glob("*.svg"))
    assert "iteration" in drawn
    assert "time, " not in drawn


@needs_chromium
def test_the_page_fits_a_phone_and_loads_nothing(reported: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(reported / "report.html", width=360)
        assert browser.content_width() == 360
        assert browser.requests() == []
        assert browser.complaints() == []
        assert browser.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
        assert browser.evaluate("[...document.images].every(each => each.alt.length > 20)")
        links = browser.evaluate("[...document.querySelectorAll('nav a')].map(each => each.hash.slice(1))")
        assert links == browser.evaluate("[...document.querySelectorAll('section')].map(each => each.id)")


def test_a_command_that_fails_says_why_and_where_the_rest_is(tmp_path: Path) -> None:
    script = "print('line'); print('error: no such thing'); raise SystemExit(2)"
    with pytest.raises(UserError, match=r"^error: no such thing \(all of it: .*log\)$"):
        execute([sys.executable, "-c", script], tmp_path / "log", {})
    with pytest.raises(UserError, match=r"^exit status -9"):
        execute([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "log", {})


def test_a_command_has_its_environment_and_its_cost(tmp_path: Path) -> None:
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    script = "import os, time; block = bytearray(200 * 2**20); time.sleep(0.2); print(os.environ['GIVEN'])"
    cost = execute([sys.executable, "-c", script], tmp_path / "log", {"GIVEN": "this"})
    assert (tmp_path / "log").read_text() == "this\n"
    assert cost.seconds >= 0.2
    assert 0.2 < cost.peak_gib < max(0.5, ours + 0.1)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_command_ends_with_the_study(tmp_path: Path, ending: signal.Signals) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    ends_together([sys.executable, "-c", child], tmp_path / "log", 1, ending)


RANKS = {
    "at work": "cli.app = lambda: (print(os.getpid(), flush=True), time.sleep(60)); cli.main()",
    "while they start": """
launcher = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == launcher:
    time.sleep(0.01)
cli.app = lambda: time.sleep(60)
cli.main()
""",
}


@pytest.mark.parametrize("state", RANKS)
def test_all_ranks_end_with_a_study_that_is_killed(tmp_path: Path, state: str) -> None:
    """Two processes under torchrun, which ends with the study."""
    (tmp_path / "rank.py").write_text(f"import os, time, cli\n{RANKS[state]}")
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        str(tmp_path / "rank.py"),
    ]
    ends_together(launcher, tmp_path / "log", 2, signal.SIGKILL)


def ends_together(command: Sequence[str], log: Path, processes: int, ending: signal.Signals) -> None:
    """Executes a command that prints the ids of its processes, ends what executes it, and waits for their end."""
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from pathlib import Path; from common.processes import execute;"
        f"execute({list(command)!r}, Path({str(log)!r}), {{'PYTHONPATH': {str(ROOT)!r}}})"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(ids := re.findall(r"^\d+$", log.read_text() if log.exists() else "", re.MULTILINE)) < processes:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(ending)
    parent.wait(30)
    deadline = time.monotonic() + 20
    for pid in ids:
        stat = Path(f"/proc/{pid}/stat")
        while stat.exists() and stat.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline, f"process {pid} of {processes} is still there"
            time.sleep(0.05)


def test_several_processes_train_under_the_launcher() -> None:
    assert program() == [sys.executable, str(ROOT / "cli.py")]
    assert program(4)[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node", "4"]


def real_study(model: Path, data: Path, folder: Path) -> Path:
    """A study of two arms and one seed that real commands finish within seconds."""
    write_config(folder, model, data, evaluate_every=1)
    path = folder / "study.toml"
    path.write_text(HEAD.replace("[0, 1]", "[0]") + A_STAR + GRPO)
    return path


def test_a_real_study_of_two_arms(tiny_model: Path, data_file: Path, tmp_path: Path, artifacts: Path) -> None:
    """Real commands, started warm: stage 1, two objectives for two iterations, evaluations."""
    path = real_study(tiny_model, data_file, tmp_path)

    def started_warm(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Finished:
        began = time.monotonic()
        variables = {**os.environ, **environment, "HF_HUB_OFFLINE": "1"}
        result = warm.run(command[1:], cwd=tmp_path, env=variables, timeout=120, cold=False)
        assert result.returncode == 0, result.stderr
        return Finished(seconds=time.monotonic() - began, cpu_seconds=1.0, peak_gib=1.0)

    compare(path, load_with_inputs, Terminal(file=io.StringIO(), width=200), execute=started_warm)
    found = finished(plan_of(path), artifacts / "methods" / "results")
    assert len(found) == 2
    for name, each in found.items():
        assert [point.iteration for point in each.curve] == [0, 1, 2]
        assert each.seconds.setup > 0
        assert (each.seconds.stage1 > 0) is ("Astar" in name)
        assert each.trained["held_out"].prompts == 6
        assert each.peak_gib > 0.1


@pytest.mark.slow
def test_a_real_study_that_is_killed_five_times_has_the_same_results(
    tiny_model: Path, data_file: Path, tmp_path: Path, artifacts: Path
) -> None:
    path = real_study(tiny_model, data_file, tmp_path)

    def command(artifacts: Path) -> list[str | Path]:
        return ["compare", path, "--results", artifacts / "records"]

    kill_five_times(command, artifacts)
    whole, killed = (results_of(artifacts / name / "records") for name in ("whole", "killed"))
    assert len(whole) == 2
    assert killed == whole
    for samples in (artifacts / "killed" / "methods" / "runs").glob("*/samples"):
        found = addresses(sample_files(samples))
        assert found.n_unique() == found.height


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Everything in the records that does not depend on the clock or the machine's memory."""
    found = records(folder)
    for each in found.values():
        for name in ("seconds", "cpu_seconds", "peak_gib", "stage1_peak_gib"):
            del each[name]
        for point in each["curve"]:
            del point["seconds"]
    return found
