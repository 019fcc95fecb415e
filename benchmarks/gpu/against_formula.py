"""Training under ZeRO 0 to 3, and of an adapter, against Algorithm 1's formula in plain torch, on this device.

Each trainer takes the same six steps on the same made-up completions, whose rewards differ. In float32 they have to
agree with the formula; in bfloat16 their steps are shown beside those of the formula in float32. So is the peak of
memory beside the forecast: DeepSpeed's bucket is most of it for so small a model.
"""

import gc
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.formula import ByFormula, WatchedUpdate, by_formula
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import settings
from benchmarks.gpu.reload import spread_model
from benchmarks.gpu.watch import GIB
from benchmarks.training import ScriptedEngine, made_up_data, random_completion, training
from common.rollout import Completion, SampleRequest
from stage2_train.config import Config
from stage2_train.memory import memory_per_gpu, read_shape
from stage2_train.network import Network

ITERATIONS = 3
PROMPT, LONGEST = 24, 48
FIGURES_ERROR = 1e-4
"""Relative, for losses and gradient norms in float32."""
MOVEMENT_ERROR = 1e-2
"""Of the movement of all weights together, in float32; AdamW magnifies the rounding of the smallest gradients."""
LOSS_ERROR = 0.05
"""Relative, for the losses in bfloat16."""
ADAPTER = {"train.lora.rank": 8}
CASES: dict[str, dict[str, object]] = {
    **{f"float32, ZeRO-{stage}": {"model.dtype": "float32", "train.zero_stage": stage} for stage in range(4)},
    "float32, adapter": {"model.dtype": "float32", **ADAPTER},
    **{
        f"bfloat16, ZeRO-{stage}": {"model.dtype": "bfloat16", "train.zero_stage": stage}
        for stage in range(1, 4)
    },
    "bfloat16, adapter": {"model.dtype": "bfloat16", **ADAPTER},
}

Steps = list[dict[str, Any]]


def measure(findings: Findings, folder: Path) -> None:
    """All cases, one after the other."""
    model = spread_model(folder, is_tiny=findings.is_tiny, tied=True, odd=True, dtype="float32")
    references: dict[bool, ByFormula] = {}
    start = dict(_network(_config(model, {}), model).named_weights())
    start = {name: weight.clone() for name, weight in start.items()}
    for case, values in CASES.items():
        config = _config(model, values)
        before = _forgotten_peak()
        steps, weights = _taken(config, model)
        peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
        forecast = memory_per_gpu(read_shape(model), config, gpus=1, gpu_bytes=0)["total"]
        is_adapter = config.train.lora is not None
        if is_adapter not in references:  # the first case of its kind is in float32
            references[is_adapter] = _reference(config, model, steps)
        reference = references[is_adapter]
        losses, norms = _losses(steps), [step["norm"] for step in steps]
        loss_error = _largest_relative(losses, reference.losses)
        norm_error = _largest_relative(norms, reference.norms)
        apart = {
            name: float((weights[name].float() - weight).norm()) for name, weight in reference.weights.items()
        }
        moves = {name: float((weight - start[name]).norm()) for name, weight in reference.weights.items()}
        moved = math.hypot(*apart.values()) / math.hypot(*moves.values())
        worst = max(apart, key=lambda name: apart[name] / moves[name] if moves[name] else 0.0)
        findings.row(
            "Six steps beside the formula in float32",
            case=case,
            first_loss=losses[0],
            last_loss=losses[-1],
            loss_off_by=loss_error,
            gradient_norm_off_by=norm_error,
            movement_off_by=moved,
            worst_matrix=worst,
            its_movement_off_by=apart[worst] / moves[worst],
            peak_GiB=peak and peak / GIB,
            forecast_GiB=forecast / GIB,
        )
        if config.model.dtype == "float32":
            findings.at_most(f"{case}: losses, relative", loss_error, FIGURES_ERROR)
            findings.at_most(f"{case}: gradient norms, relative", norm_error, FIGURES_ERROR)
            findings.at_most(f"{case}: weights, of their movement", moved, MOVEMENT_ERROR)
        else:
            findings.at_most(f"{case}: losses, relative", loss_error, LOSS_ERROR)


def _forgotten_peak() -> int:
    """What torch holds on the GPU, which is its peak from now on."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _config(model: Path, values: dict[str, object]) -> Config:
    return settings(
        model,
        {
            "model.dtype": "float32",
            "data.max_prompt_tokens": PROMPT,
            "sampling.max_completion_tokens": LONGEST,
            "train.batch_size": 16,
            "train.mini_batch_size": 8,
            "train.tokens_per_micro_batch": 160,
            "train.learning_rate": 1e-3,
            "train.warmup_steps": 0,
            "train.objective.beta2": 0.05,
            "train.max_grad_norm": 10.0,
            **values,
        },
    )


def _taken(config: Config, model: Path) -> tuple[Steps, dict[str, Tensor]]:
    """The steps of one trainer, and its weights after the last, by their names in a checkpoint."""
    data = made_up_data(model, config, [PROMPT] * config.train.batch_size)
    vocabulary = read_shape(model).vocabulary

    def write(request: SampleRequest) -> Completion:
        return random_completion(request, 1 + request.seed % LONGEST, vocabulary)

    with training(config, data, lambda: ScriptedEngine(write)) as trainer:
        watched = WatchedUpdate(trainer)
        turns = [trainer.iteration(number, ITERATIONS) for number in range(1, ITERATIONS + 1)]
        per_turn = len(watched.steps) // ITERATIONS
        steps = [
            step.of(trainer, turns[number // per_turn].rollouts) for number, step in enumerate(watched.steps)
        ]
        return steps, {name: weight.clone() for name, weight in trainer.parts.policy.named_weights()}


def _losses(steps: Steps) -> list[float]:
    found = []
    for step in steps:
        each = [sequence["loss"] for sequence in step["sequences"].values()]
        found.append(sum(each) / len(each))
    return found


def _network(config: Config, model: Path) -> Network:
    torch.manual_seed(
        config.seed
    )  # as `join_ranks` does before a trainer is made: an adapter begins at random
    network = Network(model, config)
    network.module.to("cuda" if torch.cuda.is_available() else "cpu")
    return network


def _reference(config: Config, model: Path, steps: Steps) -> ByFormula:
    """The formula's steps on the same completions; its weights by their names in a checkpoint."""
    policy, initial = (_network(config, model) for _ in range(2))
    found = by_formula(
        policy.module.model,
        initial.module.model.requires_grad_(False),
        [step["sequences"] for step in steps],
        config.train,
    )
    weights = {name: weight.detach().clone() for name, weight in policy.named_weights()}
    return ByFormula(found.losses, found.norms, found.log_ratios, found.entropies, weights)


def _largest_relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))
