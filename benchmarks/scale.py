"""One optimizer step on models of real shapes, with random weights: time, memory, and what other methods would hold.

    .venv/bin/python -m benchmarks.scale                                  a GPU: 1.5b, 3b, 7b; a CPU: small shapes
    .venv/bin/python -m benchmarks.scale --shape 1.5b --set train.offload_optimizer=true

Sequences have a prompt of 256 tokens and a completion of 1,024, as in the paper's longest. Each shape and way runs in
a process of its own, which takes one step to warm up and measures the next: reference log-probs, forward and backward
passes, optimizer. No engine is loaded. "ours" is stage 2's own code; "naive" is the same but for full logits under
autograd and activations that are kept.

The share is of the rate of one large matrix product in the same dtype, measured in the same process: the operations
that such a step has to do (flops.py; computing anything twice does not count) over the operations that the product
would have done in the same time. Memory on a GPU is what torch allocated at the peak; on a CPU the peak of resident
memory above what the process held before it loaded a model. "computed" is the arithmetic of stage2_train/memory.py.

Then, computed and not measured: the Qwen2.5 shapes on four GPUs, A*-PO beside GRPO and PPO, as the paper's Table 1
compares them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import cli  # noqa: F401  the thread settings of the command line
from benchmarks import logprobs as other_ways
from benchmarks.flops import BACKWARD, forward_flops, matrix_rate, parameter_count
from benchmarks.peers.processes import resident_mib
from common.runs import REPOSITORY
from stage2_train import memory
from stage2_train.batch import MicroBatch, TokenSequence, token_batches
from stage2_train.config import Config, load_config
from stage2_train.logprobs import VocabularyHead, token_logprobs
from stage2_train.memory import Shape, layer_activations, memory_per_gpu, micro_batch_tokens, model_states
from stage2_train.objectives import build_objective
from stage2_train.policy import Policy
from stage2_train.ranks import join_ranks
from stage2_train.scorers import build_reference

PROMPT, COMPLETION = 256, 1024
WAYS = ("naive", "ours")
GIB = 2**30
PAPER_GPUS = 4
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

PAPER = {
    "1.5b": {"A*-PO": (6.92, 41.59), "GRPO": (15.01, 42.19), "PPO": (10.84, 42.64)},
    "3b": {"A*-PO": (8.78, 49.28), "GRPO": (18.26, 49.75), "PPO": (13.59, 54.95)},
    "7b": {"A*-PO": (11.01, 76.57), "GRPO": (20.15, 77.82), "PPO": (20.53, 92.81)},
}
"""Hours and per cent of a GPU's memory in the paper's Table 1 (MATH, 4 H100, VERL)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method does for each prompt beside the policy's own forward and backward pass, in models and passes."""

    completions: int
    frozen_passes: int
    """Forward passes whose log-probs are constants: the reference's, and the old policy's."""
    has_critic: bool

    @property
    def passes(self) -> int:
        """Forward passes' worth of operations a prompt, of a model of the policy's size."""
        trained = 1 + BACKWARD
        critic = 1 + trained if self.has_critic else 0
        return self.completions * (trained + self.frozen_passes + critic)


METHODS = {
    "A*-PO": Method(completions=1, frozen_passes=1, has_critic=False),
    "GRPO": Method(completions=2, frozen_passes=2, has_critic=False),
    "PPO": Method(completions=1, frozen_passes=2, has_critic=True),
}


@dataclass(frozen=True)
class Result:
    """One step of one shape. Seconds are None where it did not fit."""

    seconds: float | None
    operations_a_second: float
    """Of one large matrix product."""
    peak_bytes: int


def shape_of(document: dict[str, Any]) -> Shape:
    """The shape of a Qwen2 config."""
    heads = document["num_attention_heads"]
    width = document["hidden_size"] // heads
    partial = Shape(
        parameters=0,
        hidden=document["hidden_size"],
        layers=document["num_hidden_layers"],
        intermediate=document["intermediate_size"],
        heads=heads,
        queries=heads * width,
        keys=document["num_key_value_heads"] * width,
        vocabulary=document["vocab_size"],
    )
    return Shape(
        **{**asdict(partial), "parameters": parameter_count(partial, tied=document["tie_word_embeddings"])}
    )


