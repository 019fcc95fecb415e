"""One optimizer step with other micro-batches, slices of logits, blocks of them, and costs of a batch; and its padding.

The defaults of TOKENS_A_BATCH, LOGITS_PER_CHUNK and LOGITS_PER_BLOCK were chosen on a CPU. The completions are made up,
of long-tailed lengths, and the same for every setting; the code is stage 2's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import random_model, settings
from benchmarks.gpu.watch import GIB, TimedStep, TimedUpdate
from benchmarks.peers.vocabulary import completion_lengths
from benchmarks.training import ScriptedEngine, made_up_data, random_completion, training
from common.rollout import Completion, SampleRequest
from stage2_train import batch, logprobs
from stage2_train.memory import read_shape
from stage2_train.train import Trainer

PROMPT = 128
SEQUENCES = 128
BUDGET = 16_384
WARM_UP = 2
"""Steps that are not counted: the first one has AdamW's moments to allocate."""
DEFAULT, AGAIN = "defaults", "defaults, again"
SWEPT: dict[str, tuple[int, ...]] = {
    "tokens_per_micro_batch": (8192, 32_768),
    "TOKENS_A_BATCH": (1, 2048, 8192),
    "LOGITS_PER_CHUNK": (2**24, 2**28, 2**30),
    "LOGITS_PER_BLOCK": (2**20, 2**24, 2**26),
}
LARGEST_GAIN = 0.05
"""By so much may no other setting be faster, or its default should change."""


def measure(findings: Findings, folder: Path) -> None:
    """One trainer, whose settings change between its iterations."""
    tiny = findings.is_tiny
    model = random_model(folder, "1.5b", "bfloat16", is_tiny=tiny)
    lengths = completion_lengths(8 if tiny else SEQUENCES)
    lengths = [min(length, 24) for length in lengths] if tiny else lengths
    prompt, budget = (8, 64) if tiny else (PROMPT, BUDGET)
    config = settings(
        model,
        {
            "model.dtype": "bfloat16",
            "data.max_prompt_tokens": prompt,
            "sampling.max_completion_tokens": max(lengths),
            "train.batch_size": len(lengths),
            "train.mini_batch_size": len(lengths),
            "train.tokens_per_micro_batch": budget,
            "train.gradient_checkpointing": "true",
            "train.learning_rate": 1e-6,
        },
    )
    data = made_up_data(model, config, [prompt] * len(lengths))
    tokens_of = {tuple(each.token_ids): length for each, length in zip(data.prompts, lengths, strict=True)}
    vocabulary = read_shape(model).vocabulary

    def write(request: SampleRequest) -> Completion:
        return random_completion(request, tokens_of[request.prompt_token_ids], vocabulary)

    steps: list[TimedStep] = []
    real = sum(lengths) + prompt * len(lengths)
    values = [(name, value) for name, those in SWEPT.items() for value in those]
    if tiny:
        values = [(name, those[-1]) for name, those in SWEPT.items()]
    order = [(DEFAULT, 0)] * (WARM_UP + 1) + [*values, (AGAIN, 0)]
    seconds: dict[str, float] = {}
    with training(config, data, lambda: ScriptedEngine(write)) as trainer:
        TimedUpdate(trainer, steps.append)
        for number, (name, value) in enumerate(order, start=1):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            with setting(trainer, name, value):
                turn = trainer.iteration(number, len(order))
            if number <= WARM_UP:
                continue
            step = steps[-1]
            both = turn.metrics["time/reference"] + step.seconds
            seconds[f"{name} = {value}" if value else name] = both
            findings.row(
                f"{len(lengths)} sequences, {real:,} tokens without padding",
                setting=name,
                value=value or None,
                reference_s=turn.metrics["time/reference"],
                update_s=step.seconds,
                over_the_default=both / seconds[DEFAULT],
                micro_batches=step.slices,
                padding=step.padded / real - 1,
                peak_GiB=torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None,
            )
    base = max(seconds[DEFAULT], seconds[AGAIN])
    best = min(seconds, key=lambda name: seconds[name])
    findings.remark(f"the fastest: {best}")
    findings.at_most(
        "time that another setting saves", 1 - seconds[best] / base, LARGEST_GAIN, of_the_hardware=True
    )


@contextmanager
def setting(trainer: Trainer[Any], name: str, value: int) -> Iterator[None]:
    """One of SWEPT has another value inside."""
    cut = vars(trainer.parts.collate)["_cut"]
    places: dict[str, tuple[Any, str]] = {
        "tokens_per_micro_batch": (cut, "_budget"),
        "TOKENS_A_BATCH": (batch, name),
        "LOGITS_PER_CHUNK": (logprobs, name),
        "LOGITS_PER_BLOCK": (logprobs, name),
    }
    if name in (DEFAULT, AGAIN):
        yield
        return
    place, attribute = places[name]
    before = getattr(place, attribute)
    setattr(place, attribute, value)
    try:
        yield
    finally:
        setattr(place, attribute, before)
