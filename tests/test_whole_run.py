"""`python cli.py run`: the commands of a run, in turn."""

from pathlib import Path

import pytest

from common.settings import as_toml
from common.whole_run import commands_of
from stage2_train.config import load_with_inputs
from tests.conftest import RunCli
from tests.tiny_config import write_config

CONFIG = """
run = "mine"
model = {{ path = {model} }}
grader = {{ name = "gsm8k" }}
[data]
format = "generic"
path = "data.jsonl"
template = "line"
[engine]
backend = "transformers"
[train]
objective = {{ name = {objective} }}
"""
HELD_OUT = '[evaluate.data]\nformat = "generic"\npath = "other.jsonl"\ntemplate = "line"\n'


@pytest.mark.parametrize(
    ("model", "objective", "held_out", "expected"),
    [
        ("{run}/base_model", "astar_po", HELD_OUT, "base-model vstar train evaluate report"),
        ("elsewhere", "astar_po", "", "vstar train report"),
        ("elsewhere", "grpo", "", "train report"),
        ("elsewhere", "direct_advantage", "", "segments critic advantages train report"),
    ],
)
def test_a_run_is_the_commands_that_its_config_needs(
    tmp_path: Path, artifacts: Path, model: str, objective: str, held_out: str, expected: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(model=as_toml(model), objective=as_toml(objective)) + held_out)
    assert commands_of(*load_with_inputs(path)) == expected.split()
    (artifacts / "mine" / "base_model").mkdir(parents=True)
    assert "base-model" not in commands_of(*load_with_inputs(path))


def test_a_run_stops_at_a_command_that_fails_and_a_second_call_does_the_rest(
    run_cli: RunCli, tiny_model: Path, data_file: Path, tmp_path: Path, artifacts: Path
) -> None:
    config = write_config(tmp_path, tiny_model, data_file)
    failed = run_cli("run", "--config", config, "--set", "train.mini_batch_size=3", timeout=120, warm=True)
    assert failed.returncode == 2
    assert failed.stderr.count("error: ") == 1, failed.stderr
    assert not (artifacts / "mine").exists()

    (artifacts / "mine").mkdir(parents=True)
    (artifacts / "mine" / "model").touch()  # in the way of what training writes
    failed = run_cli("run", "--config", config, timeout=120, warm=True)
    assert failed.returncode == 2
    assert (artifacts / "mine" / "vstar.parquet").exists()
    assert not (artifacts / "mine" / "evaluations").exists()
    assert failed.stderr.count("error: ") == 1, failed.stderr

    (artifacts / "mine" / "model").unlink()
    done = run_cli("run", "--config", config, timeout=120, warm=True)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert (artifacts / "mine" / "report" / "report.html").exists()