def configuration(folder: Path, arguments: argparse.Namespace) -> Config:
    """The config of a step in which every sequence is trained on."""
    values = {
        "model.path": folder,
        "model.dtype": arguments.dtype,
        "sampling.max_completion_tokens": COMPLETION,
        "engine.backend": "transformers",
        "train.batch_size": arguments.sequences,
        "train.mini_batch_size": arguments.sequences,
        "train.tokens_per_micro_batch": arguments.tokens_per_micro_batch,
        "train.gradient_checkpointing": "true",
    }
    overrides = [*(f"{key}={value}" for key, value in values.items()), *arguments.set]
    return load_config(REPOSITORY / "configs" / "demo.toml", overrides)


def measure(document: dict[str, Any], way: str, config: Config, folder: Path) -> Result:
    """The second of two optimizer steps, in this process."""
    use_random_weights(folder, document)
    if way == "naive":
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"gradient_checkpointing": False})}
        )
        use_full_logits(config.sampling.temperature)
    ranks = join_ranks(0)
    rate = matrix_rate(getattr(torch, config.model.dtype), ranks.device)
    before = round(resident_mib() * 2**20)
    seconds = None
    try:
        policy = Policy(folder, config, ranks)
        reference = build_reference(folder, config, policy, ranks)
        sequences = random_sequences(config.train.batch_size, document["vocab_size"])
        batches = [
            batch.to(ranks.device)
            for batch in token_batches(sequences, config.train.tokens_per_micro_batch, pad_token_id=0)
        ]
        objective = build_objective(config.train.objective)

        def step() -> float:
            wait(ranks.device)
            began = time.perf_counter()
            for number, (batch, reference_logprobs_K) in enumerate(
                zip(batches, reference.logprobs(batches), strict=True)
            ):
                micro_batch = MicroBatch(
                    sequence_of_K=batch.sequence_of_K,
                    reference_logprobs_K=reference_logprobs_K,
                    advantages_B=torch.ones(len(batch.places), device=ranks.device),
                    step_sequences=len(sequences),
                )
                logprobs_K = token_logprobs(policy.engine, batch).logprobs_K
                loss_share, _ = objective.loss(logprobs_K, micro_batch)
                policy.backward(loss_share, last=number == len(batches) - 1)
            policy.step()
            wait(ranks.device)
            return time.perf_counter() - began

        step()
        forget_peak(ranks.device)
        seconds = step()
    except torch.OutOfMemoryError:
        pass
    return Result(
        seconds=seconds,
        operations_a_second=rate,
        peak_bytes=peak_bytes(ranks.device) - (0 if ranks.device.type == "cuda" else before),
    )


