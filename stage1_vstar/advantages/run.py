"""The job `advantages`: from segments.parquet and the critic to advantages.parquet, in bounded memory.

The table keeps the critic's values beside the Monte-Carlo values. As long as segments and critic are the same, other
settings of [advantages] need no model.
"""

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.config import RunConfig
from common.contract import polars_schema
from common.errors import DamagedFile, UserError
from common.files import file_digest, hash_files
from common.provenance import ACCEPTED, Allowance
from common.runs import exclusive_run, run_paths
from common.segments.advantages import dropped_by, lists, with_advantages
from common.segments.critic import refuse_missing_critic, trained_on
from common.segments.files import ADVANTAGES, ADVANTAGES_TABLE, SEGMENTS_TABLE
from common.terminal.console import Terminal
from common.terminal.progress import Advance
from common.value import Ragged
from stage1_vstar.advantages.rescore import rescore_advantages
from stage1_vstar.advantages.successors import PromptTokens, checked_prompts, renderer_of, successors
from stage1_vstar.advantages.values import KeptValues, LoadCritic
from stage1_vstar.table import with_dropped

SETTING = "advantages.min_gap"
NO_VALUES: pl.Expr | pl.Series = pl.lit(None, polars_schema(ADVANTAGES)["critic_values"]).alias(
    "critic_values"
)
WEIGHTS = ("*.safetensors", "config.json")
"""The files of a critic that its values depend on."""


@dataclass(slots=True)
class Counts:
    """The states and their next steps."""

    states: int = 0
    steps: int = 0
    kept: int = 0
    kept_steps: int = 0
    ending: int = 0
    """Steps that end a solution."""
    without_steps: int = 0
    """States that are not terminal, but no next step of which could be judged."""
    dropped: dict[str, int] = field(default_factory=dict)

    def add(self, rows: pl.DataFrame) -> None:
        """Count rows of advantages.parquet."""
        steps, kept = pl.col("values").list.len().sum(), pl.col("keep")
        self.states += rows.height
        self.kept += int(rows["keep"].sum())
        self.steps += rows.select(steps).item()
        self.kept_steps += rows.filter(kept).select(steps).item()
        self.ending += int(rows["action_ends"].explode().sum())
        for rule, count in rows["dropped_by"].drop_nulls().value_counts(sort=True).iter_rows():
            self.dropped[rule] = self.dropped.get(rule, 0) + count

    def lines(self) -> Iterator[str]:
        """The counts, for people."""
        yield (
            f"{self.states:,} states with {self.steps:,} next steps, {self.ending:,} of which end a solution: "
            "their value is the reward"
        )
        if self.without_steps:
            yield f"{self.without_steps:,} states are left out: the grader could judge none of their completions"
        rules = "; ".join(f"{rule}: {count:,}" for rule, count in self.dropped.items())
        yield f"{self.kept:,} states with {self.kept_steps:,} next steps to train on" + (
            f"; dropped by {rules}" if rules else ""
        )


