"""Stage 1 on real input: GSM8K's questions through real vLLM, each reward derived again from the stored text."""

import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.tiny_model import save_tiny_model
from common.runs import RunPaths, run_paths
from common.vstar_file import read_vstar
from tests import warm
from tests.conftest import ROOT

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"

pytestmark = pytest.mark.skipif(not GSM8K.exists(), reason=f"GSM8K is not on this machine ({GSM8K.name})")


def stage1(run: str, model: Path, questions: int) -> None:
    settings = {
        "model.path": model,
        "data.format": "gsm8k",
        "data.path": GSM8K,
        "data.template": "line",
        "data.limit": questions,
        "data.max_prompt_tokens": 1024,
        "vstar.num_samples": 8,
    }
    cli(
        "vstar",
        "--run",
        run,
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    )


def cli(*arguments: str) -> None:
    result = warm.run([ROOT / "cli.py", *arguments])
    assert result.returncode == 0, result.stderr


def expected_reward(completion: str, answer: str, truncated: bool) -> float:
    """1 if the last number that follows a `####`, and is all that follows it, is the answer; a rule of our own."""
    found = re.findall(r"####\s*\$?(-?[\d,]*\.?\d+)(?![\d.]*\s*[=/:+*-]\s*\d)", completion)
    if truncated or not found:
        return 0.0
    return float(Decimal(found[-1].replace(",", "")) == Decimal(answer.replace(",", "")))


def check(paths: RunPaths, questions: int, limit: int) -> None:
    samples = pl.read_parquet(paths.samples / "*.parquet")
    assert samples.height == questions * 8
    assert samples.select(pl.struct("prompt_id", "sample_index").n_unique()).item() == questions * 8
    truncated = (samples["outcome"] == "truncated").to_list()
    assert all(
        tokens == limit for tokens, cut in zip(samples["completion_tokens"], truncated, strict=True) if cut
    )
    again = [
        expected_reward(completion, answer, cut)
        for completion, answer, cut in zip(samples["completion"], samples["answer"], truncated, strict=True)
    ]
    assert again == samples["reward"].to_list()

    rows, _ = read_vstar(paths.vstar)
    assert rows.height == questions
    assert rows["rewards"].list.sum().sum() == sum(again)
    by_prompt = samples.sort("sample_index").group_by("prompt_id").agg("reward")
    joined = rows.join(by_prompt, on="prompt_id", validate="1:1")
    assert joined["rewards"].to_list() == joined["reward"].to_list()
    plain = 0.5 * np.log(np.mean(np.exp(np.array(joined["reward"].to_list()) / 0.5), axis=1))
    assert np.allclose(joined["vstar"].to_numpy(), plain, rtol=0, atol=1e-12)


def test_gsm8k_questions_pass_through_stage_1_and_their_rewards_follow_from_the_stored_text(
    artifacts: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", seed=0, context=2048)
    stage1("gsm8k", tmp_path / "model", 64)
    assert run_paths("gsm8k").root == artifacts / "gsm8k"
    check(run_paths("gsm8k"), 64, limit=64)


@pytest.mark.slow
def test_all_gsm8k_training_questions_pass_through_stage_1_with_the_demo_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keeps its artifacts in artifacts/gsm8k-demo, so that a second run only checks them."""
    monkeypatch.delenv("ASTAR_PO_ARTIFACTS", raising=False)
    if not run_paths("demo").base_model.exists():
        cli("base-model")
    stage1("gsm8k-demo", run_paths("demo").base_model, 7473)
    check(run_paths("gsm8k-demo"), 7473, limit=64)
