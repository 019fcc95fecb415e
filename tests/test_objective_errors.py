"""Mistakes in choosing an objective: one line that says what to do, exit code 2, before a model loads."""

from pathlib import Path

import pytest

from common.runs import run_paths
from tests.conftest import RunCli
from tests.stage2_runs import as_toml, tiny_config, write_tiny_vstar

MISTAKES: dict[str, tuple[list[str], str]] = {
    "settings of two objectives": (
        ["train.objective.name=grpo", "train.objective.beta2=0.1"],
        'unknown key train.objective.beta2 with name = "grpo"; use one of name, group_size, passes',
    ),
    "an unknown objective": (
        ["train.objective.name=dpo"],
        "train.objective.name is \"dpo\"; use one of 'astar_po', 'grpo'",
    ),
    "staleness": (
        ["train.objective.name=ppo", "train.staleness=1"],
        "staleness 1 draws completions from older weights, which the objective ppo is not for; set it to 0",
    ),
    "a batch that is not whole steps": (
        ["train.objective.name=rebel", "train.batch_size=9"],
        "batch_size 9 is not a multiple of mini_batch_size 8",
    ),
    "a group of one": (
        ["train.objective.vstar=group"],
        "found group_size 1; choose 2 or more",
    ),
    "a group that is no group": (
        ["train.objective.name=grpo", "train.objective.group_size=1"],
        "train.objective.group_size should be greater than or equal to 2, found 1",
    ),
    "two β1": (
        ["train.objective.beta1=0.5"],
        'beta1 is for vstar = "group"; set vstar.beta1, or rescore',
    ),
    "a reference that is not there": (
        ["train.objective.name=rebel", "train.offload_reference=true"],
        "the objective rebel has no reference; leave it out",
    ),
    "V̂* without a file": ([], "vstar.parquet, which the objective astar_po needs; make it with"),
    "rewards that tie": (
        ["train.objective.name=qrpo"],
        "have no more than two different rewards, whose quantiles tie",
    ),
    "a mismatch with nothing": (
        ["train.objective.name=grpo", "--allow-mismatch", "grader"],
        "there is nothing to mismatch without --vstar",
    ),
}
WITH_FILE = ("rewards that tie",)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_the_fix(
    name: str, tmp_path: Path, tiny_model: Path, artifacts: Path, run_cli: RunCli
) -> None:
    config = tiny_config(tmp_path, tiny_model)
    text = as_toml(config)
    objective = text[text.index("[train.objective]") :].partition("\n[")[0]
    (tmp_path / "run.toml").write_text(text.replace(objective, ""), encoding="utf-8")
    if name in WITH_FILE:
        write_tiny_vstar(config, run_paths(config.run).vstar)
    changes, message = MISTAKES[name]
    options = [part for change in changes for part in (("--set", change) if "=" in change else (change,))]
    finished = run_cli("train", "--config", tmp_path / "run.toml", *options, warm=name in WITH_FILE)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert message in finished.stderr
    assert not run_paths(config.run).checkpoints.exists()
    assert artifacts.exists() == (name in WITH_FILE)
