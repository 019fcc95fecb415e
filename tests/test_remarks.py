"""Training's notes on stage 1's file before it begins: prompts that are not those of [data], misleading rewards."""

import io
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.grading import Grade, Outcome
from common.rollout import Completion, Prompt, Rollout
from common.terminal.console import Terminal
from common.vstar_file import read_vstar, write_vstar
from stage2_train.config import Config
from stage2_train.data import prepare
from stage2_train.ranks import ALONE
from stage2_train.regime import describe_online
from stage2_train.watchers import FirstBatchDoubts, Turn
from tests.stage2_runs import tiny_config, write_tiny_vstar


def said(config: Config, file: Path) -> list[str]:
    return describe_online(config, prepare(config, file))


def test_training_says_where_the_config_would_choose_other_prompts_now(
    tiny_model: Path, tmp_path: Path
) -> None:
    config, file = tiny_config(tmp_path, tiny_model), tmp_path / "vstar.parquet"
    write_tiny_vstar(config, file)
    rows, provenance = read_vstar(file)
    made_of = {**config.data.model_dump(exclude_none=True), "limit": 32, "max_prompt_tokens": 4}
    write_vstar(rows, replace(provenance, context={"data": made_of}), file)

    def other(**data: Any) -> list[str]:
        lines = said(tiny_config(tmp_path, tiny_model, data=data), file)
        return [line for line in lines if line.startswith("these prompts are not those of [data] now")]

    (line,) = other(limit=8, seed=3)
    assert line.endswith(": data.limit is 32 there and 8 here; data.seed is 0 there and 3 here")
    assert other(limit=32) == []


def test_training_warns_where_a_completion_that_was_cut_off_has_the_best_reward(
    tiny_model: Path, tmp_path: Path
) -> None:
    config, file = tiny_config(tmp_path, tiny_model), tmp_path / "vstar.parquet"
    write_tiny_vstar(config, file, made_up=([-1.0, -1.0, 0.0, 1.0],))
    assert not any("warning" in line for line in said(config, file))
    rows, provenance = read_vstar(file)
    outcomes = pl.lit(["wrong", "wrong", "truncated", "correct"]).alias("outcomes")
    write_vstar(rows.with_columns(outcomes), provenance, file)
    (line,) = (line for line in said(config, file) if line.startswith("warning"))
    assert "rewards go down to -1, but the 32 of 128 completions that were cut off" in line


@pytest.mark.parametrize(
    ("graded", "expected"),
    [
        ([(Outcome.CORRECT, 1.0), (Outcome.WRONG, 0.0), (Outcome.TRUNCATED, 0.0)], ""),
        (
            [(Outcome.WRONG, 0.0), (Outcome.WRONG, 0.0)],
            "of the first batch, every completion has the reward 0",
        ),
        ([(Outcome.TRUNCATED, 0.0), (Outcome.TRUNCATED, 0.0)], "every completion was cut off"),
        ([(Outcome.WRONG, -1.0), (Outcome.TRUNCATED, 0.0)], "rewards go down to -1, but the 1 of 2"),
    ],
)
def test_training_without_stage_1_doubts_its_first_batch(
    graded: list[tuple[Outcome, float]], expected: str
) -> None:
    prompt = Prompt(id="p", text="q", answer="1", token_ids=array("i", [1]), token_hash="h")
    rollouts = [
        Rollout(
            prompt=prompt,
            completion=Completion(
                key=0,
                token_ids=(4, 5),
                text="x",
                truncated=outcome is Outcome.TRUNCATED,
                sampled_logprobs=None,
            ),
            grade=Grade(outcome=outcome, reward=reward),
        )
        for outcome, reward in graded
    ]
    printed = io.StringIO()
    watcher = FirstBatchDoubts(ALONE, Terminal(file=printed))
    for number in (0, 1, 2):
        watcher.after(Turn(number=number, metrics={}, rollouts=rollouts, is_last=False))
    lines = printed.getvalue().splitlines()
    assert len(lines) == bool(expected)
    assert all(line.startswith("warning: ") and expected in line for line in lines)
