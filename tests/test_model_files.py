"""A model's config.json has one reader: everyone who reads a number gets the same answer, or the same refusal."""

import json
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from common.data.prompts import check_fit
from common.engines.shared_engine import refuse_wrong_size
from common.engines.vllm_engine import context_length
from common.errors import UserError
from common.model.files import model_identity, model_numbers, network_hash, reference_model
from common.model.weights import INDEX, SINGLE
from common.rollout import Prompt
from stage2_train.memory import read_shape
from tests.fakes import tiny_config

PROMPT = Prompt(id="p", text="q", answer="1", token_ids=array("i", [1, 2, 3]), token_hash="h")


def write_config(folder: Path, document: Any) -> None:
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")


def test_a_number_is_given_missing_or_refused(tmp_path: Path) -> None:
    write_config(tmp_path, {"vocab_size": 7, "head_dim": None, "hidden_size": 0, "intermediate_size": [1]})
    numbers = model_numbers(tmp_path)
    assert (numbers.get("vocab_size"), numbers.get("head_dim"), numbers.get("layers")) == (7, None, None)
    assert numbers.need("vocab_size") == 7
    assert not numbers.is_tied
    with pytest.raises(
        UserError, match=r"config\.json: hidden_size is 0, not a whole number above 0; download"
    ):
        numbers.get("hidden_size")
    with pytest.raises(UserError, match=r"intermediate_size is \[1\], not a whole number"):
        numbers.get("intermediate_size")
    with pytest.raises(UserError, match=r"config\.json has no head_dim; download"):
        numbers.need("head_dim")


def test_gpt_2_has_other_names_for_its_numbers(tmp_path: Path) -> None:
    write_config(tmp_path, {"n_positions": 5, "n_embd": 8, "n_layer": 2, "n_head": 4, "n_inner": None})
    numbers = model_numbers(tmp_path)
    assert numbers.need("max_position_embeddings") == 5
    assert (numbers.need("hidden_size"), numbers.need("num_hidden_layers")) == (8, 2)
    assert numbers.get("intermediate_size") is None
    with pytest.raises(UserError, match="context"):
        check_fit([PROMPT], tiny_config(tmp_path, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"sliding_window": None}, True),
        ({"rope_parameters": {"rope_theta": 5.0, "factor": None}}, True),
        ({"use_cache": False, "transformers_version": "0", "eos_token_id": 3}, False),
    ],
)
def test_a_network_is_all_that_its_config_says_of_it(
    tmp_path: Path, change: dict[str, Any], is_another: bool
) -> None:
    """Also a null: without a key some kinds of model have a default, such as Mistral's window."""
    document = {"model_type": "mistral", "rope_parameters": {"rope_theta": 5.0}}
    write_config(tmp_path, document)
    before = network_hash(tmp_path)
    write_config(tmp_path, document | change)
    assert (network_hash(tmp_path) != before) == is_another


def test_which_weights_an_index_names_makes_another_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    for name, factor in (("a", 1.0), ("b", 2.0)):
        save_file({key: factor * each for key, each in weights.items()}, folder / f"{name}.safetensors")
    found = []
    for name in ("a", "b"):
        mapping = dict.fromkeys(weights, f"{name}.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
        found.append(model_identity(folder))
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["config"] != found[1]["config"]


def test_the_language_model_of_a_model_that_reads_more_than_text_is_meant(tmp_path: Path) -> None:
    nested = {"hidden_size": 64, "tie_word_embeddings": True}
    write_config(tmp_path, {"hidden_size": 32, "vocab_size": 7, "text_config": nested})
    numbers = model_numbers(tmp_path)
    assert (numbers.get("hidden_size"), numbers.get("vocab_size"), numbers.is_tied) == (64, 7, True)


def test_a_revision_of_a_folder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, model={"revision": "main"})
    with pytest.raises(
        UserError, match=r'model\.revision = "main" would have no effect: .* is a folder on this'
    ):
        reference_model(config)
    assert reference_model(tiny_config(tiny_model, tmp_path)) == tiny_model


READERS: dict[str, Callable[[Path], object]] = {
    "check_fit": lambda folder: check_fit([PROMPT], tiny_config(folder, folder), folder),
    "context_length": lambda folder: context_length(tiny_config(folder, folder), folder),
    "refuse_wrong_size": lambda folder: refuse_wrong_size(2, 2, folder),
    "read_shape": read_shape,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_a_config_that_is_none_with_what_to_do(tmp_path: Path, reader: str) -> None:
    read = READERS[reader]
    with pytest.raises(UserError, match=r"cannot read .*config\.json.*download the model again"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot read .*config\.json.*download the model again"):
        read(tmp_path)
    write_config(tmp_path, [])
    with pytest.raises(UserError, match=r"config\.json holds no JSON object; download the model again"):
        read(tmp_path)
    write_config(tmp_path, {"text_config": "qwen"})
    with pytest.raises(UserError, match="text_config holds no JSON object"):
        read(tmp_path)


def test_the_context_of_a_nested_language_model_bounds_prompts_and_engine(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path)
    write_config(tmp_path, {"text_config": {"max_position_embeddings": 5}})
    assert context_length(config, tmp_path) == 5
    with pytest.raises(UserError, match="more than the model's context of 5"):
        check_fit([PROMPT], config, tmp_path)
    write_config(tmp_path, {"max_position_embeddings": None})
    assert context_length(config, tmp_path) > 5
    check_fit([PROMPT], config, tmp_path)
