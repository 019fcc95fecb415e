"""Steps that hold less, as a program: `python -m tests.lean_steps JOB.json`, alone or under torchrun.

LoRA, an offloaded optimizer and bfloat16 under each ZeRO stage. The job file holds the config and the file to write to.
In processes of their own, since DeepSpeed is initialised once a process.
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stage2_train.batch import TokenBatch
from stage2_train.checkpoint import POLICY, load, write
from stage2_train.config import Config, LoraConfig
from stage2_train.policy import Policy
from stage2_train.ranks import Ranks, join_ranks
from stage2_train.resume import MAY_DIFFER
from stage2_train.scorers import PartitionedModel, SeparateModel, build_reference
from tests.train_steps import as_with_a_large_vocabulary

Weights = dict[str, torch.Tensor]
LORA = LoraConfig(rank=4, alpha=8)
SLICES = 3
"""Micro-batches a step: two processes have two of them and one."""
STAGES = (0, 1, 2, 3)
STAGES_ON_TWO = (2, 3)
SMALL_UPDATES = [(1, False), (2, False), (3, False), (1, True), (3, True)]
"""ZeRO's stage, and whether the optimizer is offloaded."""
SMALL_STEP, SMALL_STEPS = 2e-5, 12
"""The learning rate, and so about the change of a weight in a step, and the number of steps."""


def tokens(number: int) -> TokenBatch:
    rng = torch.Generator().manual_seed(number)
    return TokenBatch(
        rows=(0, 1),
        input_ids_BT=torch.randint(1, 100, (2, 9), generator=rng),
        is_completion_BT=torch.arange(9).expand(2, 9) > 4,
    )


def own_slices(step: int, ranks: Ranks) -> list[TokenBatch]:
    return [tokens(SLICES * step + number) for number in range(ranks.rank, SLICES, ranks.world_size)]


class Run:
    """A policy and its reference, trained on (ln π/π_ref + 1)² of made-up completions."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.folder = Path(config.model.path)
        self.ranks = ranks
        self.policy = Policy(self.folder, config, ranks)
        self.reference = build_reference(self.folder, config, self.policy, ranks)

    def steps(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            slices = own_slices(number, self.ranks)
            reference = self.reference.score(slices)
            rounds = self.ranks.largest(len(slices))
            for turn in range(rounds):
                batch = slices[turn % len(slices)]
                logprobs_K = self.policy.logprobs(batch).logprobs_K
                loss = (logprobs_K - reference[turn % len(slices)] + 1).square().sum()
                self.policy.learner.backward(loss * float(turn < len(slices)), last=turn == rounds - 1)
            self.policy.learner.step()

    def logprobs(self) -> torch.Tensor:
        """Log-probs of the current policy, for tokens that all ranks share."""
        batch = tokens(1000)
        with torch.no_grad():
            return self.policy.logprobs(batch).logprobs_K


def weights_of(policy: Policy) -> Weights:
    return {name: weight.clone() for name, weight in policy.named_weights()}


def changed(config: Config, *, dtype: str = "float32", **train: Any) -> Config:
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": dtype}),
            "train": config.train.model_copy(update=train),
        }
    )


def with_adapter(config: Config, stage: int, ranks: Ranks, output: str) -> dict[str, Any]:
    """Four steps, the last one twice: straight on, and after the restart of a checkpoint."""
    config = changed(config, zero_stage=stage, lora=LORA)
    run = Run(config, ranks)
    at_start = weights_of(run.policy)
    run.steps(1, 3)
    reference = run.reference.score(own_slices(9, ranks))
    separate = SeparateModel(run.folder, config, ranks.device).score(own_slices(9, ranks))
    checkpoints = Path(f"{output}-lora-{stage}", "checkpoints")
    at_checkpoint = weights_of(run.policy)
    write(checkpoints, state_of(config, 3, ranks), {POLICY: run.policy.learner}, ranks, keep=1)
    run.steps(4, 4)
    again = Run(config, ranks)
    load(checkpoints / "iteration-000003", {POLICY: again.policy.learner}, ranks)
    again.steps(4, 4)
    run.policy.export(Path(f"{output}-model-{stage}"))
    return {
        "at start": at_start,
        "at checkpoint": at_checkpoint,
        "weights": weights_of(run.policy),
        "resumed": weights_of(again.policy),
        "logprobs": run.logprobs(),
        "reference": (reference, separate),
        "optimized": sum(parameter.numel() for parameter in optimized(run.policy)),
        "kept": sorted(kept_names(checkpoints / "iteration-000003" / POLICY)),
    }


def state_of(config: Config, iteration: int, ranks: Ranks) -> dict[str, Any]:
    """A checkpoint's state."""
    settings = config.model_dump(mode="json", exclude=MAY_DIFFER)
    return {
        "iteration": iteration,
        "origin": {"config": settings},
        "world_size": ranks.world_size,
        "zero_stage": config.train.zero_stage,
    }


