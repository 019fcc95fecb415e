"""Stage 2 as a whole: from a config, and the table that the objective needs, if any, to a trained model.

A re-run continues or does nothing.
"""

import json
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.documents import read_metrics
from common.engines import EngineBuilder, build_engine
from common.errors import UserError
from common.files import write_text, writing_to
from common.packages import refuse_missing
from common.parity import PARITY
from common.provenance import ACCEPTED, Allowance
from common.remote.leases import copy_id
from common.remote.places import url_of
from common.runs import RunPaths, exclusive_run, run_paths
from common.terminal.console import Terminal
from stage2_train import preflight
from stage2_train.card import CARD, Trained
from stage2_train.checkpoint import latest_state, newest_intact, read_state
from stage2_train.completions import forget_completions
from stage2_train.config import Config
from stage2_train.data import prepare
from stage2_train.metrics import MetricsLog
from stage2_train.ranks import Ranks, join_ranks, launched_processes, noticing_lost_ranks
from stage2_train.regime import Offline, Online, Regime
from stage2_train.resume import is_finished, record, refuse_other_origin, refuse_other_zero
from stage2_train.split import Split
from stage2_train.train import Trainer, train
from stage2_train.watchdog import Watchdog, in_phase
from stage2_train.watchers import Checkpoints, Divergence, Log, Watcher


def run_stage2(
    config: Config,
    console: Terminal,
    vstar_file: Path | None = None,
    allow_mismatch: Collection[str] = (),
    build_engine: EngineBuilder = build_engine,
    observers: Collection[Watcher] = (),
    advantages_file: Path | None = None,
) -> None:
    """Train and export the policy to artifacts/<run>/model; a re-run continues.

    All user mistakes are checked before a model loads. `observers` see each iteration right after engine and trainer
    have been compared. Raises UserError.
    """
    preflight.refuse_uneven_split(config, launched_processes())
    _refuse_missing_packages(config)
    paths = run_paths(config.run)
    table = _table(config, vstar_file, advantages_file)
    ranks = join_ranks(config.seed)
    if not ranks.is_main:
        console = Terminal(quiet=True)
    with noticing_lost_ranks(ranks), ExitStack() as job:
        _refuse_several_copies(paths, ranks)
        data = prepare(config, table, allow_mismatch, ranks)
        regime: Regime
        if data.units is None:
            regime = Online(config, data, ranks, build_engine, job)
        else:
            regime = Offline(config, data, data.units, ranks)
        trained_with = record(config, regime.data)
        total = regime.data.iterations(config)
        if is_finished(paths, trained_with):
            console.print(
                f"nothing to do: {paths.model} has been trained for {total} iterations with this config"
            )
            return
        refuse_other_origin(paths, trained_with["origin"], latest_state(paths.checkpoints), total)
        if ranks.is_main:
            job.enter_context(exclusive_run(paths, "train"))
            read_metrics(paths.metrics)  # refuses a damaged one
        checkpoint = ranks.from_main(
            newest_intact(paths.checkpoints, console.print) if ranks.is_main else None
        )
        if checkpoint:
            ours = Split(processes=ranks.world_size, zero_stage=config.train.zero_stage)
            saved = Split.of(read_state(checkpoint))
            refuse_other_zero(checkpoint, ours, saved)
            if not ours.reads(saved):
                console.print(f"{checkpoint} was made by {saved}: it will be converted for {ours}")
        job.enter_context(Watchdog(ranks, timedelta(minutes=config.train.hang_minutes)))
        with in_phase("loading the models"):
            trainer = regime.trainer()
        allowance = Allowance([name for name in allow_mismatch if name == PARITY])
        _train(trainer, regime, paths, checkpoint, console, observers, allowance)
        with in_phase("writing the model"):
            trainer.parts.policy.export(paths.model)
        for line in regime.close():
            console.print(line)
        trained_with[ACCEPTED] += allowance.used
        if ranks.is_main:
            card = Trained.of(paths, config, total, trainer.made_with).card()
            write_text(paths.model / CARD, card)
            write_text(paths.trained_with, json.dumps(trained_with, indent=2))
    console.print(f"{paths.model}: the trained policy in Hugging Face format")


