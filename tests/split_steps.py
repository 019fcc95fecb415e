"""Training that another split continues, on one rank: tests/training_jobs.py runs it for tests/test_other_split.py.

The order holds `cases` (name to a case) and the `output` to write to. A case has a `config` and its table `vstar`, and
the folder of its `checkpoints`; it either makes them or, where it `continues`, starts from them.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from common.grading import GraderPool
from stage2_train import learner
from stage2_train.checkpoint import checkpoints
from stage2_train.config import Config
from stage2_train.data import prepare
from stage2_train.ranks import Ranks, join_ranks
from tests.objective_steps import ITERATIONS, RESUMED_AFTER, Run, Weights

MOMENTS = ("exp_avg", "exp_avg_sq")
PARAMETERS_IN_A_GROUP = 10_000
configure = learner._deepspeed_config


def state(run: Run, zero_stage: int) -> Weights:
    """The float32 weights and AdamW's moments of everything that is trained, whole, by part and name."""
    found: Weights = {}
    for part, trained in run.trainer.parts.learners.items():
        optimizer = trained._engine.optimizer
        for name, parameter in trained.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if zero_stage:
                values = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                values["weight"] = safe_get_full_fp32_param(parameter)
            else:
                values = {key: optimizer.state[parameter][key] for key in MOMENTS}
                values["weight"] = parameter.detach()
            found |= {f"{part} {name} {key}": value.clone() for key, value in values.items()}
    return found


def steps_taken(run: Run, zero_stage: int) -> set[float]:
    """AdamW's counts of steps, of all that is trained."""
    optimizers = [trained._engine.optimizer for trained in run.trainer.parts.learners.values()]
    adams = [optimizer.optimizer if zero_stage else optimizer for optimizer in optimizers]
    return {float(values["step"]) for adam in adams for values in adam.state.values()}


def follow(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state at the checkpoint, and the last iteration after it."""
    config = Config.model_validate(case["config"])
    folder = Path(case["checkpoints"])
    with GraderPool(config.grader) as pool:
        run = Run(config, prepare(config, Path(case["vstar"])), ranks, pool)
        if case["continues"]:
            (checkpoint,) = checkpoints(folder)
            assert run.trainer.resume(checkpoint) == RESUMED_AFTER
        else:
            run.iterations(1, RESUMED_AFTER)
            run.trainer.save(folder, RESUMED_AFTER, None)
        at_checkpoint = state(run, config.train.zero_stage)
        run.iterations(RESUMED_AFTER + 1, ITERATIONS)
        run.trainer.source.close()
    return {
        "at checkpoint": at_checkpoint,
        "weights": run.weights(),
        "metrics": run.metrics[-1],
        "steps": steps_taken(run, config.train.zero_stage),
        "files": sorted(file.name for file in folder.iterdir()),
    }


def configured_in_groups(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings with several groups of parameters under ZeRO-3, as a large model has."""
    document = configure(config)
    document["zero_optimization"]["sub_group_size"] = PARAMETERS_IN_A_GROUP
    return document


def main(order: dict[str, Any]) -> None:
    ranks = join_ranks(seed=0)
    learner._deepspeed_config = configured_in_groups
    found = {name: follow(case, ranks) for name, case in order["cases"].items()}
    torch.save(found, f"{order['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