def whole(config: Config, stage: int, ranks: Ranks, output: str) -> Weights:
    """The weights after two steps, of which a checkpoint is written; in bfloat16 where ZeRO allows it."""
    config = changed(config, dtype="bfloat16" if stage else "float32", zero_stage=stage)
    run = Run(config, ranks)
    run.steps(1, 2)
    checkpoints = Path(f"{output}-whole-{stage}", "checkpoints")
    write(checkpoints, state_of(config, 2, ranks), {POLICY: run.policy.learner}, ranks, keep=1)
    return weights_of(run.policy)


def references(config: Config, ranks: Ranks) -> list[dict[str, Any]]:
    """The log-probs of a partitioned reference, visited twice, and of a whole one; the share that this rank holds."""
    found = []
    for dtype, offload in product(("float32", "bfloat16"), (False, True)):
        ours = changed(config, dtype=dtype, zero_stage=3, offload_reference=offload)
        folder = Path(ours.model.path)
        separate = SeparateModel(folder, changed(config, dtype=dtype), ranks.device)
        with as_with_a_large_vocabulary():
            reference = PartitionedModel(folder, ours, ranks)
            scores, expected = (
                [scorer.score(own_slices(visit, ranks)) for visit in range(2)]
                for scorer in (reference, separate)
            )
        parameters = list(reference._network._engine.module.parameters())
        found.append(
            {
                "scores": scores,
                "expected": expected,
                "gathered": sum(parameter.numel() for parameter in parameters),
                "held": sum(parameter.ds_tensor.numel() for parameter in parameters),
                "all": sum(parameter.ds_numel for parameter in parameters),
            }
        )
    return found


def optimized(policy: Policy) -> Iterator[torch.Tensor]:
    return (parameter for parameter in policy.learner.module.parameters() if parameter.requires_grad)


def kept_names(folder: Path) -> set[str]:
    """The parameters in a checkpoint."""
    files = folder.rglob("*model_states.pt")
    return {name for file in files for name in torch.load(file, weights_only=False)["module"]}


def with_dropout(config: Config, ranks: Ranks) -> dict[str, Any]:
    config = changed(config, zero_stage=2, lora=LORA.model_copy(update={"dropout": 0.5}))
    run = Run(config, ranks)
    run.steps(1, 1)
    return {
        "reference": run.reference.score([tokens(0)]),
        "separate": SeparateModel(run.folder, config, ranks.device).score([tokens(0)]),
        "policy": (run.logprobs(), run.logprobs()),
    }


def offloaded(config: Config, stage: int, ranks: Ranks, output: str) -> dict[str, Weights]:
    """Weights after three steps, with the optimizer's states on the device, on the host, or moved before the last."""
    found = {}
    configs = {
        name: changed(config, zero_stage=stage, offload_optimizer=name == "offloaded")
        for name in ("resident", "offloaded")
    }
    for name, ours in configs.items():
        run = Run(ours, ranks)
        run.steps(1, 2)
        checkpoints = Path(f"{output}-{name}-{stage}", "checkpoints")
        write(checkpoints, state_of(ours, 2, ranks), {POLICY: run.policy.learner}, ranks, keep=1)
        run.steps(3, 3)
        found[name] = weights_of(run.policy)
        (other,) = (theirs for theirs in configs if theirs != name)
        again = Run(configs[other], ranks)
        load(checkpoints / "iteration-000002", {POLICY: again.policy.learner}, ranks)
        again.steps(3, 3)
        found[f"{name}, then {other}"] = weights_of(again.policy)
    return found


def small_updates(config: Config, stage: int, offload: bool, ranks: Ranks) -> list[Weights]:
    """Weights at the start, after one step and after SMALL_STEPS, each of them too small for bfloat16."""
    small = {"learning_rate": SMALL_STEP, "weight_decay": 0.0, "gradient_checkpointing": False}
    config = changed(config, dtype="bfloat16", zero_stage=stage, offload_optimizer=offload, **small)
    policy = Policy(Path(config.model.path), config, ranks)
    found = [weights_of(policy)]
    for number in range(SMALL_STEPS):
        policy.learner.backward(policy.logprobs(tokens(0)).logprobs_K.sum(), last=True)
        policy.learner.step()
        if number in (0, SMALL_STEPS - 1):
            found.append(weights_of(policy))
    return found


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    ranks = join_ranks(seed=0)
    config = Config.model_validate(job["config"])
    stages = STAGES if ranks.world_size == 1 else STAGES_ON_TWO
    found: dict[str, Any] = {
        "LoRA": {stage: with_adapter(config, stage, ranks, job["output"]) for stage in stages},
        "whole": {stage: whole(config, stage, ranks, job["output"]) for stage in stages},
    }
    if ranks.world_size > 1:
        found["references"] = references(config, ranks)
    else:
        found["dropout"] = with_dropout(config, ranks)
        found["offloaded"] = {stage: offloaded(config, stage, ranks, job["output"]) for stage in (1, 2, 3)}
        found["small updates"] = {case: small_updates(config, *case, ranks) for case in SMALL_UPDATES}
    torch.save(found, f"{job['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
