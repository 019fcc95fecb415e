"""Describe a table of advantages: for the terminal, and as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from common.provenance import ACCEPTED
from common.remote.places import shown
from common.segments.advantages import ADVANTAGE_ERROR, with_advantage_error
from common.segments.files import ADVANTAGES_TABLE
from common.terminal.console import Terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantagesDescription:
    """The figures of a table, in the order of its JSON."""

    path: str
    prompts: int
    states: int
    kept: int
    steps: int
    """Different next steps of all states."""
    kept_steps: int
    ending: int
    """Next steps that end a solution."""
    dropped_by: dict[str, int]
    values_from: str
    has_critic_values: bool
    gap: dict[str, float]
    """Its mean and quartiles."""
    mean_advantage_error: float
    identity: dict[str, Any]
    context: dict[str, Any]


def describe_advantages(path: Path) -> AdvantagesDescription:
    """The figures that `show` prints. Raises UserError if the file breaks the contract."""
    provenance = ADVANTAGES_TABLE.provenance(path)
    steps = pl.col("values").list.len().alias("steps")
    rows = pl.concat(
        with_advantage_error(part).select(
            "prompt_id",
            "values_from",
            "gap",
            "keep",
            "dropped_by",
            ADVANTAGE_ERROR,
            steps,
            pl.col("action_ends").list.sum().alias("ending"),
            pl.col("critic_values").is_not_null().alias("has_critic"),
        )
        for part in ADVANTAGES_TABLE.scan(path)
    )
    gap = rows["gap"]
    quartiles = {name: gap.quantile(share) for name, share in (("25 %", 0.25), ("50 %", 0.5), ("75 %", 0.75))}
    return AdvantagesDescription(
        path=shown(str(path)),
        prompts=rows["prompt_id"].n_unique(),
        states=rows.height,
        kept=int(rows["keep"].sum()),
        steps=int(rows["steps"].sum()),
        kept_steps=int(rows.filter("keep")["steps"].sum()),
        ending=int(rows["ending"].sum()),
        dropped_by=dict(rows["dropped_by"].drop_nulls().value_counts(sort=True).iter_rows()),
        values_from=rows["values_from"][0],
        has_critic_values=bool(rows["has_critic"].all()),
        gap={"mean": rows.select(pl.col("gap").mean()).item(), **quartiles},  # type: ignore[dict-item]
        mean_advantage_error=rows.select(pl.col(ADVANTAGE_ERROR).mean()).item(),
        identity=provenance.identity,
        context=provenance.context,
    )


def to_json(figures: AdvantagesDescription) -> str:
    """The figures as JSON."""
    return json.dumps(asdict(figures), indent=2, ensure_ascii=False, allow_nan=False)


def show(figures: AdvantagesDescription, console: Terminal) -> None:
    """Print the figures."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    context, identity = figures.context, figures.identity
    rows = {
        "file": figures.path,
        "states": f"{figures.states:,} of {figures.prompts:,} prompts, of which {figures.kept:,} kept for training",
        "next steps": f"{figures.steps:,}, of which {figures.kept_steps:,} of kept states; {figures.ending:,} end a "
        "solution",
        "dropped by": ", ".join(f"{name} {count:,}" for name, count in figures.dropped_by.items()) or "none",
        "filters": ", ".join(context.get("filters", [])) or "none",
        "values": figures.values_from
        + ("" if figures.has_critic_values else ", the table has none of a critic"),
        "gap": ", ".join(f"{name} {value:.4f}" for name, value in figures.gap.items()),
        "standard error": f"{figures.mean_advantage_error:.4f} on average, of a state's least certain "
        "Monte-Carlo advantage",
        "model": f"{context.get('model_path', 'unknown')} (weights {identity['model']['weights'][:12]})",
        "prompt template": repr(identity["prompt"]["template"]),
        "accepted mismatches": "; ".join(context.get(ACCEPTED, [])) or "none",
        "commit": context.get("commit") or "unknown",
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
