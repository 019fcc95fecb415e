"""LoRA in the rollout engine: vLLM samples from the policy, whether it gets the adapter or merged weights."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from common.runs import RunPaths, run_paths
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.run import run_stage2
from tests.stage2_runs import tiny_config, write_tiny_vstar

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")

LORA = {"rank": 4, "alpha": 16}


def configured(folder: Path, weights: Path, run: str, lora: dict[str, Any], **sections: Any) -> Config:
    document = tiny_config(folder, weights).model_dump(mode="json", exclude_none=True)
    document["train"] |= {"lora": {**LORA, **lora}, "learning_rate": 1e-2}
    for name, values in sections.items():
        document[name] = {**document[name], **values}
    return Config.model_validate({**document, "run": run})


def trained(config: Config) -> RunPaths:
    paths = run_paths(config.run)
    paths.root.mkdir(parents=True)
    write_tiny_vstar(config, paths.vstar)
    run_stage2(config, Terminal(file=io.StringIO(), width=200))
    return paths


def metrics_of(paths: RunPaths) -> list[dict[str, float]]:
    return [json.loads(line) for line in paths.metrics.read_text().splitlines()]


@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_samples_from_the_policy_with_the_adapter_and_with_merged_weights(
    tmp_path: Path, tiny_model: Path, tied_model: Path, artifacts: Path, tied: bool
) -> None:
    model = tied_model if tied else tiny_model
    runs = {
        "merged": configured(tmp_path, model, "merged", {"in_engine": "merged"}),
        "adapter": configured(tmp_path, model, "adapter", {}),
        "beside": configured(tmp_path, model, "beside", {}, engine={"placement": "own processes"}),
    }
    found = {name: metrics_of(trained(config)) for name, config in runs.items()}
    for name, rows in found.items():
        gaps = [row["engine/logprob_gap"] for row in rows[1:]]
        assert len(gaps) == 3
        assert 0 < max(gaps) < 1e-4, name
        assert abs(rows[-1]["kl/sequence"]) > 0.01, "the policy has moved, and the engine with it"
        for ours, theirs in zip(rows, found["merged"], strict=True):
            for figure in ("reward/mean", "kl/sequence", "loss/regression", "evaluate/pass_at_1"):
                assert ours.get(figure, 0.0) == pytest.approx(theirs.get(figure, 0.0), rel=1e-3, abs=1e-5), (
                    name,
                    figure,
                )


def test_in_bfloat16_the_adapter_alone_is_nearer_to_the_trainer(
    tmp_path: Path, tiny_model: Path, artifacts: Path
) -> None:
    gaps = {}
    for name in ("merged", "adapter"):
        config = configured(tmp_path, tiny_model, name, {"in_engine": name}, model={"dtype": "bfloat16"})
        gaps[name] = [row["engine/logprob_gap"] for row in metrics_of(trained(config))[1:]]
    # Rounding the merged weights to bfloat16 moves the policy further than the adapter's own rounding.
    assert max(gaps["adapter"]) < max(gaps["merged"]) / 2


def test_only_vllm_takes_an_adapter(tmp_path: Path, tiny_model: Path) -> None:
    other = {"engine": {"backend": "transformers"}}
    assert not configured(tmp_path, tiny_model, "run", {}, **other).engine_takes_adapter
    assert configured(tmp_path, tiny_model, "run", {}).engine_takes_adapter
    with pytest.raises(
        ValueError, match=r'in_engine = "adapter" needs engine.backend vllm, found transformers'
    ):
        configured(tmp_path, tiny_model, "run", {"in_engine": "adapter"}, **other)
