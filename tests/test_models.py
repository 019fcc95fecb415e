"""Every architecture of benchmarks/architectures.py, tiny and random: what stage 2 does with it, without an engine.

A few go through the whole pipeline, all of them with both engines under `-m slow`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoePreTrainedModel

from benchmarks.architectures import ARCHITECTURES, Architecture, named, write_model
from common.engines.vllm_repairs import PatchedClasses
from common.errors import UserError
from common.model.checkpoint_names import CheckpointNames, named_state, refuse_other_names
from common.model.output_layer import freeze_all_but_text, logit_transform
from common.model.pretrained import empty_causal_lm, load_causal_lm, load_pretrained, token_classifier
from common.model.trainable import refuse_untrainable
from common.model.weights import read_weights, stored_weights
from stage2_train.adapted_layers import linear_layers, refuse_unknown_layers, unadapted
from stage2_train.config import Config, LoraConfig
from stage2_train.exported import broken_weight, refuse_broken
from stage2_train.exported import write_model as write_export
from stage2_train.logprobs import LogprobModel, token_logprobs
from stage2_train.lora import Adapter
from tests import warm
from tests.conftest import ROOT
from tests.stage2_runs import tiny_config
from tests.test_logprobs import naive, one_batch, ragged

TOLERANCE = 1e-5
"""Of log-probs in float32 (measured: 4e-6, of entropies)."""
ENGINE_TOLERANCE = 1e-4
"""Of an engine's log-probs in float32 (measured: 3e-6)."""
TRANSFORMED = {
    "Gemma 2",
    "Gemma 4 (text)",
    "Gemma 4",
    "Granite",
    "Granite-MoE",
    "Falcon-H1",
    "Cohere",
    "Cohere 2",
}
"""Those whose logits are not their output layer's."""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {each.name: tmp_path_factory.mktemp("model") for each in ARCHITECTURES}


@pytest.fixture
def architecture(request: pytest.FixtureRequest) -> Architecture:
    found: Architecture = request.param
    return found


@pytest.fixture
def folder(architecture: Architecture, folders: dict[str, Path]) -> Path:
    folder = folders[architecture.name]
    return folder if (folder / "config.json").exists() else write_model(architecture, folder)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    return tiny_config(tmp_path, folder, engine={"backend": "transformers"})


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, indirect=True, ids=str)


@every_architecture
def test_log_probs_and_gradients_are_those_of_the_models_own_forward_pass(
    architecture: Architecture, folder: Path
) -> None:
    model = load_causal_lm(folder, "float32").train()
    module = LogprobModel(model, 0.7)
    assert (module.head.transform is not None) == (architecture.name in TRANSFORMED)
    freeze_all_but_text(model)
    sequences = ragged(500, count=4)
    batch = one_batch(sequences)
    found = token_logprobs(module, batch)
    pairs = [naive(model, sequences[place], 0.7) for place in batch.rows]
    values_K = torch.cat([value for value, _ in pairs])
    torch.testing.assert_close(found.logprobs_K, values_K, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(
        found.entropy_K, torch.cat([each for _, each in pairs]), rtol=0, atol=TOLERANCE
    )
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    weights_K = torch.linspace(-1, 2, len(values_K))
    ours = gradients(weights_K, found.logprobs_K, parameters)
    theirs = gradients(weights_K, values_K, parameters)
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) < 1e-4 * float(gradient.abs().max()) + 1e-7, name


def gradients(weights_K: Tensor, values_K: Tensor, parameters: dict[str, Any]) -> dict[str, Tensor]:
    found = torch.autograd.grad((weights_K * values_K).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@every_architecture
def test_weights_have_the_checkpoints_names_and_go_back_into_the_model(folder: Path) -> None:
    model = load_causal_lm(folder, "float32")
    names = CheckpointNames(model)
    refuse_other_names(names, folder)
    state = named_state(model)
    tensors = {
        name: tensor.clone()
        for group in names.groups
        for name, tensor in names.to_checkpoint({each: state[each].detach() for each in group}).items()
    }
    stored = dict(stored_weights(folder))
    assert tensors.keys() == {name for name in stored if names.covers(name)} == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors.items())
    other = empty_like(model)
    CheckpointNames(other).load(iter(tensors.items()))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def empty_like(model: Any) -> Any:
    """The same model with weights of zero."""
    other = type(model)(model.config)
    other._weight_conversions = model._weight_conversions
    with torch.no_grad():
        for tensor in named_state(other).values():
            tensor.zero_()
    return other


