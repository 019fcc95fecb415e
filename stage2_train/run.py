"""Stage 2 as a whole: from a config, and stage 1's file if the objective needs it, to a trained model.

A re-run continues or does nothing.
"""

import json
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.data.held_out import remarks
from common.documents import read_metrics
from common.engines import EngineBuilder, build_engine
from common.errors import UserError
from common.files import write_text, writing_to
from common.grading import GraderPool
from common.packages import refuse_missing
from common.parity import PARITY
from common.provenance import ACCEPTED, Allowance
from common.runs import RunPaths, exclusive_run, run_paths
from common.terminal.console import Terminal
from stage2_train import preflight
from stage2_train.card import CARD, Trained
from stage2_train.checkpoint import latest_state, newest_intact, read_state
from stage2_train.collate import Cutter
from stage2_train.completions import forget_completions
from stage2_train.config import Config
from stage2_train.data import TrainingData, prepare, usable
from stage2_train.evaluation.plan import GREEDY, SAMPLED, Benchmark, benchmarks_of
from stage2_train.metrics import MetricsLog
from stage2_train.parity import ParityGate, parity_draw
from stage2_train.ranks import Ranks, join_ranks, launched_processes
from stage2_train.resume import is_finished, record, refuse_other_origin, refuse_other_world
from stage2_train.scorers import PolicyScorer, Scorer
from stage2_train.sources.pipeline import RolloutPipeline, drawing
from stage2_train.sources.sampler import Sampler
from stage2_train.train import Trainer, held_out_draw, train
from stage2_train.watchers import (
    BenchmarkAccuracy,
    Checkpoints,
    Divergence,
    Evaluation,
    FirstBatchCheck,
    FirstBatchDoubts,
    Log,
    Watcher,
)


def run_stage2(
    config: Config,
    console: Terminal,
    vstar_file: Path | None = None,
    allow_mismatch: Collection[str] = (),
    build_engine: EngineBuilder = build_engine,
    observers: Collection[Watcher] = (),
) -> None:
    """Train and export the policy to artifacts/<run>/model; a re-run continues.

    All user mistakes are checked before a model loads. `observers` see each iteration right after engine and trainer
    have been compared. Raises UserError.
    """
    _refuse_uneven_split(config, launched_processes())
    _refuse_missing_packages(config)
    paths = run_paths(config.run)
    if vstar_file is None and config.train.reads_stage1:
        vstar_file = paths.vstar
        if not vstar_file.exists():
            raise UserError(
                f"there is no {vstar_file}, which the objective {config.train.objective.name} needs; make it with "
                "`python cli.py vstar`, or choose an objective that does without stage 1, such as grpo"
            )
    ranks = join_ranks(config.seed)
    if not ranks.is_main:
        console = Terminal(quiet=True)
    data = prepare(config, vstar_file, allow_mismatch, ranks)
    with ExitStack() as job:
        pool = job.enter_context(GraderPool(config.grader))
        data = data.usable(config, pool, ranks)
        benchmarks = [
            (each, job.enter_context(GraderPool(each.grader)))
            for each in benchmarks_of(config, must_exist=False)
            if each.every
        ]
        trained_with = record(config, data)
        total = data.iterations(config)
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
        refuse_other_world(paths, ranks, read_state(checkpoint) if checkpoint else {})
        engine = partial(build_engine, config, data.folder, data.renderer, beside_trainer=True)
        sampler = Sampler(engine, pool, config.sampling, ranks)
        trainer = Trainer(config, data, drawing(config, data, sampler, ranks), ranks)
        allowance = Allowance([name for name in allow_mismatch if name == PARITY])
        watchers = [*observers, *(_benchmark(trainer, each, its_pool) for each, its_pool in benchmarks)]
        _train(trainer, paths, checkpoint, console, watchers, allowance)
        trainer.parts.policy.export(paths.model)
        sampler.close()
        for line in pool.usage_lines():
            console.print(line)
        trained_with[ACCEPTED] += allowance.used
        if ranks.is_main:
            card = Trained.of(paths, config, total, trainer.made_with).card()
            write_text(paths.model / CARD, card)
            write_text(paths.trained_with, json.dumps(trained_with, indent=2))
    console.print(f"{paths.model}: the trained policy in Hugging Face format")