def use_random_weights(folder: Path, document: dict[str, Any]) -> None:
    """Have models of this process made from the config alone: files of 15 GB would have to be written and read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")

    def from_pretrained(source: Path, *, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
        return model.to("cpu")  # where files are read to

    vars_of: Any = AutoModelForCausalLM
    vars_of.from_pretrained = from_pretrained


def use_full_logits(temperature: float) -> None:
    """Have log-probs of this process taken from full logits under autograd."""
    other_ways.TEMPERATURE = temperature
    head: Any = VocabularyHead
    head.forward = lambda self, hidden_KH, target_K: other_ways.naive(self.lm_head, hidden_KH, target_K)


def random_sequences(count: int, vocabulary: int) -> list[TokenSequence]:
    """Prompts and completions of random tokens."""
    torch.manual_seed(1)
    rows = torch.randint(vocabulary, (count, PROMPT + COMPLETION)).tolist()
    return [
        TokenSequence(
            place=place,
            prompt_token_ids=tuple(row[:PROMPT]),
            completion_token_ids=tuple(row[PROMPT:]),
        )
        for place, row in enumerate(rows)
    ]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        allocated: int = torch.cuda.max_memory_allocated()
        return allocated
    return round(other_ways.peak_mib() * 2**20)


def computed(shape: Shape, config: Config, way: str, gpus: int, *, resident: bool) -> int:
    """Bytes on each GPU at the peak, without a rollout engine.

    `resident` leaves out the pages of DeepSpeed's bucket that are never touched: on a CPU they take no memory.
    """
    figures = memory_per_gpu(shape, config, gpus=gpus, gpu_bytes=0)
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
        completion_tokens = tokens * COMPLETION // (PROMPT + COMPLETION)
        backward["activations"] = tokens * shape.layers * layer_activations(shape, config)
        backward["logits"] = NAIVE_LOGITS * memory.FLOAT32 * completion_tokens * shape.vocabulary
    at_the_peak = max(sum(moment.values()) for moment in moments.values())
    return sum(held.values()) - held["rollout engine's weights"] + at_the_peak


def measured_table(results: dict[tuple[str, str], Result], arguments: argparse.Namespace) -> str:
    """A row for each shape and way."""
    lines = [
        "| shape | parameters | way | step, s | share of the product's rate | peak, GiB | computed, GiB | "
        "measured / computed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    config = configuration(Path("model"), arguments)
    count = config.train.batch_size
    for (name, way), result in results.items():
        shape = shape_of(SHAPES[name])
        forward = forward_flops(shape, [PROMPT + COMPLETION] * count, [COMPLETION] * count)
        bytes_computed = computed(shape, config, way, gpus=1, resident=not torch.cuda.is_available())
        if result.seconds is None:
            found = "does not fit | | "
        else:
            share = METHODS["A*-PO"].passes * forward / result.seconds / result.operations_a_second
            found = f"{result.seconds:.2f} | {share:.0%} | {result.peak_bytes / GIB:.2f}"
        ratio = "" if result.seconds is None else f"{result.peak_bytes / bytes_computed:.2f}"
        lines.append(
            f"| {name} | {shape.parameters / 1e6:,.0f} M | {way} | {found} | {bytes_computed / GIB:.2f} | {ratio} |"
        )
    rates = [result.operations_a_second for result in results.values()]
    on = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return "\n".join(
        [
            f"{on}, {config.model.dtype}, {count} sequences of {PROMPT} + {COMPLETION} tokens, micro-batches of "
            f"{micro_batch_tokens(config):,}, ZeRO-{config.train.zero_stage}; one large matrix product: "
            f"{min(rates) / 1e12:.3f} to {max(rates) / 1e12:.3f} TFLOP/s",
            "",
            *lines,
        ]
    )


def computed_table(arguments: argparse.Namespace) -> str:
    """The Qwen2.5 shapes in bfloat16 on four GPUs, by method, beside the paper's ratios."""
    options = argparse.Namespace(**{**vars(arguments), "dtype": "bfloat16", "tokens_per_micro_batch": 16_384})
    config = configuration(Path("model"), options)
    lines = [
        f"Computed, not measured: {PAPER_GPUS} GPUs, bfloat16, ZeRO-{config.train.zero_stage}, micro-batches of "
        "16,384 tokens, gradient checkpointing, no rollout engine. Operations are those of reference, old policy, "
        "critic and training, with generation left out. The paper's hours and memory, on 4 H100 under VERL, include "
        "generation.",
        "",
        "| shape | method | completions a prompt | operations / A*-PO's | paper's hours / A*-PO's | GiB a GPU | "
        "/ A*-PO's | paper's memory / A*-PO's | naive log-probs, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in QWEN2_5:
        shape = shape_of(SHAPES[name])
        critic = sum(model_states(shape, config, PAPER_GPUS).values())
        base_hours, base_memory = PAPER[name]["A*-PO"]
        ours, naive = (computed(shape, config, way, PAPER_GPUS, resident=False) for way in ("ours", "naive"))
        for method_name, method in METHODS.items():
            hours, share = PAPER[name][method_name]
            extra = critic if method.has_critic else 0
            lines.append(
                f"| {name} | {method_name} | {method.completions} | "
                f"{method.passes / METHODS['A*-PO'].passes:.2f} | {hours / base_hours:.2f} | "
                f"{(ours + extra) / GIB:.1f} | {(ours + extra) / ours:.2f} | {share / base_memory:.2f} | "
                f"{(naive + extra) / GIB:.1f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
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
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    names = chosen.shape or list(QWEN2_5 if on_gpu else SMALL)
    if chosen.way:
        with tempfile.TemporaryDirectory() as folder:
            config = configuration(Path(folder), chosen)
            print(json.dumps(asdict(measure(SHAPES[names[-1]], chosen.way, config, Path(folder)))))
        return 0
    results = {}
    for name in names:
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.scale", *arguments, "--shape", name, "--way", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name, way] = Result(**json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}, {way}: {results[name, way]}", file=sys.stderr)
    print(measured_table(results, chosen))
    if not on_gpu:
        print("\nNo GPU was found: figures of a GPU are missing.")
    print()
    print(computed_table(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
