"""One optimizer step on models of real shapes, with random weights: time, and memory compared with the forecast.

    .venv/bin/python -m benchmarks.scale                                  a GPU: 1.5b, 3b, 7b; a CPU: small shapes
    .venv/bin/python -m benchmarks.scale --shape 1.5b --set train.offload_optimizer=true

Sequences have a prompt of 256 tokens and a completion of 1,024, as in the paper's longest. Each shape and way runs in
a process of its own, which takes one step to warm up and measures the next: reference log-probs, forward and backward
passes, optimizer. Completions are made up, and no engine is loaded. "ours" is stage 2's own code; "naive" is the same
except that it takes the policy's full logits under autograd and keeps activations.

The share is relative to one large matrix product in the same dtype, measured in the same process: the operations that
the step requires (flops.py; recomputation does not count) over the operations that the product would have done in the
same time. Memory on a GPU is torch's peak allocation; on a CPU it is the peak of resident memory above the process's
memory before it loaded a model. "computed" is the result of stage2_train/memory.py.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import logprobs
from benchmarks.flops import BACKWARD, forward_flops, matrix_rate
from benchmarks.processes import alone, assignments, forget_peak, peak_mib, resident_mib
from benchmarks.tables import markdown
from benchmarks.training import (
    DEMO,
    ScriptedEngine,
    made_up_data,
    random_completion,
    save_random_model,
    training,
)
from stage2_train import memory
from stage2_train.config import Config, load_config
from stage2_train.memory import Shape, layer_activations, memory_per_gpu, micro_batch_tokens, read_shape

PROMPT, COMPLETION = 256, 1024
WAYS = ("naive", "ours")
GIB = 2**30
NAIVE_LOGITS = 5
"""Float32 tensors of all logits that `benchmarks.logprobs.naive` holds at the peak of its backward pass."""


def qwen(
    hidden: int, layers: int, intermediate: int, heads: int, key_heads: int, vocabulary: int, *, tied: bool
) -> dict[str, Any]:
    """A Qwen2 model's config.json."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
    }


QWEN2_5 = {
    "1.5b": qwen(1536, 28, 8960, 12, 2, 151_936, tied=True),
    "3b": qwen(2048, 36, 11008, 16, 2, 151_936, tied=True),
    "7b": qwen(3584, 28, 18944, 28, 4, 152_064, tied=False),
}
SMALL = {
    "tiny": qwen(256, 4, 1024, 4, 2, 32_000, tied=True),
    "small": qwen(512, 8, 2048, 8, 2, 32_000, tied=False),
    "vocabulary": qwen(896, 2, 4864, 14, 2, 151_936, tied=True),
}
"""The last has the widths of Qwen2.5-0.5B and 2 of its 24 layers."""
SHAPES = QWEN2_5 | SMALL


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One step of one shape. Seconds are None if it did not fit."""

    shape: Shape
    reference_seconds: float | None
    update_seconds: float | None
    operations_a_second: float
    """The rate of one large matrix product."""
    peak_bytes: int

    @property
    def seconds(self) -> float | None:
        """Of both together."""
        if self.reference_seconds is None or self.update_seconds is None:
            return None
        return self.reference_seconds + self.update_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The settings common to all shapes and ways."""

    dtype: str
    sequences: int
    tokens_per_micro_batch: int
    prompt: int = PROMPT
    completion: int = COMPLETION
    overrides: Sequence[str] = ()

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """The tokens of each sequence, and how many of them are a completion's."""
        return [self.prompt + self.completion] * self.sequences, [self.completion] * self.sequences

    def config(self, folder: Path, way: str = "ours") -> Config:
        """The config of a step in which every sequence is trained on."""
        values = {
            "model.path": folder,
            "model.dtype": self.dtype,
            "data.max_prompt_tokens": self.prompt,
            "sampling.max_completion_tokens": self.completion,
            "engine.backend": "transformers",
            "train.batch_size": self.sequences,
            "train.mini_batch_size": self.sequences,
            "train.tokens_per_micro_batch": self.tokens_per_micro_batch,
            "train.gradient_checkpointing": str(way == "ours").lower(),
        }
        return load_config(DEMO, [*assignments(values), *self.overrides])