@every_architecture
def test_config_and_headers_tell_what_loading_would(folder: Path, config: Config) -> None:
    refuse_untrainable(folder, config)
    model = empty_causal_lm(folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert CheckpointNames(model).shapes == read_weights(folder).shapes


@every_architecture
def test_an_export_is_the_references_folder_with_other_weights(
    architecture: Architecture, folder: Path, tmp_path: Path
) -> None:
    model = load_causal_lm(folder, "float32")
    names = CheckpointNames(model)
    weights = {name: tensor + 1 for name, tensor in stored_weights(folder)}
    write_export(tmp_path, weights, names, folder, "float32")
    stored = {path.name for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == stored
    assert ("generation_config.json" in stored) == architecture.tokenizer.generation_config
    for name in stored - {"model.safetensors"}:
        assert (tmp_path / name).read_bytes().strip() == (folder / name).read_bytes().strip(), name
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in weights.items())
    assert type(load_causal_lm(tmp_path, "float32")) is type(model)


@every_architecture
def test_an_adapter_is_merged_and_saved_for_peft(folder: Path, config: Config, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = config.train.model_copy(update={"lora": LoraConfig(rank=4, alpha=8)})
    model = load_causal_lm(folder, "float32")
    names, module, batch = CheckpointNames(model), LogprobModel(model, 1.0), one_batch(ragged(500, count=4))
    left_out = unadapted(model)
    with torch.no_grad():
        before_K = token_logprobs(module, batch).logprobs_K
    adapter = Adapter(model, config.model_copy(update={"train": lora}))
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == linear_layers_of(folder) - left_out
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(0.1 if "lora_B" in name else 0)
        adapted_K = token_logprobs(module, batch).logprobs_K
    assert float((adapted_K - before_K).abs().max()) > 0.01
    merged = adapter.merged_weights(named_state(model))
    whole = {
        name: update.added_to(each) if update else each.detach() for name, (each, update) in merged.items()
    }
    plain = load_causal_lm(folder, "float32")
    CheckpointNames(plain).load(
        pair
        for group in names.groups
        for pair in names.to_checkpoint({name: whole[name] for name in group}).items()
    )
    adapter.save(tmp_path / "adapter", {name: each.detach() for name, each in trained.items()})
    loaded = load_causal_lm(folder, "float32")
    PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    for other in (plain, loaded):
        with torch.no_grad():
            found_K = token_logprobs(LogprobModel(other, 1.0), batch).logprobs_K
        torch.testing.assert_close(found_K, adapted_K, rtol=0, atol=TOLERANCE)


def linear_layers_of(folder: Path) -> set[str]:
    return linear_layers(empty_causal_lm(folder))


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    folder = tmp_path / "qwen"
    folder.mkdir()
    return write_model(named("Qwen3-MoE"), folder)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path) -> Iterator[str]:
    """What the two ways to find out say; each in one line."""
    for look in (empty_causal_lm, lambda each: load_causal_lm(each, "float32")):
        with pytest.raises(UserError) as error:
            look(folder)
        assert "\n" not in str(error.value)
        yield str(error.value)


def test_custom_code_and_unknown_types_are_refused(qwen: Path) -> None:
    change_config(qwen, model_type="brandnew", auto_map={"AutoConfig": "code.Config"})
    for line in refused(qwen):
        assert "no models of type 'brandnew', and code that comes with a model is not run" in line


def test_a_model_that_continues_no_texts_is_refused(qwen: Path) -> None:
    change_config(qwen, model_type="vit", architectures=["ViTModel"])
    for line in refused(qwen):
        assert "models of type vit do not continue texts" in line


def test_weights_that_do_not_fit_the_config_are_refused(qwen: Path) -> None:
    weights = load_file(qwen / "model.safetensors")
    change_config(qwen, num_hidden_layers=3)
    for line in refused(qwen):
        assert "the weights do not fit config.json: missing model.layers.2" in line
    change_config(qwen, num_hidden_layers=2)
    weights.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    for line in refused(qwen):
        assert "missing model.layers.1.self_attn.q_proj.weight" in line


def test_logits_that_mix_tokens_are_refused(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(qwen, "float32")
    forward = type(model).forward

    def mixed(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True) * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", mixed)
    with pytest.raises(
        UserError, match=r"qwen3_moe .*its logits do not follow from its output layer one by one"
    ):
        LogprobModel(model, 1.0)


def test_an_output_layer_of_another_kind_is_refused(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(qwen, "float32")
    monkeypatch.setattr(model, "lm_head", torch.nn.Embedding(3, 64))
    with pytest.raises(UserError, match="no output layer that is a linear layer"):
        LogprobModel(model, 1.0)


def test_dropout_of_a_config_is_off_and_soft_caps_of_attention_are_on(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    write_model(named("GPT-2"), tmp_path / "gpt")
    assert json.loads((tmp_path / "gpt" / "config.json").read_text())["resid_pdrop"] > 0
    model = load_causal_lm(tmp_path / "gpt", "float32").train()
    ids = torch.arange(20)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    (tmp_path / "gemma").mkdir()
    write_model(named("Gemma 2"), tmp_path / "gemma")
    with torch.no_grad():
        capped = load_causal_lm(tmp_path / "gemma", "float32")(input_ids=ids).logits
        change_config(tmp_path / "gemma", attn_logit_softcapping=None)
        free = load_causal_lm(tmp_path / "gemma", "float32")(input_ids=ids).logits
    assert float((capped - free).abs().max()) > 1e-3


def test_either_spelling_of_a_composite_checkpoint_is_kept(tmp_path: Path) -> None:
    """Gemma 3's on the hub are older than today's modules; others have been saved since."""
    folder = write_model(named("Gemma 3"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert "language_model.model.norm.weight" in weights
    new = {
        f"model.{name.replace('language_model.model.', 'language_model.')}": each
        for name, each in weights.items()
    }
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(folder, "float32")
    assert (
        CheckpointNames(model).shapes
        == read_weights(folder).shapes
        == CheckpointNames(empty_causal_lm(folder)).shapes
    )


def test_tensors_of_no_weight_of_the_model_are_exported_as_they_are(qwen: Path, tmp_path: Path) -> None:
    """Such as layers for speculative decoding. A tied output layer that was stored too is none."""
    weights = load_file(qwen / "model.safetensors") | {"mtp.norm.weight": torch.ones(3)}
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    names = CheckpointNames(load_causal_lm(qwen, "float32"))
    (tmp_path / "export").mkdir()
    write_export(
        tmp_path / "export", {name: weights[name] + 1 for name in names.shapes}, names, qwen, "float32"
    )
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert torch.equal(exported["mtp.norm.weight"], torch.ones(3))
    change_config(qwen, tie_word_embeddings=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    names = CheckpointNames(load_causal_lm(qwen, "float32"))
    assert "lm_head.weight" not in names.shapes
    assert names.covers("lm_head.weight")


def test_other_copies_of_the_weights_in_the_folder_are_not_read(qwen: Path) -> None:
    shutil.copy(qwen / "model.safetensors", qwen / "consolidated.safetensors")
    before = read_weights(qwen).shapes
    weights = load_file(qwen / "consolidated.safetensors")
    save_file({"other." + name: each for name, each in weights.items()}, qwen / "consolidated.safetensors")
    assert read_weights(qwen).shapes == before
    (qwen / "model.safetensors").rename(qwen / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(before, "model-00001-of-00001.safetensors")}
    (qwen / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_weights(qwen).shapes == before
    (qwen / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of the 1 weight files"):
        read_weights(qwen)


def test_all_weights_have_the_dtype_that_deepspeed_trains_them_in(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers keeps some in float32, such as routers of ERNIE 4.5: a reference would not be its policy."""
    monkeypatch.setattr(Qwen3MoePreTrainedModel, "_keep_in_fp32_modules_strict", {"gate.weight"})
    found = {weight.dtype for weight in load_causal_lm(qwen, "bfloat16").parameters()}
    assert found == {torch.bfloat16}


def test_a_class_that_asks_a_part_of_its_body_for_hidden_states_is_followed() -> None:
    """OPT's does."""
    config = OPTConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    assert logit_transform(OPTForCausalLM(config)) is None


def test_a_critic_lacks_nothing_but_its_head(qwen: Path) -> None:
    kind = token_classifier(qwen)
    load_pretrained(kind, qwen, "float32", num_labels=1)
    weights = load_file(qwen / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit config\.json: missing model\.norm\.weight"):
        load_pretrained(kind, qwen, "float32", num_labels=1)


def test_a_policy_that_is_not_finite_is_not_exported() -> None:
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}
    assert broken_weight({"a": weights["a"]}) is None
    with pytest.raises(UserError, match="its weight b is not finite"):
        refuse_broken(broken_weight(weights), "train.learning_rate")


def test_layers_that_get_no_adapter_are_refused_by_name(qwen: Path) -> None:
    for name in ("down_proj", "gate_up_proj"):
        with pytest.raises(UserError, match=f"no adapter can be put beside this model's {name}"):
            refuse_unknown_layers(qwen, LoraConfig(target_modules=("q_proj", name)))
    refuse_unknown_layers(qwen, LoraConfig(target_modules=("q_proj",)))


@pytest.mark.parametrize("name", ["gpt-oss", "Cohere 2", "Qwen3-Next"])
def test_what_an_engine_would_sample_otherwise_or_not_at_all_is_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    folder = write_model(named(name), tmp_path)
    config = tiny_config(tmp_path, folder)
    kind = named(name).model_type
    with pytest.raises(UserError, match=rf'models of type {kind}: .*; set engine.backend = "transformers"'):
        refuse_untrainable(folder, config)


REFUSED = {
    "Gemma 3": "vLLM needs torchvision",
    "Gemma 4": "vLLM needs torchvision",
    "gpt-oss": "does not take over new weights for experts",
    "Cohere 2": "sliding window is one token longer",
    "Qwen3-Next": "in bfloat16 only",
}
"""The architectures that vLLM cannot be used with here, and why."""
WHOLE = [("DeepSeek-V2", "vllm"), ("SmolLM3", "vllm"), ("Gemma 4", "transformers")]
"""Experts that vLLM packs on a CPU; a class that vLLM patches; one that reads images too, with a soft cap."""


def through_the_pipeline(name: str, backend: str, folder: Path) -> dict[str, Any]:
    finished = warm.run(
        ["-m", "tests.model_pipeline", name, backend, "float32", folder],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    row: dict[str, Any] = json.loads((folder / "row.json").read_text())
    return row


@pytest.mark.parametrize(("name", "backend"), WHOLE)
def test_engine_and_trainer_agree_all_along(name: str, backend: str, tmp_path: Path) -> None:
    check_gaps(through_the_pipeline(name, backend, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
@pytest.mark.parametrize("name", [each.name for each in ARCHITECTURES])
def test_every_architecture_trains_or_is_refused(name: str, backend: str, tmp_path: Path) -> None:
    row = through_the_pipeline(name, backend, tmp_path)
    if backend == "vllm" and name in REFUSED:
        assert REFUSED[name] in row["refused"]
        assert 'engine.backend = "transformers"' in row["refused"]
    else:
        check_gaps(row)


def check_gaps(row: dict[str, Any]) -> None:
    assert "refused" not in row, row
    gaps = [*row["reference"], *row["iterations"], *row["exported"]]
    assert len(row["iterations"]) == 2
    assert max(gaps) < ENGINE_TOLERANCE, row
    assert row["kl"] > 100 * ENGINE_TOLERANCE, "the weights have moved"


def test_classes_that_vllm_rewrites_are_given_back_and_its_own_model_keeps_them() -> None:
    class Compiled:
        pass

    class Model(torch.nn.Linear):
        pass

    classes = PatchedClasses()
    classes.note(Model)
    before = dict(vars(Model))
    ours = Model(2, 2)
    Model.__bases__ = (*Model.__bases__, Compiled)
    Model.__call__ = lambda *_: "compiled"  # type: ignore[method-assign]
    engines = torch.nn.ModuleList([Model(2, 2)])
    classes.restore()
    assert dict(vars(Model)) == before
    assert not issubclass(Model, Compiled)
    classes.adopt(engines)
    assert engines[0](1) == "compiled"
    assert isinstance(engines[0], Compiled)
    assert isinstance(ours(torch.ones(2)), Tensor)
