"""The rounds of an adaptive run: follow the rule of adaptive.py, and draw the samples that it calls for.

Shapes: _P prompt, _W wide prompt, _N sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.config import RunConfig
from common.errors import UserError
from common.provenance import Provenance
from common.rollout import Prompt
from common.sampling.missing import Missing, prompt_table
from common.store import SampleStore
from common.terminal.console import Terminal
from common.value import Floats
from stage1_vstar.adaptive import ADAPTIVE, Allocation, Counts, Places, Round, Rule, allocate


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSamples:
    """Each prompt's first samples: reads them from the store, and draws those that are missing."""

    prompts: Sequence[Prompt]
    table: pl.DataFrame
    """`prompt_table` of the prompts."""
    store: SampleStore
    draw: Callable[[Missing], None]

    def rewards(self, places_W: Places, sizes_W: Counts) -> Floats:
        """The rewards of the first sizes_W samples of the prompts at places_W, prompt after prompt."""
        wanted, most = self.sized(sizes_W, places_W), int(sizes_W.max())
        missing_WN = ~self.store.present(wanted, most) & (np.arange(most) < sizes_W[:, None])
        self.draw(Missing([self.prompts[place] for place in places_W], missing_WN))
        rewards = first_grades(self.store, wanted)["reward"]
        if len(rewards) != sizes_W.sum():
            raise UserError(
                f"{sizes_W.sum() - len(rewards):,} samples cannot be drawn: the grader of this run cannot use the "
                "reference answers of prompts that another grader has graded; leave out --adaptive or choose another "
                "--run"
            )
        return rewards.to_numpy()

    def grades(self, sizes_P: Counts) -> pl.DataFrame:
        """The grades of the first sizes_P samples of all prompts."""
        return first_grades(self.store, self.sized(sizes_P, np.arange(len(self.prompts))))

    def sized(self, sizes_W: Counts, places_W: Places) -> pl.DataFrame:
        return self.table[places_W].with_columns(size=pl.Series(sizes_W))


def draw_adaptively(
    rule: Rule,
    prompts: Sequence[Prompt],
    store: SampleStore,
    draw: Callable[[Missing], None],
    config: RunConfig,
    console: Terminal,
) -> tuple[pl.DataFrame, Allocation]:
    """Draw more samples of the prompts whose interval of V* is wide, after all have their first ones.

    Returns the grades of the samples that count, of all prompts, and their number.
    """
    num_samples = config.vstar.num_samples
    grades = store.grades(prompt_table(prompts), num_samples)
    found = grades.group_by("prompt_id").len()
    complete = found.filter(pl.col("len") == num_samples)["prompt_id"]
    by_id = {prompt.id: prompt for prompt in prompts}
    # Equally wide prompts come in the order of their content hash, whatever order the data has.
    chosen = [by_id[name] for name in sorted(complete)]
    samples = FirstSamples(prompts=chosen, table=prompt_table(chosen), store=store, draw=draw)

    def announce(number: int, each: Round) -> None:
        console.print(round_line(number, each, rule, len(chosen)))

    allocation = allocate(rule, num_samples, config.vstar.beta1, samples.rewards, len(chosen), announce)
    console.print(end_line(allocation))
    others = grades.filter(~pl.col("prompt_id").is_in(complete.implode()))
    return pl.concat([samples.grades(allocation.sizes_P), others]), allocation


def round_line(number: int, each: Round, rule: Rule, num_prompts: int) -> str:
    """One line on what a round will draw."""
    which = (
        ""
        if number == 0
        else f"{each.wide:,} of {num_prompts:,} intervals of V* wider than ±{rule.half_width:.3g}; "
    )
    return f"round {number}: {which}{each.prompts:,} prompts get {each.samples:,} samples, budget left {each.left:,}"


def end_line(allocation: Allocation) -> str:
    """One line on what all rounds have drawn."""
    sizes_P = allocation.sizes_P
    return f"{sizes_P.sum():,} samples, {sizes_P.min()} to {sizes_P.max()} per prompt; " + (
        f"the budget is used up, {allocation.still_wide:,} intervals are still wide"
        if allocation.still_wide
        else "no interval is wide"
    )


def first_grades(store: SampleStore, table: pl.DataFrame) -> pl.DataFrame:
    """The grades of each prompt's first samples, as many as its `size`, in the order of the table and the samples."""
    grades = store.grades(table, int(table["size"].max()))  # type: ignore[arg-type]
    return (
        table.select("prompt_id", "size")
        .join(grades.sort("sample_index"), on="prompt_id", maintain_order="left_right")
        .filter(pl.col("sample_index") < pl.col("size"))
        .select(grades.columns)
    )


def recorded_rule(old: Provenance, path: Path, config: RunConfig, console: Terminal) -> Rule | None:
    """The rule by which the existing file was drawn; it stays in force."""
    if (record := old.context.get(ADAPTIVE)) is None:
        return None
    rule = Rule(target_se=record["target_se"], budget=record["budget"])
    console.print(
        f"{path} was made with --adaptive {rule.target_se:g} --budget {rule.budget}, which stays in force; "
        f"move it away for {config.vstar.num_samples} samples of each prompt",
    )
    return rule