def _refuse_several_copies(paths: RunPaths, ranks: Ranks) -> None:
    """Raise UserError if the run is at a URL and its ranks have different copies: they write a checkpoint together."""
    if (url := url_of(paths.root)) is not None and len(copies := set(ranks.gather([copy_id()]))) > 1:
        raise UserError(
            f"{url} has {len(copies)} copies on the nodes of this job, and a checkpoint would be divided among them: "
            "set ASTAR_PO_CACHE to one folder that all nodes share"
        )


def _train(
    trainer: Trainer[Any],
    regime: Regime,
    paths: RunPaths,
    checkpoint: Path | None,
    console: Terminal,
    observers: Collection[Watcher],
    allowance: Allowance,
) -> None:
    config, ranks = trainer.config, trainer.ranks
    with in_phase("loading the checkpoint"):
        done = trainer.resume(checkpoint) if checkpoint else 0
    if done:
        console.print(f"continuing after iteration {done}")
    if ranks.is_main:
        write_text(paths.config, config.to_json())
    for line in _describe(config, regime, ranks):
        console.print(line)
    last = trainer.data.iterations(config)
    with ExitStack() as ending:
        ending.enter_context(closing(trainer.source))
        log = None
        if ranks.is_main:
            begin = done + 1 if done else 0
            with writing_to(paths.completions):
                forget_completions(paths.completions, begin)
            log = MetricsLog(config, paths, console, first_iteration=begin, last=last)
            ending.enter_context(closing(log))
        checks = regime.checks(allowance, console)
        watchers = _watchers(trainer, regime.evaluations(paths, console), paths, log)
        train(trainer, [*checks, *observers, *watchers], console, first=done + 1, last=last)


def _table(config: Config, vstar_file: Path | None, advantages_file: Path | None) -> Path | None:
    """The table that training reads; None if it takes its prompts from [data]. Raises UserError if there is none."""
    train, paths, name = config.train, run_paths(config.run), config.train.objective.name
    if train.reads_advantages and vstar_file is not None:
        raise UserError(
            f"--vstar {vstar_file}: the objective {name} reads a table of advantages; give it with --advantages"
        )
    if not train.reads_advantages and advantages_file is not None:
        raise UserError(
            f"--advantages {advantages_file}: the objective {name} reads none; leave it out, or set "
            "train.objective.name to direct_advantage"
        )
    given = advantages_file or vstar_file
    if given is not None or not (train.reads_advantages or train.reads_stage1):
        return given
    if train.reads_advantages:
        file, otherwise = paths.advantages, ""
    else:
        file = paths.vstar
        otherwise = ", or choose an objective that does without stage 1, such as grpo"
    if not file.exists():
        who = f"the objective {name}" if train.rollouts == "policy" else 'train.rollouts = "stage1"'
        remedy = ", ".join(f"`python cli.py {command}`" for command in config.before_training)
        raise UserError(f"there is no {file}, which {who} needs; make it with {remedy}{otherwise}")
    return file


def _watchers(
    trainer: Trainer[Any], evaluations: Sequence[Watcher], paths: RunPaths, log: MetricsLog | None
) -> list[Watcher]:
    """The watchers after the checks, in the order in which they see an iteration.

    The log comes after watchers that add figures, and a checkpoint after the checks of the policy.
    """

    def save(number: int, held_out_accuracy: float | None) -> None:
        if log is not None:
            log.store()
        trainer.save(paths.checkpoints, number, held_out_accuracy)

    checkpoints = Checkpoints(save, every=trainer.config.train.checkpoint_every)
    return [*evaluations, *([Log(log)] if log else []), Divergence(), checkpoints]


def _describe(config: Config, regime: Regime, ranks: Ranks) -> list[str]:
    """Lines on the training run, and notes on its data."""
    *lines, length = regime.lines()
    processes = f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}"
    return [*lines, *preflight.remarks(config, regime.data.folder), f"{length}, {processes}"]


def _refuse_missing_packages(config: Config) -> None:
    if config.train.lora is not None:
        refuse_missing("peft", "train.lora is set", "make setup")
    if config.train.wandb_project is not None:
        refuse_missing("wandb", "train.wandb_project is set", ".venv/bin/pip install wandb")
