"""How much memory a GPU needs for stage 2: arithmetic on the model's shape and the config, without torch or a GPU.

The sizes were read from DeepSpeed's tensors, and for a layer's activations from torch's (tests/test_forecast.py repeats
that). Memory peaks either in the backward pass of the largest micro-batch or in the optimizer's step, when the
activations are freed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data.prompts import longest_allowed_completion, longest_allowed_prompt
from common.errors import UserError
from common.model.files import model_numbers
from common.model.weights import read_weights
from stage2_train.config import Config, LoraConfig
from stage2_train.objectives.protocol import TrainsCritic

FLOAT32 = 4
BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements: always allocated in full, even for a small model."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: the most parameters that ZeRO-3 keeps gathered at a time."""
STEP_GROUP = 1_000_000_000
"""DeepSpeed's sub_group_size: the number of parameters that a ZeRO-3 step updates at a time."""
LOGITS_PER_CHUNK = 2**26
LOGITS_PER_BLOCK = 2**22
"""The same as in logprobs.py, which cannot be imported here because it imports torch."""
BLOCK_COPIES = 2
"""Float32 tensors of a block's size that exist at once in its backward pass."""

ASSUMPTIONS = (
    "the largest micro-batch is full, and each of its tokens may be a completion's",
    "layers are those of Qwen2 or Llama, attention keeps no scores, nothing is lost to fragmentation",
    "every rank holds the whole reference model, or under ZeRO-3 its share, unless train.lora has none, and an engine "
    "of its own; vLLM takes its share, used or not",
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
    is_tied: bool = False
    """Whether the output layer is the embedding."""


def read_shape(folder: Path) -> Shape:
    """The shape of the model in `folder`, from config.json and the headers of its weights. Raises UserError."""
    model = model_numbers(folder)
    heads, hidden = model.need("num_attention_heads"), model.need("hidden_size")
    width = model.get("head_dim") or hidden // heads
    return Shape(
        parameters=read_weights(folder).count(tied=model.is_tied),
        hidden=hidden,
        layers=model.need("num_hidden_layers"),
        intermediate=model.get("intermediate_size") or 4 * hidden,  # as in GPT-2, which need not say it
        heads=heads,
        queries=heads * width,
        keys=(model.get("num_key_value_heads") or heads) * width,
        vocabulary=model.need("vocab_size"),
        is_tied=model.is_tied,
    )


def memory_per_gpu(shape: Shape, config: Config, *, gpus: int, gpu_bytes: int) -> dict[str, Any]:
    """Bytes on each of `gpus` GPUs of `gpu_bytes`, by component, and whether that fits.

    `held` lasts all training. On top of it come `rollout` while an otherwise sleeping engine is awake, `reference`
    while an offloaded reference model computes, `backward` during the backward pass, and `step` during the optimizer's
    step. `host` is the offloaded memory that a process keeps in main memory.
    """
    engine = _engine(shape, config, gpu_bytes)
    sleeps = config.engine.sleep_while_training
    is_offloaded = config.train.offload_reference
    has_reference = "reference" in config.train.columns and config.train.lora is None
    reference = _reference_share(shape, config, gpus)
    held = {
        **model_states(shape, config, gpus),
        **_critic(shape, config, gpus),
        **({"reference model": reference} if has_reference and not is_offloaded else {}),
        **({} if sleeps else engine),
    }
    on_top = {
        "rollout": engine if sleeps else {},
        "reference": _visited_reference(shape, config, gpus) if has_reference and is_offloaded else {},
        "backward": _backward(shape, config, gpus),
        "step": {} if config.train.offload_optimizer else _step(shape, config, gpus),
    }
    total = sum(held.values()) + max(sum(moment.values()) for moment in on_top.values())
    return {
        "gpus": gpus,
        "gpu_bytes": gpu_bytes,
        "parameters": shape.parameters,
        "trained_parameters": trained_parameters(shape, config),
        "bytes_a_parameter": _size(config),
        "micro_batch_tokens": micro_batch_tokens(config),
        "held": held,
        **on_top,
        "host": host_memory(shape, config, gpus),
        "total": total,
        "fits": total <= gpu_bytes,
        "assumptions": list(ASSUMPTIONS),
    }


def trained_parameters(shape: Shape, config: Config) -> int:
    """The trained parameters: the model's, or an adapter's two matrices per layer (inputs to rank, rank to outputs)."""
    lora = config.train.lora
    return (
        shape.parameters if lora is None else shape.layers * lora.rank * sum(map(sum, _adapted(shape, lora)))
    )


def _adapted(shape: Shape, lora: LoraConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear layer in a decoder layer that has an adapter. Raises UserError."""
    linear = {
        "q_proj": (shape.hidden, shape.queries),
        "k_proj": (shape.hidden, shape.keys),
        "v_proj": (shape.hidden, shape.keys),
        "o_proj": (shape.queries, shape.hidden),
        "gate_proj": (shape.hidden, shape.intermediate),
        "up_proj": (shape.hidden, shape.intermediate),
        "down_proj": (shape.intermediate, shape.hidden),
    }
    names = linear.keys() if lora.target_modules == "all-linear" else set(lora.target_modules)
    if unknown := sorted(names - linear.keys()):
        raise UserError(
            f"train.lora.target_modules: a model of the Qwen, Llama or Mistral kind has no linear layers called "
            f"{', '.join(unknown)} before its output layer; choose from {', '.join(linear)}"
        )
    return [linear[name] for name in sorted(names)]


def model_states(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    """DeepSpeed's memory for the policy on each GPU, in bytes, after the backward pass of a micro-batch.

    ZeRO-1 partitions the optimizer's states over the ranks, ZeRO-2 the gradients too, ZeRO-3 the parameters too. The
    float32 copy of the parameters exists under any ZeRO stage, even if the parameters are float32 themselves.
    """
    size, train = _size(config), config.train
    trained = trained_parameters(shape, config)
    parameters = _share(_weights(shape, config), gpus if train.zero_stage == 3 else 1)
    adapter = _share(size * trained if train.lora else 0, gpus if train.zero_stage == 3 else 1)
    if train.offload_optimizer:
        # ZeRO-1 keeps the gradients of a step's micro-batches, the others send each one's to the host.
        gradients = size * trained if train.zero_stage == 1 else 0
        on_the_way = 0 if train.zero_stage == 3 else size * _largest(shape, config)
        states = {"gradients": gradients, "a gradient on its way to the host": on_the_way}
    else:
        states = {
            "gradients": _share(size * trained, gpus if train.zero_stage >= 2 else 1),
            **_optimizer_states(trained, config, gpus),
        }
    return {"parameters": parameters, **({"adapter": adapter} if train.lora else {}), **states}


def _critic(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    """Model states and bucket of the critic, if the objective trains one: the policy without its output layer."""
    if not isinstance(config.train.objective, TrainsCritic):
        return {}
    head = 0 if shape.is_tied else shape.vocabulary * shape.hidden
    critic = replace(shape, parameters=shape.parameters - head + shape.hidden + 1)
    states = sum(model_states(critic, config, gpus).values())
    bucket = _size(config) * BUCKET if config.train.zero_stage else 0
    return {"critic": states, **({"DeepSpeed's bucket for the critic": bucket} if bucket else {})}


def _optimizer_states(trained: int, config: Config, gpus: int) -> dict[str, int]:
    stage = config.train.zero_stage
    return {
        "float32 copy of the parameters": _share(FLOAT32 * trained, gpus) if stage else 0,
        "AdamW's moments": _share(2 * FLOAT32 * trained, gpus if stage else 1),
    }


def host_memory(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    """The offloaded bytes that a process keeps in the host's memory, including the step's temporaries."""
    held = (
        {"reference model": _reference_share(shape, config, gpus)} if config.train.offload_reference else {}
    )
    if not config.train.offload_optimizer:
        return held
    size, stage = _size(config), config.train.zero_stage
    trained = trained_parameters(shape, config)
    held |= _optimizer_states(trained, config, gpus)
    held |= _step(shape, config, gpus) | {"gradients in float32": _share(FLOAT32 * trained, gpus)}
    if stage >= 2:
        held["gradients of earlier micro-batches"] = _share(size * trained, gpus)
    if stage <= 2:
        held["parameters on their way back"] = _share(size * trained, gpus) + size * _largest(shape, config)
    return held


def _reference_share(shape: Shape, config: Config, gpus: int) -> int:
    return _share(_weights(shape, config), gpus if config.train.zero_stage == 3 else 1)


def _visited_reference(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    """An offloaded reference model on the GPU while it computes: whole, or under ZeRO-3 a few layers at a time."""
    if config.train.zero_stage == 3 and gpus > 1:
        return {"gathered parameters": _gathered(shape, config)}
    return {"reference model": _weights(shape, config)}


def _gathered(shape: Shape, config: Config) -> int:
    return _size(config) * min(LIVE_PARAMETERS, shape.parameters)


def _weights(shape: Shape, config: Config) -> int:
    return _size(config) * shape.parameters


def _largest(shape: Shape, config: Config) -> int:
    """The elements of the largest trained matrix."""
    if config.train.lora is None:
        return max(shape.vocabulary, shape.intermediate) * shape.hidden
    return config.train.lora.rank * max(map(max, _adapted(shape, config.train.lora)))


def _engine(shape: Shape, config: Config, gpu_bytes: int) -> dict[str, int]:
    if config.engine.backend == "vllm":
        return {"vLLM's share": round(config.engine.training_gpu_memory_utilization * gpu_bytes)}
    return {"rollout engine's weights": _weights(shape, config)}


def _backward(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    tokens, size, stage = micro_batch_tokens(config), _size(config), config.train.zero_stage
    layer = layer_activations(shape, config)
    inputs = size * shape.hidden
    kept = shape.layers * inputs + layer if config.train.gradient_checkpointing else shape.layers * layer
    final_norm = (FLOAT32 + size) * shape.hidden
    logits = min(tokens * shape.vocabulary, LOGITS_PER_CHUNK)
    hidden_gradient = FLOAT32 * tokens * shape.hidden
    components = {
        "activations": tokens * (kept + final_norm),
        "logits": size * logits + BLOCK_COPIES * FLOAT32 * min(logits, LOGITS_PER_BLOCK),
        "output layer's gradient": hidden_gradient
        + (0 if config.train.lora else size * shape.vocabulary * shape.hidden),
    }
    if stage:
        components["DeepSpeed's bucket"] = size * BUCKET
    elif gpus > 1:
        components["DeepSpeed's bucket"] = size * min(BUCKET, trained_parameters(shape, config))
    if stage == 3 and gpus > 1:
        components["gathered parameters"] = _gathered(shape, config)
    return components


def _step(shape: Shape, config: Config, gpus: int) -> dict[str, int]:
    """The step's gradients in float32; torch's fused AdamW needs nothing else."""
    stage, trained = config.train.zero_stage, trained_parameters(shape, config)
    stepped = _share(trained, gpus) if stage else trained
    if stage == 3:
        stepped = min(stepped, STEP_GROUP)
    return {"gradients in float32": FLOAT32 * stepped if stage else 0}


def layer_activations(shape: Shape, config: Config) -> int:
    """Bytes per token that one layer keeps for its backward pass, with an attention that keeps no scores.

    These are: four tensors of the feed-forward's width; queries and the attention's output; keys and values; for each
    of the two norms its input in float32, its output and, to train its weight, the normalised value. An adapter keeps
    the low-rank tensor between its two matrices and, with dropout, the masked inputs and the mask.
    """
    size, lora = _size(config), config.train.lora
    wide = 4 * shape.intermediate + 2 * shape.queries + 2 * shape.keys
    norms = 2 * (FLOAT32 + (1 if lora else 2) * size) * shape.hidden
    statistics = FLOAT32 * (shape.heads + 2)
    kept = size * wide + norms + statistics
    if lora is None:
        return kept
    adapted = _adapted(shape, lora)
    thinned = (size + 1) * sum(inputs for inputs, _ in adapted) if lora.dropout else 0
    return kept + size * lora.rank * len(adapted) + thinned


def micro_batch_tokens(config: Config) -> int:
    """The most tokens in a forward pass: the budget, or one sequence or group that exceeds it."""
    objective = config.train.objective
    longest = longest_allowed_prompt(config) + longest_allowed_completion(config)
    together = objective.group_size if objective.unit == "group" else 1
    return max(config.train.tokens_per_micro_batch, together * longest)


def _size(config: Config) -> int:
    return FLOAT32 if config.model.dtype == "float32" else 2


def _share(total: int, ranks: int) -> int:
    return -(-total // ranks)
