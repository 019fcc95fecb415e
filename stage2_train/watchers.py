"""Watchers, called after each iteration: evaluation, the first batch's check, the log, divergence, checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import polars as pl

from common.doubts import doubts
from common.grading import negative_rewards_warning
from common.rollout import Rollout
from common.terminal.console import Terminal
from stage2_train.first_batch import FirstBatch
from stage2_train.metrics import Metrics, MetricsLog, timed
from stage2_train.ranks import Ranks
from stage2_train.safeguards import refuse_divergence
from stage2_train.sources.pipeline import RolloutPipeline
from stage2_train.sources.sampler import Draw
from stage2_train.watchdog import in_phase

ACCURACY = "evaluate/pass_at_1"
FORECAST_LOSS = "loss/regression"
"""The figure that is compared for the first batch: (r − V̂*)² while the policy is the reference."""


@dataclass(slots=True, kw_only=True)
class Turn:
    """A finished iteration. Number 0 is the policy before the first iteration and has no figures."""

    number: int
    metrics: Metrics
    """Figures of the whole batch; watchers add theirs."""
    rollouts: Sequence[Rollout]
    """This rank's."""
    is_last: bool
    is_stopping: bool = False
    """Whether the job ends after it, before its last iteration."""


class Watcher(Protocol):
    """Called after each iteration, on every rank."""

    def after(self, turn: Turn) -> None:
        """Raises UserError if the job must not continue."""
        ...


class Evaluation:
    """Accuracy on prompts that are not trained on, such as the held-out ones or a benchmark's."""

    def __init__(
        self,
        metric: str,
        source: RolloutPipeline,
        draw: Draw,
        ranks: Ranks,
        *,
        every: int,
        keep: Callable[[Turn, Sequence[Rollout]], None] = lambda turn, rollouts: None,
    ) -> None:
        """`draw` is this rank's share of the prompts; `keep` gets each evaluation's rollouts and iteration."""
        self._metric = metric
        self._source = source
        self._draw = draw
        self._ranks = ranks
        self._every = every
        self._keep = keep

    def after(self, turn: Turn) -> None:
        """Evaluate every so many iterations and after the last one."""
        if turn.number % self._every and not turn.is_last:
            return
        with timed("evaluate", turn.metrics):
            rollouts = self._source.now(self._draw, turn.number)
        solved = self._ranks.gather([rollout.is_solved for rollout in rollouts])
        turn.metrics[self._metric] = sum(solved) / len(solved)
        self._keep(turn, rollouts)


class FirstBatchCheck:
    """Compares the first iteration with the forecast from stage 1's samples."""

    def __init__(self, expected: FirstBatch, console: Terminal) -> None:
        self._expected = expected
        self._console = console

    def after(self, turn: Turn) -> None:
        """Log the forecast, and warn if the first iteration is outside it."""
        if turn.number != 1 or FORECAST_LOSS not in turn.metrics:
            return
        turn.metrics |= self._expected.bounds()
        loss, reward = turn.metrics[FORECAST_LOSS], turn.metrics["reward/mean"]
        if warning := self._expected.warning(loss, reward):
            self._console.print(warning)


class FirstBatchDoubts:
    """Reports results of the first batch that cannot be intended, if there is no stage 1 that has reported them."""

    def __init__(self, ranks: Ranks, console: Terminal) -> None:
        self._ranks = ranks
        self._console = console

    def after(self, turn: Turn) -> None:
        """A collective operation in the first iteration."""
        if turn.number != 1:
            return
        drawn = self._ranks.gather(
            [(one.graded.outcome.value, one.reward, len(one.completion.token_ids)) for one in turn.rollouts]
        )
        outcomes, rewards, tokens = (list(column) for column in zip(*drawn, strict=True))
        rows = pl.DataFrame({"outcomes": [outcomes], "rewards": [rewards], "completion_tokens": [tokens]})
        for line in doubts(rows):
            self._console.print(f"warning: of the first batch, {line}")
        if warning := negative_rewards_warning(outcomes, rewards):
            self._console.print(warning)


class Log:
    """Writes each iteration's figures to all destinations; only for the main rank."""

    def __init__(self, log: MetricsLog) -> None:
        self._log = log

    def after(self, turn: Turn) -> None:
        """Write the figures that there are."""
        if turn.metrics:
            self._log.write(turn.number, turn.metrics)


class Divergence:
    """Ends training that has gone wrong beyond repair, before a checkpoint is written."""

    def after(self, turn: Turn) -> None:
        """Raises UserError for a collapsed policy."""
        if turn.number:
            refuse_divergence(turn.number, turn.metrics)


class Checkpoints:
    """Writes a checkpoint every `checkpoint_every` iterations, after the last one, and when the job ends early."""

    def __init__(self, save: Callable[[int, float | None], None], *, every: int) -> None:
        """`save` is called with the iteration and the held-out accuracy, if it was measured."""
        self._save = save
        self._every = every

    def after(self, turn: Turn) -> None:
        """A collective operation when a checkpoint is due."""
        if turn.number and (turn.number % self._every == 0 or turn.is_last or turn.is_stopping):
            with in_phase("checkpoint"):
                self._save(turn.number, turn.metrics.get(ACCURACY))
