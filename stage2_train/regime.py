"""How a job comes by its batches, with everything that goes with it: engine and grader, checks, evaluations.

Set-up chooses one of two: `Online` draws completions, `Offline` reads them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from common.data.held_out import remarks
from common.engines import EngineBuilder, LowRank
from common.grading import GraderPool
from common.provenance import Allowance
from common.rollout import Rollout
from common.runs import RunPaths
from common.terminal.console import Terminal
from stage2_train.collate import Cutter
from stage2_train.completions import write_completions
from stage2_train.config import Config
from stage2_train.data import TrainingData, usable
from stage2_train.evaluation.plan import GREEDY, SAMPLED, Benchmark, benchmarks_of
from stage2_train.parity import ParityGate, parity_draw
from stage2_train.ranks import Ranks
from stage2_train.scorers import PolicyScorer, Scorer
from stage2_train.sources.batches import Units
from stage2_train.sources.offline import OfflineSource
from stage2_train.sources.pipeline import RolloutPipeline, drawing
from stage2_train.sources.sampler import Sampler
from stage2_train.train import Trainer, held_out_draw
from stage2_train.watchers import (
    ACCURACY,
    Evaluation,
    FirstBatchCheck,
    FirstBatchDoubts,
    Turn,
    Watcher,
)


class Regime(Protocol):
    """How a job comes by its batches."""

    data: TrainingData

    def trainer(self) -> Trainer[Any]:
        """Load the engine, if there is one, and the networks."""
        ...

    def checks(self, allowance: Allowance, console: Terminal) -> list[Watcher]:
        """The watchers that see an iteration first. Needs the trainer, as `evaluations` does."""
        ...

    def evaluations(self, paths: RunPaths, console: Terminal) -> list[Watcher]:
        """The watchers that add figures to those of an iteration."""
        ...

    def lines(self) -> list[str]:
        """The data and the length of the run, for people."""
        ...

    def close(self) -> list[str]:
        """End what the trainer was given; returns lines on the cost."""
        ...


class Online:
    """Completions are drawn by an engine and graded; evaluations use the same engine."""

    def __init__(
        self, config: Config, data: TrainingData, ranks: Ranks, build_engine: EngineBuilder, job: ExitStack
    ) -> None:
        """Start the graders, which end with the job, and leave out the prompts that they cannot use."""
        self._config = config
        self._ranks = ranks
        self._build_engine = build_engine
        self._pool = job.enter_context(GraderPool(config.grader))
        self.data = data.usable(config, self._pool, ranks)
        self._benchmarks = [
            (each, job.enter_context(GraderPool(each.grader)))
            for each in benchmarks_of(config, must_exist=False)
            if each.every
        ]

    def trainer(self) -> Trainer[RolloutPipeline]:
        """The engine comes first: it needs its share of the memory."""
        config, data = self._config, self.data
        engine = partial(self._build_engine, config, data.folder, data.renderer, beside_trainer=True)
        if config.engine_takes_adapter and (lora := config.train.lora) is not None:
            engine = partial(engine, adapter=LowRank(rank=lora.rank, alpha=lora.alpha))
        self._sampler = Sampler(engine, self._pool, config.sampling, self._ranks)
        self._trainer = Trainer(config, data, drawing(config, data, self._sampler, self._ranks), self._ranks)
        return self._trainer

    def checks(self, allowance: Allowance, console: Terminal) -> list[Watcher]:
        """Engine and trainer have the same policy."""
        config, parts = self._config, self._trainer.parts
        scorers: dict[str, Scorer] = {"policy": PolicyScorer(parts.policy, self._ranks)}
        if "reference" in parts.scorers:
            scorers["reference"] = parts.scorers["reference"]
        gate = ParityGate(
            self._trainer.source,
            parity_draw(self.data, config, self._ranks),
            scorers,
            Cutter(config.train, self.data.renderer, self._ranks),
            self._ranks,
            config,
            allowance,
            console,
        )
        return [gate]

    def evaluations(self, paths: RunPaths, console: Terminal) -> list[Watcher]:
        """On benchmarks and held-out prompts, and of the first batch."""
        config, data = self._config, self.data
        watchers: list[Watcher] = [self._accuracy(each, pool) for each, pool in self._benchmarks]
        if data.held_out:
            watchers.append(
                Evaluation(
                    ACCURACY,
                    self._trainer.source,
                    held_out_draw(data.held_out, config, self._ranks),
                    self._ranks,
                    every=config.train.evaluate_every,
                    keep=partial(self._keep_completions, paths.completions),
                )
            )
        if data.stage1 is None:
            watchers.append(FirstBatchDoubts(self._ranks, console))
        elif data.stage1.first_batch:
            watchers.append(FirstBatchCheck(data.stage1.first_batch, console))
        return watchers

    def _keep_completions(self, file: Path, turn: Turn, held_out: Sequence[Rollout]) -> None:
        """A few of the iteration's completions, to read."""
        stage1 = self.data.stage1
        if self._ranks.is_main:
            write_completions(
                file,
                turn.number,
                training=turn.rollouts,
                held_out=held_out,
                pass_rate=stage1.pass_rate if stage1 else {},
                vstar=stage1.vstar if stage1 else {},
            )

    def _accuracy(self, benchmark: Benchmark, pool: GraderPool) -> Evaluation:
        prompts = usable(self.data.benchmarks[benchmark.name], benchmark.data, pool, self._ranks)
        draw = benchmark.draws.get(SAMPLED) or benchmark.draws[GREEDY]
        share = replace(
            held_out_draw(prompts, self._config, self._ranks),
            group_size=draw.num_samples,
            sampling=draw.sampling,
            pool=pool,
        )
        assert benchmark.every is not None, "training evaluates it"
        metric = f"evaluate/{benchmark.name}/accuracy"
        return Evaluation(metric, self._trainer.source, share, self._ranks, every=benchmark.every)

    def lines(self) -> list[str]:
        """Like Regime.lines."""
        return describe_online(self._config, self.data)

    def close(self) -> list[str]:
        """Close the engine; the lines are the graders'."""
        self._sampler.close()
        return list(self._pool.usage_lines())


