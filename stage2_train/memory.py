"""How much memory a GPU needs for stage 2: arithmetic on the model's shape and the config, without torch or a GPU.

What DeepSpeed keeps was read off its own tensors (tests/test_forecast.py repeats that); what a layer keeps for its
backward pass off torch's. Two moments can be the worst: the backward pass of the largest micro-batch, and the
optimizer's step, when the activations are gone.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Config
from common.errors import UserError
from common.prompts import longest_allowed_prompt

FLOAT32 = 4
BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements: allocated whole, however small the model is."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: what ZeRO-3 keeps gathered at a time at most."""
STEP_GROUP = 1_000_000_000
"""DeepSpeed's sub_group_size: ZeRO-3 steps through so many parameters at a time."""
LOGITS_PER_CHUNK = 2**26
LOGITS_PER_BLOCK = 2**22
"""As in logprobs.py, which imports torch."""
BLOCK_COPIES = 2
"""Float32 tensors of a block's size that are there at once in its backward pass."""

ASSUMPTIONS = (
    "the largest micro-batch is full, and each of its tokens may be a completion's",
    "layers are those of Qwen2 or Llama, attention keeps no scores, nothing is lost to fragmentation",
    "every rank holds the whole reference model and an engine of its own; vLLM takes its share, used or not",
    "not counted: the CUDA context and NCCL (1 to 2 GiB)",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder-only model of the Qwen, Llama or Mistral kind. `queries` and `keys` are heads times their width."""

    parameters: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    vocabulary: int


def read_shape(folder: Path) -> Shape:
    """The shape of the model in `folder`, from config.json and the headers of its weights. Raises UserError."""
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))

        def whole(name: str, default: int | None = None) -> int:
            value = default if document.get(name) is None else document[name]
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}")
            return value

        heads, hidden = whole("num_attention_heads"), whole("hidden_size")
        width = whole("head_dim", hidden // heads)
        tied = document.get("tie_word_embeddings", False)
        return Shape(
            parameters=_parameters(folder, tied=tied),
            hidden=hidden,
            layers=whole("num_hidden_layers"),
            intermediate=whole("intermediate_size"),
            heads=heads,
            queries=heads * width,
            keys=whole("num_key_value_heads", heads) * width,
            vocabulary=whole("vocab_size"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{folder}: cannot read the model's shape from config.json and *.safetensors "
            f"({type(error).__name__}: {error}); use a whole model of the Qwen, Llama or Mistral kind"
        ) from error


def _parameters(folder: Path, *, tied: bool) -> int:
    tensors: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        tensors |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if tied:
        tensors.pop("lm_head.weight", None)
    if not tensors:
        raise ValueError("no weights")
    return sum(math.prod(shape) for shape in tensors.values())


def memory_per_gpu(shape: Shape, config: Config, *, gpus: int, gpu_bytes: int) -> dict[str, Any]:
    """Bytes on each of `gpus` GPUs of `gpu_bytes`, by component, and whether that fits.

    `held` lasts all training, `backward` comes on top during the backward pass, `step` during the optimizer's step.
    """
    size = _size(config)
    held = {**model_states(shape.parameters, config, gpus), **_others(shape, config, gpu_bytes)}
    backward, step = _backward(shape, config, gpus), _step(shape, config, gpus)
    total = sum(held.values()) + max(sum(backward.values()), sum(step.values()))
    return {
        "gpus": gpus,
        "gpu_bytes": gpu_bytes,
        "parameters": shape.parameters,
        "bytes_a_parameter": size,
        "micro_batch_tokens": micro_batch_tokens(config),
        "held": held,
        "backward": backward,
        "step": step,
        "total": total,
        "fits": total <= gpu_bytes,
        "assumptions": list(ASSUMPTIONS),
    }


def model_states(parameters: int, config: Config, gpus: int) -> dict[str, int]:
    """What DeepSpeed keeps of the policy on each rank, in bytes, at the end of a backward pass.

    ZeRO-1 shares the optimizer's states out among the ranks, ZeRO-2 the gradients too, ZeRO-3 the parameters too. The
    float32 copy of the parameters is there under any ZeRO stage, even where they are float32 themselves.
    """
    size, stage = _size(config), config.train.zero_stage
    has_copy = stage > 0 or config.model.dtype == "bfloat16"
    return {
        "parameters": _share(size * parameters, gpus if stage == 3 else 1),
        "gradients": _share(size * parameters, gpus if stage >= 2 else 1),
        "float32 copy of the parameters": _share(
            FLOAT32 * parameters if has_copy else 0, gpus if stage else 1
        ),
        "AdamW's moments": _share(2 * FLOAT32 * parameters, gpus if stage else 1),
    }


def _others(shape: Shape, config: Config, gpu_bytes: int) -> dict[str, int]:
    weights = _size(config) * shape.parameters
    if config.engine.backend == "vllm":
        engine = round(config.engine.training_gpu_memory_utilization * gpu_bytes)
        return {"reference model": weights, "vLLM's share": engine}
    return {"reference model": weights, "rollout engine's weights": weights}


def _backward(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    tokens, size, stage = micro_batch_tokens(config), _size(config), config.train.zero_stage
    layer = layer_activations(shape, config)
    inputs = size * shape.hidden
    kept = shape.layers * inputs + layer if config.train.gradient_checkpointing else shape.layers * layer
    final_norm = (FLOAT32 + size) * shape.hidden
    logits = min(tokens * shape.vocabulary, LOGITS_PER_CHUNK)
    components = {
        "activations": tokens * (kept + final_norm),
        "logits": size * logits + BLOCK_COPIES * FLOAT32 * min(logits, LOGITS_PER_BLOCK),
        "output layer's gradient": (size * shape.vocabulary + FLOAT32 * tokens) * shape.hidden,
    }
    if stage:
        components["DeepSpeed's bucket"] = size * BUCKET
    elif gpus > 1:
        components["DeepSpeed's bucket"] = size * min(BUCKET, shape.parameters)
    if stage == 3 and gpus > 1:
        components["gathered parameters"] = size * min(LIVE_PARAMETERS, shape.parameters)
    return components


def _step(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    """The step's gradients in float32, and the temporary of torch's AdamW that is as large as its parameters."""
    stage = config.train.zero_stage
    stepped = -(-shape.parameters // gpus) if stage else shape.parameters
    if stage == 3:
        stepped = min(stepped, STEP_GROUP)
    copies = stage > 0 or config.model.dtype == "bfloat16"
    return {
        "gradients in float32": FLOAT32 * stepped if copies else 0,
        "AdamW's temporary": FLOAT32 * stepped,
    }


def layer_activations(shape: Shape, config: Config) -> int:
    """Bytes a token that one layer keeps for its backward pass, with an attention that keeps no scores.

    Four tensors of the feed-forward's width; queries and the attention's output; keys and values; and each of the two
    norms its input in float32, the normalised value and its output.
    """
    size = _size(config)
    wide = 4 * shape.intermediate + 2 * shape.queries + 2 * shape.keys
    norms = 2 * (FLOAT32 + 2 * size) * shape.hidden
    statistics = FLOAT32 * (shape.heads + 2)
    return size * wide + norms + statistics


def micro_batch_tokens(config: Config) -> int:
    """The most tokens in a forward pass: the budget, or one sequence that is longer than that."""
    longest = longest_allowed_prompt(config) + config.sampling.max_completion_tokens
    return max(config.train.tokens_per_micro_batch, longest)


def _size(config: Config) -> int:
    return FLOAT32 if config.model.dtype == "float32" else 2


def _share(total: int, ranks: int) -> int:
    return -(-total // ranks)
