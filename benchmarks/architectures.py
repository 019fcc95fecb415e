"""Tiny random models of the architectures that vLLM and transformers both have, with their families' conventions.

One list, for `python -m benchmarks.models` and the tests: two layers, weights from a seed, the demo's tokenizer with
the family's conventions (a BOS or none, a pad token of its own, the EOS for it or none, a chat template, a padded
vocabulary).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
END = "<|endoftext|>"
INITIALIZER_RANGE = 0.08
"""Large enough that a token's log-prob depends on its context, at a width of 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventions:
    """The conventions of a family's tokenizer."""

    bos: bool = False
    pad: str | None = "<|pad|>"
    """None is a tokenizer without a pad token."""
    chat: bool = False
    turn_end: bool = False
    """A second token ends a completion too; generation_config.json lists both."""
    generation_config: bool = True
    """Without one, the EOS is config.json's."""
    padded_to: int = 1
    """The embedding's rows are a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model type, the numbers of its config.json that differ from `DENSE`, and the family's conventions."""

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Conventions = Conventions()

    def __str__(self) -> str:
        return self.name


DENSE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MLA: dict[str, Any] = {
    "head_dim": 64,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
}
LLAMA = Conventions(bos=True, pad=None, chat=True, turn_end=True)
QWEN = Conventions(chat=True, turn_end=True, padded_to=64)
GEMMA = Conventions(bos=True, chat=True, turn_end=True)
PLAIN = Conventions(pad=END)
BARE = Conventions(pad=END, generation_config=False)

