"""Models as people have them: what would make V̂* another policy's is used rightly, or refused before a model loads."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.architectures import named
from benchmarks.architectures import write_model as write_tiny
from common.data.rendering import PromptRenderer
from common.engines import LOCAL, build_engine
from common.engines.loadable import loadable_folder
from common.errors import UserError
from common.model.checkpoint_names import CheckpointNames
from common.model.files import model_identity
from common.model.pretrained import load_causal_lm
from common.model.weights import read_weights, stored_weights
from common.provenance import read_provenance
from common.runs import run_paths
from common.terminal.console import Terminal
from stage1_vstar.run import run_stage1
from stage2_train.config import Config
from stage2_train.data import prepare
from stage2_train.exported import write_model
from stage2_train.forecast import forecast
from stage2_train.preflight import foresight
from tests import stage1_runs
from tests.conftest import ROOT
from tests.fakes import change_json, tiny_config
from tests.stage1_runs import Engines, rows_of, run, write_questions

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def config_of(folder: Path, **sections: Any) -> Config:
    data = write_questions(folder.parent / "questions.jsonl")
    return tiny_config(folder, data, **{"engine": {"backend": "transformers"}, **sections})


def change_tokenizer(folder: Path, **values: Any) -> None:
    change_json(folder / "tokenizer_config.json", **values)


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Where a completion ends.


def eos_in_config_alone(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change_tokenizer(folder, eos_token="<|pad|>", pad_token=None)
    change_json(folder / "config.json", eos_token_id=0)


def eos_beside_a_generation_config(folder: Path) -> None:
    """Which does not name it."""
    eos_in_config_alone(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')


def padding_beyond_the_embedding(folder: Path) -> None:
    renderer = PromptRenderer(folder, config_of(folder).data)
    renderer.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    renderer.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        eos_in_config_alone,
        eos_beside_a_generation_config,
        padding_beyond_the_embedding,
    ],
)
def test_completions_are_those_of_the_model_wherever_its_end_and_its_padding_are_written(
    tiny_model: Path, folder: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    monkeypatch.setattr(stage1_runs, "engine_builder", build_engine)
    run(config_of(tiny_model, run="before"))
    change(folder)
    run(config_of(folder, run="after"))
    same = ["prompt_id", "rewards", "outcomes", "completion_tokens"]
    assert rows_of("after").select(same).equals(rows_of("before").select(same))
    assert set(rows_of("after")["outcomes"].list.first()) != {"truncated"}


def test_a_tokenizer_that_names_neither_end_nor_padding_takes_the_models_end_for_both(tmp_path: Path) -> None:
    folder = write_tiny(named("Qwen3"), tmp_path)
    end = PromptRenderer(folder, config_of(folder).data).eos_token_ids
    change_tokenizer(folder, tokenizer_class="TokenizersBackend", eos_token=None, pad_token=None)
    renderer = PromptRenderer(folder, config_of(folder).data)
    assert renderer.tokenizer.eos_token_id is renderer.tokenizer.pad_token_id is None
    assert renderer.eos_token_ids == end
    assert renderer.pad_token_id == end[0]


def test_what_a_folder_holds_besides_files_is_in_nobodys_way(folder: Path, tmp_path: Path) -> None:
    before = model_identity(folder)
    for name in ("chat_templates", "tokenizer_old", "vocab"):
        (folder / name).mkdir()
    assert model_identity(folder) == before
    model = load_causal_lm(folder, "float32")
    (tmp_path / "export").mkdir()
    write_model(tmp_path / "export", dict(stored_weights(folder)), CheckpointNames(model), folder, "float32")
    assert model_identity(tmp_path / "export") == before


# The same model.


def stretch_positions(folder: Path) -> None:
    change_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0})


def test_a_config_that_was_edited_is_another_model_for_stage_one_and_for_training(
    folder: Path, engines: Engines
) -> None:
    config = config_of(folder, vstar={"num_samples": 2})
    run(config)
    stretch_positions(folder)
    with pytest.raises(UserError, match=r"vstar\.parquet does not belong to this run: model\.config is"):
        run(config_of(folder, vstar={"num_samples": 4}))
    with pytest.raises(UserError, match=r"vstar\.parquet does not belong to this run: model\.config is"):
        prepare(config, run_paths(config.run).vstar)
    assert engines.loaded == 1


# What no command could use.


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def quantised(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def without_a_layer(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=1, layer_types=None)


def without_biases(folder: Path) -> None:
    """Qwen 2's attention has them, and Llama's has none."""
    change_json(
        folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], layer_types=None
    )


REFUSED: list[tuple[Change, str]] = [
    (pointer, r"is a Git LFS pointer"),
    (cut, r"is not a complete safetensors file"),
    (quantised, r"is quantised"),
    (lambda folder: change_json(folder / "config.json", compression_config={"bits": 4}), r"is quantised"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), r"holds a PEFT adapter"),
    (lambda folder: (folder / "config.json").write_text("{"), r"cannot read .*config\.json"),
    (without_a_layer, r"has no place for 12 of the checkpoint's weights, such as model\.layers\.1\."),
    (without_biases, r"has no place for 6 of .*, such as model\.layers\.0\.self_attn\.k_proj\.bias"),
    (
        lambda folder: (folder / "generation_config.json").write_text('{"cache_implementation": "bogus"}'),
        r"generation_config\.json: transformers cannot read it \(",
    ),
    (
        lambda folder: change_json(folder / "config.json", model_type="brandnew"),
        r"no models of type 'brandnew'",
    ),
]


OFFLINE = 6
"""So many of them are refused without transformers."""


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_every_command_refuses_a_folder_that_cannot_be_used_before_it_loads_a_model(
    folder: Path, engines: Engines, change: Change, message: str
) -> None:
    config = config_of(folder)
    run(config)
    change(folder)
    vstar = run_paths(config.run).vstar
    commands: dict[str, Callable[[], object]] = {
        "vstar": lambda: run(config_of(folder, run="anew")),
        "train": lambda: prepare(config, vstar),
        "forecast": lambda: forecast(config, vstar, gpus=1, gpu_gib=80),
    }
    if (change, message) in REFUSED[OFFLINE:]:
        del commands["forecast"]  # which does not ask transformers
    for command in commands.values():
        with pytest.raises(UserError, match=message):
            command()
    assert engines.loaded == 1


def test_a_model_with_a_number_that_is_not_finite_is_neither_sampled_from_nor_trained(
    folder: Path, engines: Engines
) -> None:
    config = config_of(folder)
    run(config)
    change_tensor(
        folder, "model.norm.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), torch.nan)
    )
    for command in (
        lambda: run(config_of(folder, run="anew")),
        lambda: prepare(config, run_paths("test").vstar),
    ):
        with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity"):
            command()
    assert engines.loaded == 1


def test_a_tokenizer_of_another_model_is_refused_by_the_id_that_the_model_lacks(
    folder: Path, engines: Engines
) -> None:
    rows = PromptRenderer(folder, config_of(folder).data).tokenizer.vocab_size
    change_tensor(folder, "model.embed_tokens.weight", lambda tensor: tensor[:40])
    change_tensor(folder, "lm_head.weight", lambda tensor: tensor[:40])
    change_json(folder / "config.json", vocab_size=40)
    assert rows > 40
    with pytest.raises(
        UserError, match=r"its tokenizer gives token id \d+ for .*, but the model has 40 of them"
    ):
        run(config_of(folder))
    assert engines.loaded == 0


# A result that cannot be meant.


def test_a_result_without_any_reward_is_doubted_with_an_example_and_not_trained_on(
    folder: Path, engines: Engines
) -> None:
    engines.next = type(engines.next)(write=lambda request: "no answer here")
    config = config_of(folder)
    printed = run(config)
    assert "warning: no completion that ended holds an answer that the grader finds" in printed
    assert "completion 'no answer here'" in printed
    vstar = run_paths(config.run).vstar
    with pytest.raises(
        UserError, match=r"rewards\.equal: each of the 24 samples of stage 1 has the reward 0"
    ):
        prepare(config, vstar)
    data = prepare(config, vstar, ["rewards.equal"])
    assert data.stage1 is not None
    assert data.stage1.accepted_mismatches[0].startswith("rewards.equal: ")


def test_what_training_will_refuse_is_said_before_it_is_sampled_for(folder: Path, engines: Engines) -> None:
    config = config_of(
        folder, sampling={"top_p": 0.9, "min_p": 0.1}, train={"lora": {"target_modules": ["c_attn"]}}
    )
    lines = foresight(config, folder)
    assert len(lines) == 3
    assert lines[0].startswith("`train` will refuse this: sampling.top_p is 0.9")
    assert lines[1].startswith("`train` will refuse this: sampling.min_p is 0.1")
    assert lines[2].startswith("`train` will refuse this: train.lora.target_modules")
    run(config)
    with pytest.raises(UserError, match=r"sampling\.top_p is 0\.9"):
        prepare(config, run_paths(config.run).vstar)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"evaluate": {"data": {"format": "generic", "path": "nowhere.jsonl"}}},
            "no data file nowhere.jsonl",
        ),
        ({"engine": {"training_tensor_parallel_size": 3}}, "cannot split"),
    ],
)
def test_what_training_needs_besides_stage_1_is_foreseen(
    folder: Path, sections: dict[str, Any], message: str
) -> None:
    [line] = foresight(config_of(folder, **sections), folder)
    assert line.startswith("`train` will refuse this: ")
    assert message in line


def test_forecast_says_what_training_refuses_of_the_config_as_it_is_now(
    folder: Path, engines: Engines
) -> None:
    def draw(config: Config) -> str:
        printed = io.StringIO()
        foresee = partial(foresight, config)
        run_stage1(
            config,
            Terminal(file=printed),
            foresee=foresee,
            check=False,
            engines=LOCAL.built_by(engines.build),
        )
        return printed.getvalue()

    config = config_of(folder, train={"lora": {"target_modules": ["c_attn"]}})
    draw(config)
    vstar = run_paths(config.run).vstar
    [line] = read_provenance(vstar).context["model"]["foreseen"]
    assert line.startswith("`train` will refuse this: train.lora.target_modules")
    mended = config_of(folder, train={"lora": {"target_modules": ["q_proj"]}})
    assert forecast(mended, vstar, gpus=1, gpu_gib=80)["foreseen"] == []
    draw(mended)
    assert read_provenance(vstar).context["model"]["foreseen"] == []
    assert "nothing to do" in draw(mended)


WITHOUT_TRAINING_LIBRARIES = """
import importlib.abc, importlib.util, sys
def is_missing(name):
    return name.partition(".")[0] in ("deepspeed", "peft")
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if is_missing(name):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if is_missing(name) else find_spec(name, *rest)
from pathlib import Path
from stage2_train.config import Config
from stage2_train.preflight import foresight
config = Config.model_validate_json(sys.argv[1])
for objective in ({"name": "ppo"}, {"name": "astar_po"}):
    train = {"objective": objective, "lora": {"target_modules": ["q_proj"]}}
    print(foresight(Config.model_validate({**config.model_dump(), "train": train}), Path(sys.argv[2])))
"""


def test_a_machine_for_stage_1_alone_foresees_what_training_refuses(folder: Path) -> None:
    """It has neither deepspeed nor peft; that it lacks them says nothing of the machine that trains."""
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINING_LIBRARIES, config_of(folder).model_dump_json(), folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n[]\n"


def test_an_engine_is_shown_the_model_without_the_weights_that_are_not_its_own(
    folder: Path, tmp_path: Path
) -> None:
    assert loadable_folder(folder, tmp_path / "run") == folder
    save_file({"tok_embeddings.weight": torch.zeros(9, 9)}, folder / "consolidated.safetensors")
    shown = loadable_folder(folder, tmp_path / "run")
    assert {file.name for file in shown.iterdir()} == {
        file.name for file in folder.iterdir() if file.name != "consolidated.safetensors"
    }
    assert read_weights(shown).shapes == read_weights(folder).shapes
    assert loadable_folder(folder, tmp_path / "run") == shown  # where it may have been compiled for already
    (folder / "added_tokens.json").write_text("{}")
    assert loadable_folder(folder, tmp_path / "run") != shown
