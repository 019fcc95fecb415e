"""`export`, the model card, and checkpoints where a model is asked for. test_lora.py compares weights of all kinds."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from benchmarks.architectures import named, write_model
from benchmarks.tiny_model import save_tiny_model
from common.errors import UserError
from common.evaluations import Results
from common.files import write_text
from common.runs import RunPaths
from stage2_train.card import Trained
from stage2_train.export import export_checkpoint, loadable_model
from tests.conftest import RunCli
from tests.killing import JobServer
from tests.stage2_runs import tiny_config, write_tiny_vstar
from tests.test_lm_eval import figures

ITERATIONS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run of two iterations, each with its checkpoint; its reference is in the run's folder."""
    folder = tmp_path_factory.mktemp("export")
    run = RunPaths(folder / "artifacts" / "tiny")
    save_tiny_model(run.base_model, seed=0)
    (run.base_model / "README.md").write_text("the card of the reference", encoding="utf-8")
    config = tiny_config(
        folder,
        run.base_model,
        train={"iterations": ITERATIONS, "checkpoint_every": 1, "evaluate_every": 1, "keep_checkpoints": 2},
        engine={"backend": "transformers"},
        data={"instruction": "Answer | after ####."},
    )
    write_tiny_vstar(config, folder / "vstar.parquet")
    document = config.model_dump(mode="json")
    document["model"]["path"] = "{run}/base_model"
    with JobServer(folder / "jobs", "tests.training_jobs") as jobs:
        artifacts, vstar = str(folder / "artifacts"), str(folder / "vstar.parquet")
        assert jobs.run(document, program="train", processes=1, artifacts=artifacts, vstar=vstar) == 0
    return run


@pytest.fixture
def run(trained: RunPaths, tmp_path: Path) -> RunPaths:
    """A copy of that run, to break."""
    return RunPaths(shutil.copytree(trained.root, tmp_path / "artifacts" / "tiny"))


def checkpoint_of(run: RunPaths, iteration: int) -> Path:
    return run.checkpoints / f"iteration-{iteration:06d}"


