"""A whole iteration of training with a real engine: seconds by phase, share of the card's rate, memory, agreement.

The model has random weights and the prompts are made up; everything else is stage 2's own: vLLM draws, sleeps, and
takes the new weights. The first optimizer step of an iteration warms up, the last one is compared with the rate of a
large matrix product. Memory is torch's peak from the scoring to the last step, without what it counts for the engine,
whose weights and cache the device has back then.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import BACKWARD, forward_flops, matrix_rate
from benchmarks.gpu.comparison import SUMMARY
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import engine_values, random_model, settings
from benchmarks.gpu.watch import (
    GIB,
    TimedEngine,
    TimedStep,
    TimedUpdate,
    TrainingPeak,
    device_bytes,
    free_bytes,
)
from benchmarks.training import made_up_data, training
from common.engines import LowRank, build_engine
from common.parity import BOUNDS, Gap, engine_logprobs
from stage2_train.checkpoint import POLICY
from stage2_train.collate import Cutter
from stage2_train.config import Config
from stage2_train.memory import memory_per_gpu, read_shape
from stage2_train.parity import parity_draw, scored
from stage2_train.scorers import PolicyScorer
from stage2_train.train import Trainer

PROMPT = 256
SHARE = {"1.5b": 0.25, "3b": 0.2, "7b": 0.4}
"""Of the GPU, for the engine: what the trainer leaves of 78 GiB."""
LEAST_RATE = 0.5
"""The aim for the update, as a share of the rate of a large matrix product."""
FORECAST_ERROR = 0.05
RATE = "share of the large product's rate in the update"


def measure(
    findings: Findings,
    folder: Path,
    *,
    shape: str,
    objective: str = "astar_po",
    prompts: int = 256,
    longest: int = 1024,
    warm_up: int = 0,
    lora: bool = False,
) -> None:
    """`warm_up` iterations that are not counted, and one that is."""
    config = _config(findings, folder, shape, objective, prompts, longest, lora)
    model = Path(config.model.path)
    if findings.is_judged and not _fits(findings, config, model):
        return
    rate = matrix_rate(getattr(torch, config.model.dtype), torch.device(findings.device))
    findings.row("The machine", large_matrix_product_TFLOP_s=rate / 1e12, device_GiB=device_bytes() / GIB)
    data = made_up_data(model, config, [_prompt(findings)] * config.train.batch_size)
    adapter = None if (given := config.train.lora) is None else LowRank(rank=given.rank, alpha=given.alpha)
    engines: list[TimedEngine] = []

    def engine() -> TimedEngine:
        engines.append(
            TimedEngine(
                partial(build_engine, config, model, data.renderer, beside_trainer=True, adapter=adapter)
            )
        )
        findings.row("Start", phase="engine", s=engines[-1].seconds["build"])
        return engines[-1]

    steps: list[TimedStep] = []

    def seen(step: TimedStep) -> None:
        steps.append(step)
        findings.row("Optimizer steps", s=step.seconds, micro_batches=step.slices, tokens_padded=step.padded)

    with training(config, data, engine) as trainer:
        (timed,) = engines
        TimedUpdate(trainer, seen)
        peak = TrainingPeak(trainer, timed.allocated)
        last = warm_up + 1
        for number in range(1, last + 1):
            turn = trainer.iteration(number, last)
        metrics = turn.metrics
        tokens = sum(len(rollout.completion.token_ids) for rollout in turn.rollouts)
        columns = ("reference", "old", "values")
        scoring = {name: metrics.get(f"time/{name}", 0.0) for name in columns}
        phases = {
            "rollouts": metrics["time/rollout"],
            "of it vLLM": timed.seconds["generate"],
            **{f"scoring: {name}": seconds for name, seconds in scoring.items() if seconds},
            "update": metrics["time/update"],
            "weights to vLLM": metrics["time/weight_sync"],
        }
        for phase, seconds in phases.items():
            findings.row("Phases", phase=phase, s=seconds, share=seconds / metrics["time/iteration"])
        operations = (1 + (1 if lora else BACKWARD)) * forward_flops(
            read_shape(model), *steps[-1].lengths(turn.rollouts)
        )
        share = operations / steps[-1].seconds / rate
        training_seconds = sum(scoring.values()) + metrics["time/update"]
        findings.row(
            SUMMARY,
            iteration=metrics["time/iteration"],
            rollout=metrics["time/rollout"],
            training=training_seconds,
            completions=len(turn.rollouts),
            completion_tokens=tokens,
            tokens_a_second_of_vLLM=tokens / timed.seconds["generate"],
            update_share_of_the_rate=share,
            peak_GiB=peak.bytes / GIB,
            vLLM_gave_back_GiB=timed.freed / GIB,
            device_free_GiB=free_bytes() / GIB,
        )
        if not trainer.parts.learners.keys() - {POLICY}:  # a critic's operations are not counted
            findings.at_least(RATE, share, LEAST_RATE, of_the_hardware=True)
        _compare_memory(findings, config, model, peak.bytes)
        _compare_logprobs(findings, trainer, config, timed, last)


def _prompt(findings: Findings) -> int:
    return 8 if findings.is_tiny else PROMPT


def _config(
    findings: Findings,
    folder: Path,
    shape: str,
    objective: str,
    prompts: int,
    longest: int,
    lora: bool,
) -> Config:
    tiny = findings.is_tiny
    prompts, longest = (4, 6) if tiny else (prompts, longest)
    model = random_model(folder, shape, "bfloat16", is_tiny=tiny)
    values: dict[str, object] = {
        "model.dtype": "bfloat16",
        "data.max_prompt_tokens": _prompt(findings),
        "sampling.max_completion_tokens": longest,
        **engine_values(is_tiny=tiny, share=SHARE[shape]),
        "train.objective.name": objective,
        "train.batch_size": prompts,
        "train.mini_batch_size": prompts // 2,
        "train.tokens_per_micro_batch": 64 if tiny else 16_384,
        "train.gradient_checkpointing": "true",
        "train.learning_rate": 1e-6,
        **({"train.lora.rank": 16} if lora else {}),
    }
    return settings(model, values)


def _fits(findings: Findings, config: Config, model: Path) -> bool:
    """Whether the forecast lets it run; if not, says why."""
    memory = memory_per_gpu(read_shape(model), config, gpus=1, gpu_bytes=device_bytes())
    if not memory["fits"]:
        findings.remark(
            f"not run: the forecast needs {memory['total'] / GIB:.1f} GiB, the card has {device_bytes() / GIB:.1f}"
        )
    return bool(memory["fits"])


def _compare_memory(findings: Findings, config: Config, model: Path, peak: int) -> None:
    memory = memory_per_gpu(read_shape(model), config, gpus=1, gpu_bytes=device_bytes())
    held = sum(memory["held"].values())
    moments: dict[str, Any] = {name: sum(memory[name].values()) for name in ("reference", "backward", "step")}
    computed = held + max(moments.values())
    findings.row(
        "The trainer's memory, the engine asleep",
        peak_GiB=peak / GIB,
        forecast_GiB=computed / GIB,
        peak_over_forecast=peak / computed,
    )
    findings.at_most(
        "peak over forecast, distance from 1",
        abs(peak / computed - 1),
        FORECAST_ERROR,
        of_the_hardware=True,
    )


def _compare_logprobs(
    findings: Findings, trainer: Trainer[Any], config: Config, timed: TimedEngine, version: int
) -> None:
    """Engine and trainer on a few completions after the update; this also loads the new weights."""
    rollouts = trainer.source.now(parity_draw(trainer.data, config, trainer.ranks), version)
    findings.row("Start", phase="new weights, engine asleep before", s=timed.seconds["load"])
    scorer = PolicyScorer(trainer.parts.policy, trainer.ranks)
    ours = scored(rollouts, scorer, Cutter(config.train, trainer.data.renderer, trainer.ranks))
    gap = Gap.between([engine_logprobs(rollout.completion) for rollout in rollouts], ours)
    bound = BOUNDS[config.model.dtype]
    findings.at_most("engine and trainer after the update, nats on average", gap.mean, bound.mean)
    findings.at_most("the same, nats at most", gap.largest, bound.largest)
