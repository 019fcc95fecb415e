"""Which states training uses: named rules over advantages.parquet."""

import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from common.contract import polars_schema
from common.errors import UserError
from common.segments.advantages import ADVANTAGE_ERROR, ONE_STEP, gap_rule, is_below, with_advantage_error
from common.segments.files import ADVANTAGES, ADVANTAGES_TABLE
from stage1_vstar.filter import FLAGS, Filtered, Rows, Rule, filter_rows, filtered_by, rules_where

STATES = Rows(
    noun="states",
    columns=pl.Schema({**polars_schema(ADVANTAGES), ADVANTAGE_ERROR: pl.Float64()}),
    example=f"step > 0 and gap > 2 * {ADVANTAGE_ERROR}",
)


def state_rules(*, min_gap: float, max_error: float | None = None, where: Sequence[str] = ()) -> list[Rule]:
    """The rules in the order in which they apply; states with one next step are always dropped. Raises UserError."""
    if not 0 <= min_gap < math.inf:
        raise UserError(f"--min-gap is {min_gap:g}; give a number of 0 or more")
    max_error = math.inf if max_error is None else max_error
    if not max_error >= 0:
        raise UserError(f"--max-error is {max_error:g}; give a number of 0 or more")
    rules = {
        ONE_STEP: (True, pl.col("values").list.len() < 2),
        gap_rule(min_gap): (min_gap > 0, is_below(min_gap)),
        f"standard error of an advantage above {max_error:.12g}": (
            max_error < math.inf,
            pl.col(ADVANTAGE_ERROR) > max_error,
        ),
    }
    return [
        *(Rule(name=name, drops=drops) for name, (active, drops) in rules.items() if active),
        *rules_where(where, STATES),
    ]


def filter_states(
    source: Path,
    output: Path | None,
    *,
    min_gap: float | None = None,
    max_error: float | None = None,
    where: Sequence[str] = (),
) -> Filtered:
    """Flag the states of advantages.parquet that no rule drops as kept, see `filter_rows`.

    `min_gap` is by default the one that the table was made with.
    """
    provenance = ADVANTAGES_TABLE.provenance(source)
    if min_gap is None:
        min_gap = float(provenance.context["min_gap"])
    rules = state_rules(min_gap=min_gap, max_error=max_error, where=where)
    return filter_rows(
        ADVANTAGES_TABLE.scan(source),
        ADVANTAGES_TABLE.writer(output or source, filtered_by(rules, provenance), changed=FLAGS),
        rules,
        source=source,
        output=output,
        noun=STATES.noun,
        seen_by_rules=with_advantage_error,
    )
