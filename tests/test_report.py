"""The report: a table and curves from a run's files alone."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.documents import read_metrics
from common.errors import DamagedFile, UserError
from common.report import write_report
from common.report.cost import stage2_cost, step_level_costs
from common.runs import RunPaths, run_paths
from common.terminal.console import Terminal
from stage2_train.config import load_config
from tests.conftest import ROOT, RunCli
from tests.fakes import change_json, sample_rows
from tests.step_tables import state, write_segments

PNG = b"\x89PNG"


@pytest.fixture
def trained(tmp_path: Path) -> RunPaths:
    """A run as training and evaluation leave it, with an evaluation every second iteration."""
    paths = RunPaths(tmp_path / "run")
    paths.evaluations.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"iteration": 0, "evaluate/pass_at_1": 0.4}]
    for iteration in range(1, 6):
        line = {
            "iteration": iteration,
            "reward/solved": 0.1 * iteration,
            "kl/sequence": 0.2 * iteration,
            "loss/regression": 0.25,
            "completion/tokens_mean": 10.0 + iteration,
        }
        lines.append(line | ({"evaluate/pass_at_1": 0.5} if iteration % 2 == 0 else {}))
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = [
        {
            "model": name,
            "path": f"some/{name}",
            "benchmark": "held_out",
            "grader": "gsm8k/3",
            "prompts": 512,
            "greedy_accuracy": 0.9,
            "greedy_accuracy_interval_95": [0.88, 0.92],
            "samples_per_prompt": 8,
            "pass_at_1": accuracy,
            "pass_at_1_interval_95": [accuracy - 0.01, accuracy + 0.01],
            "pass_at_k": {"1": accuracy, "8": 1.0},
            "reward_mean": accuracy,
            "completion_tokens_mean": 12.0,
            "truncated": 0.0,
            "outcomes": {"correct": 1},
            "kl_sequence": 0.5,
            "sampling": {},
        }
        for name, accuracy in (("reference", 0.4321), ("trained", 0.9876))
    ]
    comparison = {
        "benchmark": "held_out",
        "first": "reference",
        "second": "trained",
        "prompts": 512,
        "difference": 0.5555,
        "interval_95": [0.5, 0.6],
        "p_value": 0.0002,
    }
    paths.results("json").write_text(json.dumps({"results": results, "comparisons": [comparison]}))
    return paths


def report(paths: RunPaths) -> str:
    printed = io.StringIO()
    write_report(paths, Terminal(file=printed, width=80))
    return printed.getvalue()


def test_the_table_sets_the_reference_beside_the_trained_model(trained: RunPaths) -> None:
    row = next(line for line in report(trained).splitlines() if "pass@1" in line)
    assert "0.432" in row
    assert "0.988" in row


def test_the_page_has_a_table_per_benchmark_and_the_comparison(trained: RunPaths) -> None:
    report(trained)
    page = (trained.report / "report.html").read_text()
    assert "held-out: 512 prompts" in page
    assert "trained − reference: +0.555 (95 % interval +0.500 to +0.600, p 0.0002)" in page


def test_the_table_has_every_k_that_was_sampled(trained: RunPaths) -> None:
    found = json.loads(trained.results("json").read_text())
    found["results"][1]["pass_at_k"] = {"1": 0.9876, "2": 0.99, "32": 0.999}
    trained.results("json").write_text(json.dumps(found))
    rows = [re.findall(r"[^\s│]+", line) for line in report(trained).splitlines() if "pass@" in line]
    assert rows[1:] == [["pass@2", "–", "0.990"], ["pass@8", "1.000", "–"], ["pass@32", "–", "0.999"]]


def test_figures_of_a_model_that_was_trained_again_are_said_to_be_old(trained: RunPaths) -> None:
    trained.model.mkdir()
    trained.trained_with.write_text("{}")
    evaluated = trained.results("json").stat().st_mtime
    os.utime(trained.trained_with, (evaluated - 60,) * 2)
    assert "warning" not in report(trained)
    os.utime(trained.trained_with, (evaluated + 60,) * 2)
    line = "`trained` was evaluated before the last training of the run: run `python cli.py evaluate` again"
    assert report(trained).count(f"warning: {line}") == 1
    assert line in (trained.report / "report.html").read_text()


def test_the_curves_are_drawn_as_png_and_svg_and_the_svg_is_the_same_every_time(trained: RunPaths) -> None:
    report(trained)
    first = (trained.report / "training.svg").read_text()
    assert (trained.report / "training.png").read_bytes().startswith(PNG)
    report(trained)
    assert (trained.report / "training.svg").read_text() == first
    assert first.count("<svg") == 1


def test_a_run_that_was_not_evaluated_has_curves_but_no_table(trained: RunPaths) -> None:
    for file in trained.evaluations.iterdir():
        file.unlink()
    assert "pass@1" not in report(trained)
    assert (trained.report / "training.png").exists()


def test_a_run_that_has_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has neither vstar.parquet nor metrics.jsonl: run"):
        write_report(RunPaths(tmp_path), Terminal(quiet=True))


def test_before_training_the_commands_of_the_runs_objective_are_named(
    run_cli: RunCli, tmp_path: Path, tiny_model: Path, artifacts: Path
) -> None:
    steps = {
        "astar_po": ["vstar"],
        "grpo": ["train"],
        "direct_advantage": ["segments", "critic", "advantages", "train"],
    }
    for objective, commands in steps.items():
        config = load_config(ROOT / "configs" / "demo.toml", [f"train.objective.name={objective}"], objective)
        paths = run_paths(objective)
        paths.root.mkdir(parents=True)
        paths.config.write_text(config.to_json())
        result = run_cli("report", "--run", objective)
        assert result.returncode == 2
        named = (f"`python cli.py {each} --config CONFIG.toml --run {objective}`" for each in commands)
        assert f"run {', '.join(named)} first" in result.stderr


@pytest.fixture
def step_level(trained: RunPaths) -> RunPaths:
    """A run of direct_advantage, which draws nothing in training, and whose critic and advantages record no cost."""
    lines = [
        {
            "iteration": iteration,
            "time/iteration": 2.0,
            "kl/sequence": 0.2 * iteration,
            "loss/regression": 0.25,
            "completion/tokens_mean": 10.0,
            "policy/entropy": 0.5,
        }
        for iteration in range(1, 4)
    ]
    trained.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [state((), [((1,), 3, False, 0.5, 3)]), state((1,), [((2,), 4, True, 1.0, 4)])]
    identity = {"model": "m", "segments": {"completer": "m"}}
    write_segments(trained.segments, rows, identity, cost={"seconds": 90.0, "devices": 2})
    trained.samples.mkdir()
    sample_rows({"p": ["correct"] * 3}).write_parquet(trained.samples / "part-1.parquet")
    trained.critic.mkdir()
    trained.advantages.touch()
    return trained


def test_a_step_level_run_has_the_costs_of_what_comes_before_training(step_level: RunPaths) -> None:
    record = step_level.step("critic", "json")
    record.parent.mkdir()
    record.write_text('{"seconds": 61.0, "cpu_seconds": 9.0, "peak_gib": 1.0}')
    costs = [
        *step_level_costs(step_level),
        stage2_cost([values for _, values in read_metrics(step_level.metrics)]),
    ]
    assert [(cost.stage, cost.seconds, cost.tokens, cost.devices) for cost in costs] == [
        # 3 + 4 + 5 tokens of solutions, 4 completions of a token from the state after the first step.
        ("segments", 90.0, 16, 2),
        ("critic", 61.0, 0, None),
        ("advantages", None, 0, None),
        ("stage 2", 6.0, 0, None),
    ]


def test_figures_of_a_step_level_run_are_per_reasoning_step(step_level: RunPaths) -> None:
    report(step_level)
    page = (step_level.report / "report.html").read_text()
    assert re.findall(r"Curve of the ([^:]*):", page) == [
        *("KL to the reference in nats per reasoning step", "entropy in nats per token"),
        *("regression loss", "tokens a reasoning step"),
    ]
    assert page.count("<img") == 4
    assert "segments</th>" in page
    assert "The run has no vstar.parquet but advantages.parquet" in page


def test_a_line_that_is_still_being_written_is_left_out(trained: RunPaths) -> None:
    report(trained)
    whole = (trained.report / "training.svg").read_text()
    with trained.metrics.open("a") as file:
        file.write('{"iteration": 6, "reward/so')
    report(trained)
    assert (trained.report / "training.svg").read_text() == whole


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"garbage", "Invalid JSON: expected value at column 1"),
        (b'{"iteration": 7, "reward/so', "Invalid JSON: EOF while parsing a string at column 27"),
        (b"", "Invalid JSON: EOF while parsing a value at column 0"),
        (b'{"iteration": 7, "\xff": 1}', "Invalid JSON: invalid unicode code point at column 19"),
        (b"null", "Input should be an object"),
        (b"[1, 2]", "Input should be an object"),
        (b"{}", "it names no iteration"),
        (b'{"iteration": null}', "it names no iteration"),
        (b'{"iteration": "last"}', "iteration: Input should be a valid number, unable to parse string"),
        (b'{"iteration": 7, "time/iteration": Infinity}', "time/iteration: Input should be a finite number"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(trained: RunPaths, content: bytes, problem: str) -> None:
    lines = trained.metrics.read_bytes().splitlines(keepends=True)
    trained.metrics.write_bytes(b"".join([*lines[:2], content + b"\n", *lines[2:]]))
    with pytest.raises(DamagedFile) as told:
        report(trained)
    assert str(told.value).startswith(f"{trained.metrics}, line 3 is damaged: {problem}")
    assert str(told.value).endswith("; remove the line: nothing but its point in the curves is lost")


def test_what_cannot_be_read_is_named(trained: RunPaths) -> None:
    for file in (trained.results("json"), trained.metrics):
        file.unlink()
        file.mkdir()
        with pytest.raises(
            DamagedFile, match=rf"^cannot read {file}: Is a directory; correct its permissions"
        ):
            report(trained)


def test_a_line_without_times_and_with_missing_numbers_is_no_damage(trained: RunPaths) -> None:
    with trained.metrics.open("a") as file:
        file.write('{"iteration": 6, "time/iteration": 2.0, "loss/regression": null}\n')
    assert "the training curves" in report(trained)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "Invalid JSON: EOF"),
        ('{"results": [', "Invalid JSON: EOF"),
        ("[]", "Input should be an object"),
        ("{}", "results: Field required"),
        (None, "results.0.model: Field required"),
    ],
)
def test_a_damaged_evaluation_is_named(trained: RunPaths, content: str | None, problem: str) -> None:
    file = trained.results("json")
    if content is None:
        change_json(file, results=[{"path": "x"}])
    else:
        file.write_text(content)
    with pytest.raises(DamagedFile) as told:
        report(trained)
    assert str(told.value).startswith(f"{file} is damaged: {problem}")
    assert str(told.value).endswith("; remove it, or make it again with `python cli.py evaluate`")


def test_a_folder_with_training_alone_has_a_page(trained: RunPaths) -> None:
    report(trained)
    page = (trained.report / "report.html").read_text()
    assert page.count("<img") == 4
    assert "There is no vstar.parquet" in page
    assert "0.988" in page


def test_the_report_needs_no_torch(trained: RunPaths) -> None:
    program = (
        "import sys; from pathlib import Path; from common.terminal.console import Terminal; "
        "from common.runs import RunPaths; from common.report import write_report; "
        f"write_report(RunPaths(Path({str(trained.root)!r})), Terminal(quiet=True)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