def test_the_last_checkpoint_is_exported_as_the_model_that_training_exported(
    trained: RunPaths, run_cli: RunCli, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "below" / "exported"
    finished = run_cli("export", "--checkpoint", checkpoint_of(trained, ITERATIONS), "-o", output, warm=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{output}: the policy of iteration-000002 in Hugging Face format\n"
    assert {file.name for file in output.iterdir()} == {file.name for file in trained.model.iterdir()}
    for file in output.iterdir():
        if file.name != "astar_po.json":
            assert file.read_bytes() == (trained.model / file.name).read_bytes(), file.name
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(output)("7 #### 3").input_ids


def test_the_card_says_how_the_model_was_trained(trained: RunPaths) -> None:
    card = ModelCard.load(trained.model / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["astar-po", "reinforcement-learning", "reasoning"],
    }
    state = json.loads((checkpoint_of(trained, ITERATIONS) / "state.json").read_text(encoding="utf-8"))
    facts = state["made_with"]
    rows = [json.loads(line) for line in trained.metrics.read_text(encoding="utf-8").splitlines()]
    for line in (
        "# tiny, iteration 2",
        "`base_model` after 2 iterations of training with the objective `astar_po`.",
        f"| hash of its weights | `{facts['model']['weights']}` |",
        "| prompts | `train.jsonl`: 32 |",
        "| held-out prompts | `test.jsonl`: 5 |",
        r'| their instruction | `"Answer \| after ####."` |',
        f"| graders and versions | `{facts['grader']}` |",
        "| V̂* | from 4 samples per prompt, β1 = inf |",
        "| its beta2 | 0.05 |",
        "| learning_rate | 0.001 |",
        "| processes | 1 |",
        f"| mean reward of the completions drawn | {rows[1]['reward/mean']:.4g} "
        f"| {rows[2]['reward/mean']:.4g} |",
        f"`held_out`, measured during training: {rows[0]['evaluate/pass_at_1']:.4g} at iteration 0, ",
        f"| torch | {facts['versions']['torch']} |",
        f"| deepspeed | {facts['versions']['deepspeed']} |",
    ):
        assert line in card.content, line
    assert str(trained.root.parent) not in card.content


def test_the_card_names_what_is_on_the_hub_and_a_checkpoints_own_iteration(trained: RunPaths) -> None:
    from stage2_train.config import Config

    document = json.loads(trained.config.read_text(encoding="utf-8"))
    document["model"] |= {"path": "Qwen/Qwen2.5-1.5B", "revision": "abc"}
    document["data"] |= {"path": "openai/gsm8k", "name": "main"}
    document["train"]["lora"] = {"rank": 4}
    made = Trained.of(trained, Config.model_validate(document), 1, {"iterations": 2})
    card = ModelCard(made.card())
    assert card.data.get("base_model") == "Qwen/Qwen2.5-1.5B"
    assert card.data.get("datasets") == ["openai/gsm8k"]
    for line in (
        "after 1 of 2 iterations",
        "| its revision | `abc` |",
        "| hash of its weights | not recorded |",
        "| prompts | `openai/gsm8k (main)`, `train` |",
        "| LoRA | rank 4, alpha 32; merged here, and alone in `adapter/` |",
    ):
        assert line in card.content, line
    assert "iteration 2" not in card.content


def test_the_card_has_the_results_of_evaluate_for_its_own_iteration(run: RunPaths, tmp_path: Path) -> None:
    def written(iteration: int, name: str) -> str:
        export_checkpoint(checkpoint_of(run, iteration), tmp_path / name)
        return (tmp_path / name / "README.md").read_text(encoding="utf-8")

    loadable_model(checkpoint_of(run, 1))
    rows = [
        figures(model="reference", path="base", greedy_accuracy=0.125),
        figures(model="trained", path=str(run.model)),
        figures(model="a path", path=str(run.exported(1)), greedy_accuracy=0.375),
    ]
    results = [each.model_copy(update={"pass_at_1": None, "samples_per_prompt": 0}) for each in rows]
    write_text(run.results("json"), Results(results=results).model_dump_json())
    assert "| trained | 0.250 (" in written(2, "last")
    first = written(1, "first")
    assert "| reference | 0.125 (" in first
    assert "| iteration 1 | 0.375 (" in first
    assert "| trained |" not in first
    os.utime(run.trained_with, (time.time() + 60,) * 2)  # trained after it was evaluated
    assert "Accuracy by `evaluate`" not in written(2, "later")
    manifest = checkpoint_of(run, 1) / "manifest.json"  # the run has started over
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert "Accuracy by `evaluate`" not in written(1, "other")
    card = loadable_model(checkpoint_of(run, 1)) / "README.md"
    assert "Accuracy by `evaluate`" not in card.read_text(encoding="utf-8")
    os.utime(run.exported(1) / RunPaths.TRAINED_WITH, (time.time() + 60,) * 2)
    assert "Accuracy by `evaluate`" not in written(1, "again"), "it was not evaluated since"


def test_where_a_model_is_asked_for_a_checkpoint_is_exported_once(run: RunPaths, tiny_model: Path) -> None:
    assert loadable_model(tiny_model) == tiny_model
    checkpoint = checkpoint_of(run, 1)
    folder = loadable_model(checkpoint)
    assert folder == run.root / "exported" / "000001"
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert loadable_model(str(checkpoint)) == folder
    assert weights.stat().st_mtime_ns == written
    # The run has started over: another checkpoint of the same iteration.
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    loadable_model(checkpoint)
    assert weights.stat().st_mtime_ns > written
    assert not list(folder.parent.glob(".*"))


def test_mistakes_are_refused_in_a_line_and_nothing_is_written(run: RunPaths, tmp_path: Path) -> None:
    output, checkpoint = tmp_path / "output", checkpoint_of(run, 2)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            export_checkpoint(path, output)
        assert not list(tmp_path.glob("*output*"))

    refused(run.model, "is not a checkpoint: give a folder artifacts/<run>/checkpoints/iteration-…")
    refused(checkpoint_of(run, 7), "there is no checkpoint .*iteration-000007")
    (checkpoint / "state" / "mp_rank_00_model_states.pt").write_bytes(b"cut off")
    refused(
        checkpoint, "is damaged: state/mp_rank_00_model_states.pt has changed since it was written; export"
    )
    checkpoint = checkpoint_of(run, 1)
    weights = run.base_model / "model.safetensors"
    first = load_file(weights)
    save_file({name: weight + 1 for name, weight in first.items()}, weights, metadata={"format": "pt"})
    refused(
        checkpoint, r"base_model is not the model that the checkpoint was trained from: model\.weights is"
    )
    shutil.rmtree(run.base_model)
    refused(checkpoint, "there is no model at")
    (checkpoint / "state.json").unlink()
    refused(checkpoint, "is damaged: state.json is missing")


def test_an_output_that_exists_is_left_alone(run: RunPaths, run_cli: RunCli, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    finished = run_cli("export", "--checkpoint", checkpoint_of(run, 1), "-o", output)
    assert finished.returncode == 2
    assert finished.stderr == f"error: {output} exists; give the path of a new folder, or remove it\n"
    assert not list(output.iterdir())


def test_a_checkpoint_of_an_earlier_version_is_refused_by_its_weights_alone(
    run: RunPaths, tmp_path: Path
) -> None:
    """It does not say which model it was trained from."""
    from common.files import file_digest

    checkpoint = checkpoint_of(run, 1)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    del state["made_with"]
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    manifest["state.json"] = file_digest(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    export_checkpoint(checkpoint, tmp_path / "old")
    assert "| graders and versions | not recorded |" in (tmp_path / "old" / "README.md").read_text("utf-8")
    shutil.rmtree(run.base_model)
    write_model(named("GPT-2"), run.base_model)
    with pytest.raises(
        UserError, match=r"its weights are not those of the network in .*base_model: \d+ do not fit"
    ):
        export_checkpoint(checkpoint, tmp_path / "other")
