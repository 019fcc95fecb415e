"""The job `advantages`: from segments.parquet and the critic to advantages.parquet, in bounded memory.

The table keeps the critic's values beside the Monte-Carlo values. As long as segments and critic are the same, other
settings of [advantages] need no model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.config import RunConfig
from common.contract import polars_schema
from common.data.prompts import prompts_from_pairs
from common.data.rendering import PromptRenderer
from common.errors import DamagedFile, UserError
from common.files import file_digest, hash_files
from common.model.files import reference_model
from common.runs import exclusive_run, run_paths
from common.segments.advantages import dropped_by, lists, with_advantages
from common.segments.critic import trained_on
from common.segments.files import ADVANTAGES, ADVANTAGES_TABLE, SEGMENTS_TABLE
from common.terminal.console import Terminal
from common.value import Ragged
from stage1_vstar.advantages.rescore import rescore_advantages
from stage1_vstar.table import with_dropped

Score = Callable[[Path, Iterable[Sequence[int]]], Sequence[float]]
"""From the critic's folder and the tokens of states to their values."""

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
    config: RunConfig, console: Terminal, score: Score, segments_file: Path | None = None
) -> None:
    """Write artifacts/<run>/advantages.parquet; `score` is called only if the values are to be the critic's.

    Raises UserError, before a model loads unless nothing is left to train on.
    """
    paths, settings = run_paths(config.run), config.advantages
    segments = segments_file or paths.segments
    provenance = SEGMENTS_TABLE.provenance(segments)
    origin: dict[str, str | None] = {"segments": file_digest(segments), "critic": None}
    if settings.values == "critic":
        if not paths.critic.is_dir():
            raise UserError(
                f"there is no critic in {paths.critic}; train it with `python cli.py critic`, or take the Monte-Carlo "
                'values with advantages.values = "monte_carlo"'
            )
        origin["critic"] = hash_files(paths.critic, WEIGHTS)
        if trained_on(paths.critic) not in (None, origin["segments"]):
            console.print(
                f"warning: the critic in {paths.critic} was trained on another table of states than {segments}; remove "
                "that folder and run `python cli.py critic` for one of these states"
            )
    with exclusive_run(paths, "advantages"):
        if (before := _context_of(paths.advantages, console)) is not None and _has_all(before, origin):
            if (before["values"], before["min_gap"]) == (settings.values, settings.min_gap):
                console.print(f"nothing to do: {paths.advantages} is complete")
            else:
                console.print(
                    rescore_advantages(paths.advantages, paths.advantages, settings.values, settings.min_gap)
                )
            return
        counts = Counts()
        made = replace(
            provenance,
            context={
                **provenance.context,
                **origin,
                "values": settings.values,
                "min_gap": settings.min_gap,
            },
        )
        with ADVANTAGES_TABLE.writer(paths.advantages, made) as write:
            for states in SEGMENTS_TABLE.scan(segments):
                going_on = states.filter(~pl.col("is_terminal"))
                rows = going_on.filter(pl.col("action_values").list.len() > 0)
                counts.without_steps += going_on.height - rows.height
                if rows.is_empty():
                    continue
                rows = rows.with_columns(_critic_values(rows, config, score))
                found = with_dropped(with_advantages(rows, settings.values), dropped_by(settings.min_gap))
                counts.add(found)
                write(found.select(ADVANTAGES.names))
            if not counts.states:
                raise UserError(
                    f"{segments}: no state has a next step to train on: all are whole solutions, or imported; choose "
                    "another segments.split, or draw states with `python cli.py segments`"
                )
    for line in counts.lines():
        console.print(line)
    if not counts.kept:
        raise UserError(
            f"{paths.advantages}: no state is left to train on; lower advantages.min_gap ({settings.min_gap:g}), which "
            "needs no model again, or draw more with larger segments.chosen and segments.completions"
        )
    console.print(f"{paths.advantages}: what `train` with the objective direct_advantage reads")


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
    """Whether a table is of the same segments, and has the values of the same critic if one is wanted."""
    names = [name for name, digest in origin.items() if digest is not None]
    return all(before[name] == origin[name] for name in names)


def _critic_values(rows: pl.DataFrame, config: RunConfig, score: Score) -> pl.Series | pl.Expr:
    """The critic's value of each next step that does not end the solution."""
    if config.advantages.values != "critic":
        return pl.lit(None, polars_schema(ADVANTAGES)["critic_values"]).alias("critic_values")
    ends_A = rows["action_ends"].explode().to_numpy()
    values_A = np.full(len(ends_A), np.nan)
    if not ends_A.all():
        found = np.asarray(score(run_paths(config.run).critic, _successors(rows, config)), dtype=np.float64)
        if not np.isfinite(found).all():
            raise UserError(
                f"{run_paths(config.run).critic}: the critic's value of a state is not a number; train it again with a "
                "lower critic.learning_rate"
            )
        values_A[~ends_A] = found
    return lists(
        "critic_values", values_A, Ragged(rows["action_ends"].list.len().to_numpy().astype(np.int64))
    )


def _successors(rows: pl.DataFrame, config: RunConfig) -> Iterator[tuple[int, ...]]:
    """The tokens of prompt, prefix and next step, where something follows."""
    prompts = prompt_tokens(rows, config)
    columns = ("prompt_id", "prefix_token_ids", "action_token_ids", "action_ends")
    for prompt, prefix, actions, ends in rows.select(columns).iter_rows():
        for action, is_last in zip(actions, ends, strict=True):
            if not is_last:
                yield (*prompts[prompt], *prefix, *action)


def prompt_tokens(rows: pl.DataFrame, config: RunConfig) -> dict[str, Sequence[int]]:
    """The tokens of each prompt, by id. Raises UserError if they are not those that the table was made with."""
    theirs = rows.select("prompt_id", "prompt", "answer", "prompt_token_hash").unique(maintain_order=True)
    renderer = PromptRenderer(reference_model(config), config.data)
    prompts = prompts_from_pairs(zip(theirs["prompt"], theirs["answer"], strict=True), config.data, renderer)
    ours = {prompt.id: prompt for prompt in prompts}
    for prompt_id, token_hash in theirs.select("prompt_id", "prompt_token_hash").iter_rows():
        if prompt_id not in ours or ours[prompt_id].token_hash != token_hash:
            raise UserError(
                f"prompt {prompt_id} is rendered to other token ids than those of the states: set model.path and the "
                "template of [data] as `segments` had them, or make the table again with `python cli.py segments`"
            )
    return {prompt_id: prompt.token_ids for prompt_id, prompt in ours.items()}