GEMMA_TEXT: dict[str, Any] = {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 32}
GEMMA4_TEXT: dict[str, Any] = {
    "tie_word_embeddings": True,
    "sliding_window": 16,
    "head_dim": 32,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 576,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 0.5,
}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(name="Llama", model_type="llama", tokenizer=LLAMA),
    Architecture(name="Qwen2", model_type="qwen2", tokenizer=QWEN),
    Architecture(name="Qwen3", model_type="qwen3", config={"tie_word_embeddings": True}, tokenizer=QWEN),
    Architecture(
        name="Qwen3-MoE", model_type="qwen3_moe", config={**EXPERTS, "norm_topk_prob": True}, tokenizer=QWEN
    ),
    Architecture(
        name="Mixtral",
        model_type="mixtral",
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
        tokenizer=Conventions(bos=True, pad=None, chat=True),
    ),
    Architecture(
        name="Mistral",
        model_type="mistral",
        config={"sliding_window": 16},
        tokenizer=Conventions(bos=True, pad=None),
    ),
    Architecture(name="Ministral", model_type="ministral3", tokenizer=Conventions(bos=True, chat=True)),
    Architecture(
        name="Gemma 2",
        model_type="gemma2",
        config={**GEMMA_TEXT, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0},
        tokenizer=GEMMA,
    ),
    Architecture(name="Gemma 3 (text)", model_type="gemma3_text", config=GEMMA_TEXT, tokenizer=GEMMA),
    Architecture(
        name="Gemma 3",
        model_type="gemma3",
        config={"text_config": {**DENSE, **GEMMA_TEXT}, "vision_config": VISION, "mm_tokens_per_image": 4},
        tokenizer=GEMMA,
    ),
    Architecture(name="Gemma 4 (text)", model_type="gemma4_text", config=GEMMA4_TEXT, tokenizer=GEMMA),
    Architecture(
        name="Gemma 4",
        model_type="gemma4",
        config={"text_config": {**DENSE, **GEMMA4_TEXT}, "vision_config": VISION, "audio_config": None},
        tokenizer=GEMMA,
    ),
    Architecture(name="Phi-3", model_type="phi3", config={"pad_token_id": 0}, tokenizer=PLAIN),
    Architecture(name="Phi", model_type="phi", config={"partial_rotary_factor": 0.5}, tokenizer=BARE),
    Architecture(name="OLMo-2", model_type="olmo2", tokenizer=PLAIN),
    Architecture(name="OLMo-3", model_type="olmo3", config={"sliding_window": 16}, tokenizer=PLAIN),
    Architecture(name="SmolLM3", model_type="smollm3", config={"pad_token_id": 0}, tokenizer=QWEN),
    Architecture(
        name="Granite",
        model_type="granite",
        config={"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
        tokenizer=PLAIN,
    ),
    Architecture(
        name="Granite-MoE",
        model_type="granitemoe",
        config={"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
        tokenizer=PLAIN,
    ),
    Architecture(
        name="Falcon-H1",
        model_type="falcon_h1",
        config={
            "lm_head_multiplier": 0.25,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
        tokenizer=PLAIN,
    ),
    Architecture(
        name="GLM-4", model_type="glm4", config={"pad_token_id": 0}, tokenizer=Conventions(chat=True)
    ),
    Architecture(
        name="DeepSeek-V2",
        model_type="deepseek_v2",
        config={**MLA, "topk_method": "greedy"},
        tokenizer=Conventions(bos=True, pad=END, chat=True),
    ),
    Architecture(
        name="DeepSeek-V3",
        model_type="deepseek_v3",
        config={**MLA, "q_lora_rank": 32, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        tokenizer=Conventions(bos=True, pad=END, chat=True),
    ),
    Architecture(
        name="gpt-oss",
        model_type="gpt_oss",
        config={
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        tokenizer=Conventions(chat=True, turn_end=True),
    ),
    Architecture(
        name="Cohere",
        model_type="cohere",
        config={"logit_scale": 0.25, "tie_word_embeddings": True},
        tokenizer=Conventions(bos=True),
    ),
    Architecture(
        name="Cohere 2",
        model_type="cohere2",
        config={"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 16},
        tokenizer=Conventions(bos=True),
    ),
    Architecture(name="GPT-NeoX", model_type="gpt_neox", config={"rotary_pct": 0.5}, tokenizer=BARE),
    Architecture(name="GPT-2", model_type="gpt2", config={"tie_word_embeddings": True}, tokenizer=BARE),
    Architecture(
        name="Starcoder2",
        model_type="starcoder2",
        config={"sliding_window": 16, "tie_word_embeddings": True},
        tokenizer=BARE,
    ),
    Architecture(
        name="ERNIE 4.5",
        model_type="ernie4_5",
        config={"tie_word_embeddings": True},
        tokenizer=Conventions(bos=True),
    ),
    Architecture(name="Seed-OSS", model_type="seed_oss", tokenizer=Conventions(bos=True, chat=True)),
    Architecture(name="Arcee", model_type="arcee", tokenizer=LLAMA),
    Architecture(name="Nemotron", model_type="nemotron", tokenizer=Conventions(bos=True, pad=None)),
    Architecture(name="EXAONE 4", model_type="exaone4", config={"sliding_window": 16}, tokenizer=QWEN),
    Architecture(
        name="OLMoE", model_type="olmoe", config={**EXPERTS, "intermediate_size": 64}, tokenizer=PLAIN
    ),
    Architecture(
        name="Qwen3-Next",
        model_type="qwen3_next",
        config={
            **EXPERTS,
            "shared_expert_intermediate_size": 64,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
        tokenizer=QWEN,
    ),
    Architecture(
        name="LFM2",
        model_type="lfm2",
        config={
            "layer_types": ["conv", "full_attention"],
            "tie_word_embeddings": True,
            "conv_dim": 64,
            "block_dim": 64,
        },
        tokenizer=Conventions(bos=True, chat=True),
    ),
)


def named(name: str) -> Architecture:
    """The architecture of this name in the list."""
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def write_model(architecture: Architecture, folder: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """A model's folder, as it would come from the hub; returns it."""
    import torch
    from transformers import AutoConfig

    from common.model.pretrained import model_class

    conventions = architecture.tokenizer
    ids = write_tokenizer(conventions, folder)
    rows = -(-ids["size"] // conventions.padded_to) * conventions.padded_to
    ends = [ids["end"], ids["turn_end"]] if conventions.turn_end else ids["end"]
    special = {
        "vocab_size": rows,
        "bos_token_id": ids["bos"] if conventions.bos else None,
        "eos_token_id": ends,
        "pad_token_id": ids["pad"],
        "dtype": dtype,
    }
    blank = AutoConfig.for_model(architecture.model_type)
    known = {*blank.to_dict(), *blank.attribute_map}
    numbers = {**{key: value for key, value in DENSE.items() if key in known}, **architecture.config}
    if "text_config" in numbers:
        numbers = {**architecture.config, **special, "text_config": {**numbers["text_config"], **special}}
        numbers["tie_word_embeddings"] = numbers["text_config"]["tie_word_embeddings"]
    else:
        own = {key: value for key, value in architecture.config.items() if key in special}
        numbers = {**numbers, **special, **own}
    config = AutoConfig.for_model(architecture.model_type, **numbers)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = model_class(config, folder)._from_config(config, dtype=getattr(torch, dtype))
        for weight in [*model.parameters(), *buffers_of_weights(model)]:
            # Biases and norms start at 0 and 1, which would hide errors; so do biases of routers.
            weight.add_(0.02 * torch.randn_like(weight))
    model.generation_config.pad_token_id = ids["pad"]
    model.save_pretrained(folder)
    if not conventions.generation_config:
        (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def buffers_of_weights(model: Any) -> list[Any]:
    """The buffers that a checkpoint holds, such as those that choose among experts."""
    stored = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in stored and buffer.is_floating_point()]


def write_tokenizer(conventions: Conventions, folder: Path) -> dict[str, Any]:
    """Save the demo's tokenizer with a family's conventions; returns its size and special ids."""
    from tokenizers import processors

    from common.demo.base_model import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<|turn_end|>"]})
    if conventions.bos:
        tokenizer.bos_token = "<s>"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A",
            pair="<s> $A $B",
            special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))],
        )
    tokenizer.pad_token = conventions.pad
    if conventions.chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    if conventions.turn_end:
        tokenizer.eos_token = "<|turn_end|>"
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    document = json.loads(settings.read_text())
    # A model type's own class would rebuild the vocabulary by its own rules.
    settings.write_text(json.dumps(document | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("bos", "<s>"), ("end", END))}
    return {
        **ids,
        "turn_end": tokenizer.convert_tokens_to_ids("<|turn_end|>"),
        "pad": tokenizer.pad_token_id,
        "size": len(tokenizer),
    }
