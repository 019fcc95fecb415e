"""Recompute advantages from the values that a table holds: of the critic, or Monte-Carlo. No model, bounded memory."""

import math
from dataclasses import replace
from pathlib import Path

import polars as pl

from common.errors import UserError
from common.segments.advantages import dropped_by, with_advantages
from common.segments.config import known_values
from common.segments.files import ADVANTAGES_TABLE
from stage1_vstar.table import with_dropped

CHANGED = ("values_from", "values", "standard_errors", "advantages", "gap", "keep", "dropped_by")


def rescore_advantages(
    source: Path,
    output: Path,
    values: str | None = None,
    min_gap: float | None = None,
    *,
    setting: str = "--min-gap",
) -> str:
    """Recompute the advantages into `output`, which may be `source`; returns one line on the change.

    `values` and `min_gap` are by default the table's. States are kept by their number of next steps and `min_gap`
    alone: rules of `filter` no longer apply. Raises UserError, and changes nothing, if the critic's values are missing
    or no state would be left; `setting` is the name under which the user gives `min_gap`.
    """
    provenance = ADVANTAGES_TABLE.provenance(source)
    context = {name: value for name, value in provenance.context.items() if name != "filters"}
    old_values, old_gap = context["values"], context["min_gap"]
    values_from = known_values(old_values if values is None else values)
    min_gap = old_gap if min_gap is None else min_gap
    if not 0 <= min_gap < math.inf:
        raise UserError(f"--min-gap is {min_gap:g}; give a number of 0 or more")
    context |= {"values": values_from, "min_gap": min_gap}
    states = before = after = 0
    with ADVANTAGES_TABLE.writer(output, replace(provenance, context=context), changed=CHANGED) as write:
        for rows in ADVANTAGES_TABLE.scan(source):
            if values_from == "critic" and rows.select(pl.col("critic_values").is_null().any()).item():
                raise UserError(
                    f"{source} has no values of a critic; add them with `python cli.py advantages` and "
                    '[advantages] values = "critic"'
                )
            rescored = with_dropped(with_advantages(rows, values_from), dropped_by(min_gap))
            write(rescored)
            states += rows.height
            before += int(rows["keep"].sum())
            after += int(rescored["keep"].sum())
        if not after:
            raise UserError(
                f"no state of {source} would have two next steps and a gap of at least {min_gap:g}; nothing was "
                f"changed. Choose a smaller {setting}"
            )
    line = f"{output}: {states:,} states, values {old_values} → {values_from}, smallest gap {old_gap:g} → {min_gap:g}"
    line += f", kept {before:,} → {after:,}"
    if rules := provenance.context.get("filters"):
        line += f"; the rules of the last filter ({', '.join(rules)}) no longer apply"
    return line