class FullLogits(nn.Module):
    """In place of a VocabularyHead: log-probs from full logits under autograd."""

    def __init__(self, lm_head: nn.Linear, temperature: float) -> None:
        super().__init__()
        self.lm_head = lm_head
        self._temperature = temperature

    def forward(self, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        """Like VocabularyHead.forward."""
        return logprobs.naive(self.lm_head, hidden_KH, target_K, self._temperature)


def measure(way: str, config: Config, folder: Path) -> Result:
    """The second of two optimizer steps."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    rate = matrix_rate(getattr(torch, config.model.dtype), device)
    shape = read_shape(folder)
    data = made_up_data(folder, config, [config.data.max_prompt_tokens] * config.train.batch_size)
    length = config.sampling.max_completion_tokens
    engine = ScriptedEngine(lambda request: random_completion(request, length, shape.vocabulary))
    before = resident_mib()
    reference_seconds = update_seconds = None
    try:
        with training(config, data, lambda: engine) as trainer:
            if way == "naive":
                module = trainer.parts.policy.learner.module
                module.head = FullLogits(module.head.lm_head, module.head.temperature)
            trainer.iteration(1, last=2)
            torch.cuda.reset_peak_memory_stats() if on_gpu else forget_peak()
            metrics = trainer.iteration(2, last=2).metrics
            reference_seconds, update_seconds = metrics["time/reference"], metrics["time/update"]
    except torch.OutOfMemoryError:
        pass
    peak = torch.cuda.max_memory_allocated() if on_gpu else round((peak_mib() - before) * 2**20)
    return Result(
        shape=shape,
        reference_seconds=reference_seconds,
        update_seconds=update_seconds,
        operations_a_second=rate,
        peak_bytes=peak,
    )


def computed(shape: Shape, config: Config, way: str, *, resident: bool) -> int:
    """Bytes at the peak on one GPU, without a rollout engine.

    `resident` leaves out the pages of DeepSpeed's bucket that are never touched: on a CPU they take no memory.
    """
    figures = memory_per_gpu(shape, config, gpus=1, gpu_bytes=0)
    held: dict[str, int] = figures["held"]
    moments: dict[str, dict[str, int]] = {
        name: dict(figures[name]) for name in ("reference", "backward", "step")
    }
    backward = moments["backward"]
    if resident and "DeepSpeed's bucket" in backward:
        backward["DeepSpeed's bucket"] = figures["bytes_a_parameter"] * min(
            memory.BUCKET, figures["trained_parameters"]
        )
    if way == "naive":
        tokens = micro_batch_tokens(config)
        completion = config.sampling.max_completion_tokens
        completion_tokens = tokens * completion // (config.data.max_prompt_tokens + completion)
        backward["activations"] = tokens * shape.layers * layer_activations(shape, config)
        backward["logits"] = NAIVE_LOGITS * memory.FLOAT32 * completion_tokens * shape.vocabulary
    at_the_peak = max(sum(moment.values()) for moment in moments.values())
    return sum(held.values()) - held["rollout engine's weights"] + at_the_peak


def table(results: dict[tuple[str, str], Result], workload: Workload) -> str:
    """One row per shape and way."""
    config = workload.config(Path("model"))
    rows = []
    for (name, way), result in results.items():
        shape = result.shape
        bytes_computed = computed(shape, config, way, resident=not torch.cuda.is_available())
        found = ["does not fit", "", "", f"{bytes_computed / GIB:.2f}", ""]
        if result.seconds is not None:
            operations = (2 + BACKWARD) * forward_flops(shape, *workload.lengths)
            share = operations / result.seconds / result.operations_a_second
            found[:3] = [f"{result.seconds:.2f}", f"{share:.0%}", f"{result.peak_bytes / GIB:.2f}"]
            found[4] = f"{result.peak_bytes / bytes_computed:.2f}"
        rows.append([name, f"{shape.parameters / 1e6:,.0f} M", way, *found])
    on_gpu = torch.cuda.is_available()
    on = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    rate = statistics.median(result.operations_a_second for result in results.values())
    header = ["shape", "parameters", "way", "step, s", "share of the product's rate", "peak, GiB"]
    return (
        f"{on}, {config.model.dtype}, {workload.sequences} sequences of {workload.prompt} + {workload.completion} "
        f"tokens, micro-batches of {micro_batch_tokens(config):,}, ZeRO-{config.train.zero_stage}; one large matrix "
        f"product: {rate / 1e12:.3f} TFLOP/s\n\n"
        + markdown([*header, "computed, GiB", "measured / computed"], rows)
    )


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16" if on_gpu else "float32"
    )
    parser.add_argument("--sequences", type=int, default=64 if on_gpu else 2)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=16_384 if on_gpu else 2_560)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args()
    workload = Workload(
        dtype=chosen.dtype,
        sequences=chosen.sequences,
        tokens_per_micro_batch=chosen.tokens_per_micro_batch,
        overrides=chosen.set,
    )
    results = {}
    for name in chosen.shape or (QWEN2_5 if on_gpu else SMALL):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            alone(save_random_model, folder, {**SHAPES[name], "dtype": chosen.dtype})
            for way in WAYS:
                config = workload.config(folder, way)
                results[name, way] = alone(measure, way, config, folder)
                print(f"{name}, {way}: {results[name, way]}", file=sys.stderr)
    print(table(results, workload))
    if not on_gpu:
        print("\nNo GPU was found: figures of a GPU are missing.")


if __name__ == "__main__":
    main()
