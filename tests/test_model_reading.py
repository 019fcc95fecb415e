"""Reading a model's folder describes it, finds its end tokens, and refuses models that no later step could use."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from common.model.files import model_identity, network_hash
from common.model.reading import describe_model, eos_token_ids, read_model
from tests.fakes import change_json


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def set_config(folder: Path, **values: Any) -> None:
    change_json(folder / "config.json", **values)


# What it is.


def test_a_model_is_described_by_class_sizes_and_ends(folder: Path) -> None:
    document = read_model(folder).document()
    assert document["class"] == "Qwen2ForCausalLM"
    assert document["stored_as"] == ["F32"]
    assert document["layers"] == 2
    assert (document["hidden_size"], document["context"]) == (64, 512)
    assert document["logit_transforms"] == {}
    assert document["unread_files"] == []
    text = describe_model(document, ["0 (<end>)", "7 (<turn>)"])
    assert text.startswith(
        f"Qwen2ForCausalLM: {document['parameters']:,} parameters (F32), 2 layers of width 64, "
    )
    assert text.endswith("a context of 512; a completion ends at token 0 (<end>) or 7 (<turn>)")
    json.dumps(document)


def test_settings_that_change_the_logits_are_named_also_where_they_are_nested(folder: Path) -> None:
    set_config(
        folder, text_config={"final_logit_softcapping": 30.0, "lm_head_multiplier": 1.0}, logit_scale=None
    )
    assert read_model(folder).document()["logit_transforms"] == {"final_logit_softcapping": 30.0}


def test_files_beside_the_model_are_no_part_of_it(folder: Path) -> None:
    before = read_model(folder)
    save_file({"tok_embeddings.weight": torch.zeros(99, 99)}, folder / "consolidated.safetensors")
    after = read_model(folder)
    assert after.parameters == before.parameters
    assert after.document()["unread_files"] == ["consolidated.safetensors"]


# What no step could use.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"is quantised \(quantization_config gptq\)",
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            r"quantization_config fp8\): it cannot be",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}, "text_config": {"quantization_config": {}}},
            r"quantization_config fp8\): it cannot be",
        ),
        ({"quantization_config": "awq"}, r"is quantised \(quantization_config \?\)"),
        (
            {"is_encoder_decoder": True, "model_type": "t5"},
            r"is an encoder-decoder \(t5\).*use a causal language model",
        ),
        ({"model_type": None}, r"config\.json has no model_type; download"),
        (
            {"vocab_size": 4000},
            r"says vocab_size 4000, but the weights' embedding has \d+ rows; they belong to different",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    set_config(folder, **values)
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_weights_in_a_quantised_format_are_refused_whatever_the_config_says(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    for may_be in (False, True):  # nothing says with which scales
        with pytest.raises(
            UserError, match=r"is quantised \(weights stored as F8_E4M3\): it cannot be trained"
        ):
            read_model(folder, may_be_quantised=may_be)


def test_a_file_of_modelopt_says_that_a_model_is_quantised_and_is_part_of_its_network(folder: Path) -> None:
    """vLLM reads it where config.json says nothing."""
    before = network_hash(folder)
    file = folder / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    with pytest.raises(UserError, match=r"is quantised \(hf_quant_config\.json\): it cannot be trained"):
        read_model(folder)
    assert read_model(folder, may_be_quantised=True).quantisation == "hf_quant_config.json"
    assert network_hash(folder) != before


# Where a completion ends.


def ends(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    return eos_token_ids(folder, tokenizer_eos)


def test_the_ends_are_those_of_the_tokenizer_and_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    set_config(folder, eos_token_id=9)
    assert ends(folder, 3) == (3, 7)
    assert ends(folder, None) == (3, 7)
    for nothing in ('{"eos_token_id": null}', "{}"):
        (folder / "generation_config.json").write_text(nothing)
        assert ends(folder, 3) == (3, 9)
        assert ends(folder, None) == (9,)


def test_without_a_generation_config_those_of_the_config_count_as_in_both_libraries(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    set_config(folder, eos_token_id=[5, 6])
    assert ends(folder, 1) == (1, 5, 6)
    set_config(folder, text_config={"eos_token_id": 8})
    assert ends(folder, None) == (5, 6)
    set_config(folder, eos_token_id=None)
    assert ends(folder, None) == (8,)
    set_config(folder, text_config=None)
    with pytest.raises(
        UserError, match=r"neither the tokenizer nor generation_config\.json nor config\.json names"
    ):
        ends(folder, None)


@pytest.mark.parametrize("wrong", ["</s>", -1, 2.0, True, [[3]]])
def test_an_end_that_is_no_token_id_is_refused(folder: Path, wrong: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id is .*, which is not a token id"
    ):
        ends(folder, None)


def test_an_end_that_the_model_cannot_write_is_refused_unless_there_is_another(folder: Path) -> None:
    rows = read_model(folder).embedding_rows
    assert rows
    (folder / "generation_config.json").write_text("{}")
    set_config(folder, eos_token_id=None)
    with pytest.raises(UserError, match=rf"the EOS token has id {rows}, but the model has {rows} token ids"):
        ends(folder, rows)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert ends(folder, rows) == (2, rows)


# What makes it this model.


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"text_config": {"final_logit_softcapping": 30.0}},
        {"architectures": ["Qwen2ForSequenceClassification"]},
    ],
)
def test_a_config_that_changes_the_distribution_makes_another_model(
    folder: Path, values: dict[str, Any]
) -> None:
    before = model_identity(folder)
    set_config(folder, **values)
    after = model_identity(folder)
    assert after["config"] != before["config"]
    assert {**after, "config": None} == {**before, "config": None}


def test_a_config_that_is_written_otherwise_is_the_same_model(folder: Path) -> None:
    before = model_identity(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    set_config(
        folder, transformers_version="4.0.0", torch_dtype="bfloat16", use_cache=False, _name_or_path="x/y"
    )
    assert model_identity(folder) == before
