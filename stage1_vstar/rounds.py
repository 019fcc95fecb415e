"""An adaptive run's rounds on its store: follows the rule of adaptive.py, and draws the samples that it calls for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from common.config import RunConfig
from common.errors import UserError
from common.provenance import Provenance
from common.rollout import Prompt
from common.sampling.missing import Missing
from common.store import SampleStore
from common.value import Floats
from stage1_vstar.adaptive import ADAPTIVE, WAYS, Allocation, Counts, Places, Round, Rule, Z, allocate
from stage1_vstar.table import prompt_table


def draw_adaptively(
    rule: Rule,
    prompts: Sequence[Prompt],
    store: SampleStore,
    draw: Callable[[Missing], None],
    config: RunConfig,
    console: Console,
) -> tuple[pl.DataFrame, Allocation]:
    """Draw more samples of the prompts whose interval of V* is wide, once all have their first ones.

    Returns the grades of the samples that count, of all prompts, and how many they are.
    """
    num_samples = config.vstar.num_samples
    grades = store.grades(prompt_table(prompts), num_samples)
    found = grades.group_by("prompt_id").len()
    complete = found.filter(pl.col("len") == num_samples)["prompt_id"]
    by_id = {prompt.id: prompt for prompt in prompts}
    # Equally wide prompts come in the order of their content hash, whatever order the data has.
    chosen = [by_id[name] for name in sorted(complete)]
    table = prompt_table(chosen)

    def first(places_W: Places, sizes_W: Counts) -> Floats:
        wanted = table[places_W].with_columns(size=pl.Series(sizes_W))
        most = int(sizes_W.max())
        missing_WN = ~store.present(wanted, most) & (np.arange(most) < sizes_W[:, None])
        draw(Missing([chosen[place] for place in places_W], missing_WN))
        rewards = first_grades(store, wanted)["reward"]
        if len(rewards) != sizes_W.sum():
            raise UserError(
                f"{sizes_W.sum() - len(rewards):,} samples cannot be drawn: the grader of this run cannot use the "
                "reference answers of prompts that another grader has graded; leave out --adaptive or choose another "
                "--run"
            )
        return rewards.to_numpy()

    def announce(number: int, each: Round) -> None:
        which = (
            f"{each.prompts:,} prompts"
            if number == 0
            else f"{each.wide:,} of {len(chosen):,} intervals of V* wider than ±{rule.half_width:.3g}; "
            f"{each.prompts:,} prompts"
        )
        console.print(
            f"round {number}: {which} get {each.samples:,} samples, budget left {each.left:,}", soft_wrap=True
        )

    allocation = allocate(rule, num_samples, config.vstar.beta1, first, len(chosen), announce)
    console.print(
        f"{allocation.sizes_P.sum():,} samples, {allocation.sizes_P.min()} to {allocation.sizes_P.max()} a prompt; "
        + (
            f"the budget is used up, {allocation.still_wide:,} intervals are still wide"
            if allocation.still_wide
            else "no interval is wide"
        ),
        soft_wrap=True,
    )
    others = grades.filter(~pl.col("prompt_id").is_in(complete.implode()))
    counted = first_grades(store, table.with_columns(size=pl.Series(allocation.sizes_P)))
    return pl.concat([counted, others]), allocation


def first_grades(store: SampleStore, table: pl.DataFrame) -> pl.DataFrame:
    """The grades of each prompt's first samples, as many as its `size`, in the order of the table and the samples."""
    grades = store.grades(table, int(table["size"].max()))  # type: ignore[arg-type]
    return (
        table.select("prompt_id", "size")
        .join(grades.sort("sample_index"), on="prompt_id", maintain_order="left_right")
        .filter(pl.col("sample_index") < pl.col("size"))
        .select(grades.columns)
    )


def recorded_rule(old: Provenance, path: Path, config: RunConfig, console: Console) -> Rule | None:
    """The rule that the existing file was drawn by: it stays in force."""
    if (record := old.context.get(ADAPTIVE)) is None:
        return None
    rule = Rule(target_se=record["target_se"], budget=record["budget"])
    console.print(
        f"{path} was made with --adaptive {rule.target_se:g} --budget {rule.budget}, which stays in force; "
        f"move it away for {config.vstar.num_samples} samples of each prompt",
        soft_wrap=True,
    )
    return rule


def bias_line(bias: dict[str, Any]) -> str:
    """What adaptive stopping does to V̂*, in a line."""
    ways = (
        f"{way} {bias[way]['bias']:+.4f} ± {Z * bias[way]['bias_se']:.4f} (RMSE {bias[way]['rmse']:.4f})"
        for way in WAYS
    )
    return f"bias of V̂* by simulation: {', '.join(ways)}"
