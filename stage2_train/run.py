"""Stage 2 whole: from a config and vstar.parquet to a trained model. A re-run continues or does nothing."""

import importlib.util
import json
import os
from collections.abc import Collection
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from common.data.prompts import usable_prompts
from common.engines import build_engine
from common.errors import UserError
from common.files import write_text
from common.grading import GraderPool
from common.provenance import ACCEPTED, differences
from common.runs import RunPaths, exclusive_run, run_paths
from stage2_train.checkpoint import latest_state, newest_intact, read_state
from stage2_train.config import Config, TrainConfig
from stage2_train.inputs import MAY_DIFFER, Inputs, origin, prepare
from stage2_train.policy import Ranks, join_ranks
from stage2_train.sampler import Sampler
from stage2_train.train import Trainer, train


def run_stage2(
    config: Config, console: Console, vstar_file: Path | None = None, allow_mismatch: Collection[str] = ()
) -> None:
    """Train on a run's vstar.parquet and export the policy to artifacts/<run>/model; a re-run continues.

    Everything a user can get wrong is checked before a model loads. Raises UserError.
    """
    if os.environ.get("RANK", "0") != "0":
        console = Console(quiet=True)
    _refuse_uneven_split(config, int(os.environ.get("WORLD_SIZE", "1")))
    paths = run_paths(config.run)
    inputs = prepare(config, vstar_file or paths.vstar, allow_mismatch)
    _refuse_missing_wandb(config)
    total = inputs.iterations(config)
    ours = origin(config, inputs)
    made_with = {"iterations": total, "origin": ours, ACCEPTED: list(inputs.accepted_mismatches)}
    if _is_finished(paths, made_with):
        console.print(
            f"nothing to do: {paths.model} has been trained for {total} iterations with this config"
        )
        return
    _refuse_other_origin(paths, ours, latest_state(paths.checkpoints), total)
    ranks = join_ranks(config.seed)
    with exclusive_run(paths, "train") if ranks.is_main else nullcontext():
        checkpoint = ranks.from_main(
            newest_intact(paths.checkpoints, partial(console.print, soft_wrap=True))
            if ranks.is_main
            else None
        )
        _train(config, paths, inputs, ranks, total, console, checkpoint)
        if ranks.is_main:
            write_text(paths.trained_with, json.dumps(made_with, indent=2))
    console.print(f"{paths.model}: the trained policy in Hugging Face format")


def _train(
    config: Config,
    paths: RunPaths,
    inputs: Inputs,
    ranks: Ranks,
    total: int,
    console: Console,
    checkpoint: Path | None,
) -> None:
    state = read_state(checkpoint) if checkpoint else {}
    _refuse_other_world(paths, ranks, state)
    with GraderPool(config.grader) as pool:
        if config.evaluate.data is not None:
            held_out = usable_prompts(inputs.held_out, config.evaluate.data, pool)
            inputs = replace(inputs, held_out=held_out)
        engine = partial(build_engine, config, inputs.folder, inputs.renderer, beside_trainer=True)
        sampler = Sampler(engine, pool, config.sampling, ranks)
        trainer = Trainer(config, inputs, sampler, ranks)
        done = trainer.resume(checkpoint) if checkpoint else 0
        if done:
            console.print(f"continuing after iteration {done}")
        if ranks.is_main:
            write_text(paths.config, config.to_json())
        console.print(
            f"V̂* of {len(inputs.prompts):,} prompts from N = {inputs.num_samples} samples under β1 = {inputs.beta1:g}"
            f"{'' if inputs.beta1 == config.vstar.beta1 else f' (the config says {config.vstar.beta1:g})'}"
        )
        console.print(
            f"{total} iterations of {config.train.batch_size} completions, "
            f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}"
        )
        with closing(trainer.pipeline):
            train(trainer, config, paths, console, first=done + 1, last=total)
        trainer.policy.export(paths.model)
        sampler.close()


def _is_finished(paths: RunPaths, made_with: dict[str, Any]) -> bool:
    marker = paths.trained_with
    if not marker.is_file():
        return False
    found = json.loads(marker.read_text(encoding="utf-8"))
    return bool(found | {"origin": with_defaults(found["origin"])} == made_with)


def with_defaults(origin: dict[str, Any]) -> dict[str, Any]:
    """What an older version of this program wrote, with the settings of [train] that it did not know yet."""
    defaults = TrainConfig().model_dump(mode="json", exclude=set(MAY_DIFFER["train"]))
    config = origin["config"]
    return origin | {"config": config | {"train": defaults | config["train"]}}


def _refuse_missing_wandb(config: Config) -> None:
    if config.train.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("train.wandb_project is set but wandb is not installed: .venv/bin/pip install wandb")


def _refuse_other_origin(paths: RunPaths, ours: dict[str, Any], state: dict[str, Any], total: int) -> None:
    if not state:
        return
    if lines := differences(ours, with_defaults(state["origin"])):
        raise UserError(
            f"{paths.checkpoints} was made with another config or V̂*: {'; '.join(lines.values())}; "
            "choose another --run, or delete that folder"
        )
    if state["iteration"] > total:
        raise UserError(
            f"{paths.checkpoints} is at iteration {state['iteration']} already, beyond the {total} asked for; "
            "choose another --run, or delete that folder"
        )


def _refuse_uneven_split(config: Config, processes: int) -> None:
    if config.train.mini_batch_size % processes:
        raise UserError(
            f"train.mini_batch_size {config.train.mini_batch_size} cannot be split evenly over {processes} processes; "
            "choose a multiple"
        )


def _refuse_other_world(paths: RunPaths, ranks: Ranks, state: dict[str, Any]) -> None:
    if state and state["world_size"] != ranks.world_size:
        raise UserError(
            f"{paths.checkpoints} was made by {state['world_size']} processes and can only be continued by as many, "
            f"found {ranks.world_size}; start {state['world_size']}, or delete that folder"
        )