def describe_online(config: Config, data: TrainingData) -> list[str]:
    """Lines on the data and the length of a run that draws completions."""
    train, lines = config.train, list(_prompt_lines(config, data))
    if data.held_out:
        training = [prompt.text for prompt in data.prompts]
        lines += remarks(config, [prompt.text for prompt in data.held_out], training)
    completions = train.batch_size * train.objective.group_size
    return [*lines, f"{data.iterations(config)} iterations of {completions} completions"]


def _prompt_lines(config: Config, data: TrainingData) -> Iterator[str]:
    """Lines on the prompts, and on what stage 1 says of them."""
    stage1 = data.stage1
    if stage1 is None:
        yield f"{len(data.prompts):,} prompts of [data]"
        return
    rescored = "" if stage1.beta1 == config.vstar.beta1 else f" (the config says {config.vstar.beta1:g})"
    yield (
        f"V̂* of {len(data.prompts):,} prompts from N = {stage1.num_samples} samples under "
        f"β1 = {stage1.beta1:g}{rescored}"
    )
    yield from stage1.remarks


class Offline:
    """What is trained on is read: steps with their advantages, or stage 1's samples. Nothing is drawn or evaluated."""

    def __init__(self, config: Config, data: TrainingData, units: Units, ranks: Ranks) -> None:
        self.data = data
        self._units = units
        self._config = config
        self._ranks = ranks

    def trainer(self) -> Trainer[OfflineSource]:
        """The networks alone."""
        source = OfflineSource(self._config, self._units, self._ranks)
        return Trainer(self._config, self.data, lambda weights: source, self._ranks)

    def checks(self, allowance: Allowance, console: Terminal) -> list[Watcher]:
        """None: there is no engine to compare with."""
        return []

    def evaluations(self, paths: RunPaths, console: Terminal) -> list[Watcher]:
        """None: there is no engine to draw with."""
        return []

    def lines(self) -> list[str]:
        """Like Regime.lines."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.data.stage1 is not None:
            yield from _prompt_lines(self._config, self.data)
        yield from self._units.lines()
        waiting = [] if self._config.held_out is None else ["[evaluate.data]"]
        waiting += [f"[evaluate.benchmarks.{name}]" for name in self._config.during_training]
        train = self._config.train
        if waiting:
            unused = (
                " (train.evaluate_every has no effect)" if "evaluate_every" in train.model_fields_set else ""
            )
            yield (
                f"nothing is evaluated during training{unused}; `python cli.py evaluate` does it: {', '.join(waiting)}"
            )
        yield f"{self.data.iterations(self._config)} iterations of {train.batch_size} {self._units.unit}"

    def close(self) -> list[str]:
        """There is nothing to end."""
        return []