def _train(
    trainer: Trainer[RolloutPipeline],
    paths: RunPaths,
    checkpoint: Path | None,
    console: Terminal,
    observers: Collection[Watcher],
    allowance: Allowance,
) -> None:
    config, ranks = trainer.config, trainer.ranks
    done = trainer.resume(checkpoint) if checkpoint else 0
    if done:
        console.print(f"continuing after iteration {done}")
    if ranks.is_main:
        write_text(paths.config, config.to_json())
    for line in _describe(config, trainer.data, ranks):
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
        gate = _parity_gate(trainer, allowance, console)
        watchers = [gate, *observers, *_watchers(trainer, paths, console, log)]
        train(trainer, watchers, console, first=done + 1, last=last)


def _parity_gate(trainer: Trainer[RolloutPipeline], allowance: Allowance, console: Terminal) -> ParityGate:
    config, ranks, parts = trainer.config, trainer.ranks, trainer.parts
    scorers: dict[str, Scorer] = {"policy": PolicyScorer(parts.policy, ranks)}
    if "reference" in parts.scorers:
        scorers["reference"] = parts.scorers["reference"]
    return ParityGate(
        trainer.source,
        parity_draw(trainer.data, config, ranks),
        scorers,
        Cutter(config.train, trainer.data.renderer, ranks),
        ranks,
        config,
        allowance,
        console,
    )


def _benchmark(
    trainer: Trainer[RolloutPipeline], benchmark: Benchmark, pool: GraderPool
) -> BenchmarkAccuracy:
    """The watcher that evaluates a benchmark during training."""
    data, ranks = trainer.data, trainer.ranks
    prompts = usable(data.benchmarks[benchmark.name], benchmark.data, pool, ranks)
    draw = benchmark.draws.get(SAMPLED) or benchmark.draws[GREEDY]
    share = replace(
        held_out_draw(prompts, trainer.config, ranks),
        group_size=draw.num_samples,
        sampling=draw.sampling,
        pool=pool,
    )
    assert benchmark.every is not None, "training evaluates it"
    return BenchmarkAccuracy(benchmark.name, trainer.source, share, ranks, every=benchmark.every)


def _watchers(
    trainer: Trainer[RolloutPipeline], paths: RunPaths, console: Terminal, log: MetricsLog | None
) -> list[Watcher]:
    """The watchers, in the order in which they see an iteration.

    The log comes after watchers that add figures, and a checkpoint after the checks of the policy.
    """
    config, data, ranks = trainer.config, trainer.data, trainer.ranks
    watchers: list[Watcher] = []
    if data.held_out:
        draw = held_out_draw(data.held_out, config, ranks)
        watchers.append(
            Evaluation(
                trainer.source,
                draw,
                ranks,
                every=config.train.evaluate_every,
                completions=paths.completions,
                stage1=data.stage1,
            )
        )
    if data.stage1 is None:
        watchers.append(FirstBatchDoubts(ranks, console))
    elif data.stage1.first_batch:
        watchers.append(FirstBatchCheck(data.stage1.first_batch, console))
    if log:
        watchers.append(Log(log))
    save = partial(trainer.save, paths.checkpoints)
    return [*watchers, Divergence(), Checkpoints(save, every=config.train.checkpoint_every)]


def _describe(config: Config, data: TrainingData, ranks: Ranks) -> list[str]:
    """Print two lines on the training run, and notes on its data."""
    train, stage1 = config.train, data.stage1
    lines = [f"{len(data.prompts):,} prompts of [data]"]
    if stage1 is not None:
        rescored = "" if stage1.beta1 == config.vstar.beta1 else f" (the config says {config.vstar.beta1:g})"
        lines = [
            f"V̂* of {len(data.prompts):,} prompts from N = {stage1.num_samples} samples under "
            f"β1 = {stage1.beta1:g}{rescored}"
        ]
        lines += stage1.remarks
    completions = train.batch_size * train.objective.group_size
    if data.held_out:
        training = [prompt.text for prompt in data.prompts]
        lines += remarks(config, [prompt.text for prompt in data.held_out], training)
    lines += preflight.remarks(config, data.folder)
    return [
        *lines,
        f"{data.iterations(config)} iterations of {completions} completions, "
        f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}",
    ]


def _refuse_missing_packages(config: Config) -> None:
    if config.train.lora is not None:
        refuse_missing("peft", "train.lora is set", "make setup")
    if config.train.wandb_project is not None:
        refuse_missing("wandb", "train.wandb_project is set", ".venv/bin/pip install wandb")


def _refuse_uneven_split(config: Config, processes: int) -> None:
    if config.train.mini_batch_size % processes:
        raise UserError(
            f"train.mini_batch_size {config.train.mini_batch_size} cannot be split evenly over {processes} processes; "
            "choose a multiple"
        )
