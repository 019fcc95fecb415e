"""Completions that a thread draws ahead, in a CUDA stream of its own, against those of the main thread.

Stage 2's own pipeline with `train.staleness` 1. Weights do not change, so the samples of an iteration should be the
same whoever draws them, also while the trainer's stream is busy. Prompts are shorter than a block of the key-value
cache, so that nothing of an earlier draw is reused.
"""

from functools import partial
from pathlib import Path

import torch

from benchmarks.flops import settled
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import engine_values, settings
from benchmarks.gpu.reload import spread_model
from benchmarks.training import made_up_data, training
from common.engines import build_engine
from common.rollout import Rollout
from stage2_train.metrics import Metrics
from stage2_train.sources.batches import flat
from stage2_train.sources.pipeline import training_draw

PROMPT, COMPLETION = 12, 64
ITERATIONS = 4
LEAST_SAME = 0.9
"""Of the completions. Batches are alike, so that equal kernels give equal bits."""
BUSY_SIZE, BUSY_PRODUCTS = 8192, 500
"""Large products in the main thread's stream, a second or so of work."""


def measure(findings: Findings, folder: Path) -> None:
    """Each iteration's completions twice."""
    tiny = findings.is_tiny
    model = spread_model(folder, is_tiny=tiny, tied=False, odd=True)
    config = settings(
        model,
        {
            "model.dtype": "bfloat16",
            "data.max_prompt_tokens": PROMPT,
            "sampling.max_completion_tokens": 8 if tiny else COMPLETION,
            **engine_values(is_tiny=tiny, share=0.3),
            "engine.sleep_while_training": "false",
            "train.staleness": 1,
            "train.batch_size": 4 if tiny else 64,
            "train.mini_batch_size": 4 if tiny else 64,
        },
    )
    data = made_up_data(model, config, [PROMPT] * config.train.batch_size)
    build = partial(build_engine, config, model, data.renderer, beside_trainer=True)
    numbers = range(1, ITERATIONS + 1)
    with training(config, data, build) as trainer:
        source = trainer.source
        expected = {
            number: tokens(source.now(training_draw(config, data, trainer.ranks, number), 0))
            for number in numbers
        }
        for number in numbers:
            metrics: Metrics = {}
            began = settled()
            found = tokens(flat(source.groups(number, ITERATIONS, metrics)))
            seconds = settled() - began
            busy = keep_busy()  # the thread has begun to draw the next iteration's
            same = sum(a == b for a, b in zip(found, expected[number], strict=True)) / len(found)
            findings.row(
                "Drawn ahead",
                iteration=number,
                waited_s=seconds,
                main_stream_busy_s=busy,
                completions=len(found),
                the_same=same,
            )
            findings.at_least(f"iteration {number}: share of completions that are the same", same, LEAST_SAME)


def tokens(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    """Of each completion."""
    return [tuple(each.completion.token_ids) for each in rollouts]


def keep_busy() -> float:
    """Work for the main thread's stream, without a GPU none; returns its seconds."""
    if not torch.cuda.is_available():
        return 0.0
    began = settled()
    matrix = torch.randn(BUSY_SIZE, BUSY_SIZE, device="cuda", dtype=torch.bfloat16)
    for _ in range(BUSY_PRODUCTS):
        torch.mm(matrix, matrix)
    return settled() - began