def run_advantages(
    config: RunConfig,
    console: Terminal,
    load_critic: LoadCritic,
    segments_file: Path | None = None,
    allow_mismatch: Collection[str] = (),
) -> None:
    """Write artifacts/<run>/advantages.parquet; the critic is loaded only if values of it are missing.

    Raises UserError, before a model loads unless no state is left to train on. There is no table then, but the critic's
    values are kept.
    """
    paths, settings = run_paths(config.run), config.advantages
    segments = segments_file or paths.segments
    provenance = SEGMENTS_TABLE.provenance(segments)
    origin: dict[str, str | None] = {"segments": file_digest(segments), "critic": None}
    is_critics = settings.values == "critic"
    if is_critics:
        refuse_missing_critic(
            paths.critic, ', or take the Monte-Carlo values with advantages.values = "monte_carlo"'
        )
        origin |= {"critic": hash_files(paths.critic, WEIGHTS), "critic_dtype": config.model.dtype}
        if trained_on(paths.critic) not in (None, origin["segments"]):
            console.print(
                f"warning: the critic in {paths.critic} was trained on another table of states than {segments}; remove "
                "that folder and run `python cli.py critic` for one of these states"
            )
    with exclusive_run(paths, "advantages"):
        before = _context_of(paths.advantages, console)
        allowance = Allowance(allow_mismatch, before.get(ACCEPTED, []) if before else [])
        renderer = renderer_of(config, segments, provenance, allowance)
        if before is not None and _has_all(before, origin):
            if (before["values"], before["min_gap"]) == (settings.values, settings.min_gap):
                console.print(f"nothing to do: {paths.advantages} is complete")
            else:
                line = rescore_advantages(
                    paths.advantages, paths.advantages, settings.values, settings.min_gap, setting=SETTING
                )
                console.print(line)
            return
        prompts = checked_prompts(config, segments, renderer, allowance, paths.critic if is_critics else None)
        digest = f"{origin['critic']} {config.model.dtype}"
        values = KeptValues(paths.critic_values, paths.critic, digest, load_critic)
        context: dict[str, Any] = {**origin, "values": settings.values, "min_gap": settings.min_gap}
        if accepted := [*provenance.context.get(ACCEPTED, []), *allowance.used]:
            context[ACCEPTED] = accepted
        made = replace(provenance, context={**provenance.context, **context})
        counts = Counts()
        is_used = ~pl.col("is_terminal") & pl.col("prompt_id").is_in(list(prompts))
        with (
            ADVANTAGES_TABLE.writer(paths.advantages, made) as write,
            _valuing(segments, is_used, console) if is_critics else nullcontext() as progress,
        ):
            for states in SEGMENTS_TABLE.scan(segments):
                going_on = states.filter(is_used)
                rows = going_on.filter(pl.col("action_values").list.len() > 0)
                counts.without_steps += going_on.height - rows.height
                if rows.is_empty():
                    continue
                column = NO_VALUES
                if progress is not None:
                    column = _critic_values(rows, values, prompts, progress)
                found = with_advantages(rows.with_columns(column), settings.values)
                found = with_dropped(found, dropped_by(settings.min_gap))
                counts.add(found)
                write(found.select(ADVANTAGES.names))
            _refuse_nothing_to_train_on(counts, segments, settings.min_gap)
        if is_critics:
            values.forget()
    for line in counts.lines():
        console.print(line)
    console.print(f"{paths.advantages}: what `train` with the objective direct_advantage reads")


def _refuse_nothing_to_train_on(counts: Counts, segments: Path, min_gap: float) -> None:
    if not counts.states:
        raise UserError(
            f"{segments}: no state has a next step to train on: all are whole solutions, or imported; choose "
            "another segments.split, or draw states with `python cli.py segments`"
        )
    if not counts.kept:
        rules = ", ".join(f"{rule}: {count:,}" for rule, count in counts.dropped.items())
        raise UserError(
            f"{segments}: no state is left to train on ({rules}); lower {SETTING} ({min_gap:g}), which needs no model "
            "again, or draw more with larger segments.chosen and segments.completions"
        )


def _context_of(path: Path, console: Terminal) -> dict[str, Any] | None:
    """The context of the table that is there; None for none, or a damaged one, which is made again."""
    if not path.exists():
        return None
    try:
        return ADVANTAGES_TABLE.provenance(path).context
    except DamagedFile as error:
        console.print(f"warning: {error}; it is made again")
        return None


def _has_all(before: dict[str, Any], origin: dict[str, Any]) -> bool:
    """Whether a table is of the same segments, and has the values of the same critic if one is wanted.

    Tables of earlier versions do not say in which dtype the critic computed.
    """
    return all(before.get(name, wanted) == wanted for name, wanted in origin.items() if wanted is not None)


def _valuing(segments: Path, is_used: pl.Expr, console: Terminal) -> Advance:
    """The progress of the critic, over all states that it is asked for."""
    columns = ("prompt_id", "is_terminal", "action_ends")
    total = sum(
        int((~rows.filter(is_used)["action_ends"].explode()).sum() or 0)
        for rows in SEGMENTS_TABLE.scan(segments, columns)
    )
    return Advance(console, total, lambda done: f"the critic's values of {done:,}/{total:,} states")


def _critic_values(
    rows: pl.DataFrame, values: KeptValues, prompts: PromptTokens, progress: Advance
) -> pl.Series:
    """The column `critic_values`: the critic is asked for the steps that do not end the solution."""
    ends_A = rows["action_ends"].explode().to_numpy()
    values_A = np.full(len(ends_A), np.nan)
    values_A[~ends_A] = values(successors(rows, prompts), progress.by)
    return lists(
        "critic_values", values_A, Ragged(rows["action_ends"].list.len().to_numpy().astype(np.int64))
    )
