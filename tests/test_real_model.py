"""Gemma 3 270M through stage 1, training, export and evaluation: skipped where its folder is not there.

`python -m benchmarks.real_model` writes the folder; ASTAR_PO_REAL_MODEL names it where it is elsewhere.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from benchmarks import real_model
from common.config import DataConfig
from common.data.rendering import PromptRenderer, load_tokenizer
from common.runs import run_paths
from common.vstar_file import read_vstar
from stage2_train.config import Config
from tests.conftest import ROOT, RunCli
from tests.stage2_runs import as_toml

FOLDER = Path(os.environ.get("ASTAR_PO_REAL_MODEL") or ROOT / real_model.FOLDER)
GAP = 1e-3
"""Between log-probs of a token in float32, in nats (measured: 6e-5)."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "config.json").is_file(),
        reason=f"there is no {FOLDER}: see benchmarks/real_model.py, or set ASTAR_PO_REAL_MODEL",
    ),
]


def goes_on(prompt: str, completion: str, answer: str) -> float:
    """The reward: whether the model counts on."""
    return float(completion == f" {answer},")


def counting(first: int, count: int) -> dict[str, str]:
    numbers = range(first, first + count)
    return {"prompt": ",".join(f" {number}" for number in numbers)[1:] + ",", "answer": str(numbers.stop)}


def ending_at_a_comma(folder: Path) -> Path:
    """The model, of which a comma is said to end a completion: a base model hardly ever ends one by itself."""
    folder.mkdir()
    for file in FOLDER.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    ends = folder / "generation_config.json"
    generation = json.loads(ends.read_text(encoding="utf-8"))
    ends.unlink()
    comma = load_tokenizer(FOLDER).convert_tokens_to_ids(",")
    ends.write_text(json.dumps({**generation, "eos_token_id": [generation["eos_token_id"], comma]}))
    return folder


def write_config(folder: Path, model: Path) -> Path:
    """Eight prompts, of which the first is longer than the model's sliding window of 512 tokens; four held out."""
    train = [counting(1, 130), *(counting(first, 4) for first in range(10, 17))]
    held_out = [counting(first, 4) for first in range(30, 34)]
    for name, rows in (("train", train), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {"template": "plain", "max_prompt_tokens": 600}
    config = Config.model_validate(
        {
            "run": "real",
            "model": {"path": str(model), "dtype": "float32"},
            "data": {**read, "path": str(folder / "train.jsonl")},
            "sampling": {"max_completion_tokens": 8},
            "grader": {"name": "tests.test_real_model:goes_on", "workers": 1},
            "engine": {"max_num_seqs": 16},
            "vstar": {"num_samples": 4},
            "train": {
                "learning_rate": 1e-6,
                "batch_size": 8,
                "mini_batch_size": 8,
                "iterations": 2,
                "tokens_per_micro_batch": 600,
                "gradient_checkpointing": False,
            },
            "evaluate": {"num_samples": 2, "data": {**read, "path": str(folder / "test.jsonl")}},
        }
    )
    (folder / "real.toml").write_text(as_toml(config))
    return folder / "real.toml"


def test_a_real_model_is_sampled_trained_exported_and_evaluated(run_cli: RunCli, tmp_path: Path) -> None:
    config = write_config(tmp_path, ending_at_a_comma(tmp_path / "gemma"))
    paths = run_paths("real")

    def step(*arguments: str | Path) -> str:
        done = run_cli(*arguments, "--config", config, timeout=300, warm=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    said = step("vstar")
    [largest] = re.findall(r"forward pass by transformers agree: .* apart on average, (\S+) at most", said)
    assert float(largest) < GAP
    rates = read_vstar(paths.vstar)[0]["pass_rate"].to_list()
    assert sum(rates) / len(rates) > 0.3, "the model can count"

    step("train")
    steps = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    gaps = [each["engine/logprob_gap"] for each in steps if "engine/logprob_gap" in each]
    assert len(gaps) == 2
    assert max(gaps) < GAP

    before, after = (read_config(folder) for folder in (FOLDER, paths.model))
    unchanged = ("sliding_window", "layer_types", "rope_parameters", "tie_word_embeddings", "vocab_size")
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    check_weights(paths.model)

    trained = json.loads(step("evaluate", "--model", paths.model, "--json"))["results"][0]
    assert trained["greedy_accuracy"] > 0.5
    assert 0 < trained["kl_sequence"] < 1, "the weights have moved, a little"


def read_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def check_weights(folder: Path) -> None:
    """The embedding is stored once, and transformers loads it as the output layer too."""
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    [file] = folder.glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model, loading = auto_model.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_prompts_of_a_real_model_begin_with_its_bos_once() -> None:
    renderer = PromptRenderer(FOLDER, DataConfig(format="generic", path="none.jsonl"))
    ids = renderer.render(counting(1, 130)["prompt"])
    assert ids[0] == renderer.tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1
    assert len(ids) > read_config(FOLDER)["sliding_window"] == 512
