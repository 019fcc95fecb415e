"""Which prompts stage 2 trains on: named rules over vstar.parquet, as flags or into a new file."""

from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from common.errors import UserError
from common.schema import read_vstar, write_vstar
from stage1_vstar.table import with_keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What to drop, and the name under which it is counted and recorded."""

    name: str
    drops: pl.Expr


def drop_rules(*, unsolved: bool, solved: bool, min_pass_rate: float, max_pass_rate: float) -> list[Rule]:
    """The rules that are switched on. Raises UserError if the range is empty."""
    if not 0 <= min_pass_rate <= max_pass_rate <= 1:
        raise UserError(
            f"the pass-rate range {min_pass_rate:g} to {max_pass_rate:g} is empty or outside 0 to 1; "
            "give --min-pass-rate and --max-pass-rate with 0 ≤ min ≤ max ≤ 1"
        )
    pass_rate = pl.col("pass_rate")
    rules = {
        "pass@N = 0": (unsolved, ~pl.col("pass_at_n")),
        "all correct": (solved, pass_rate == 1),
        f"pass rate below {min_pass_rate:g}": (min_pass_rate > 0, pass_rate < min_pass_rate),
        f"pass rate above {max_pass_rate:g}": (max_pass_rate < 1, pass_rate > max_pass_rate),
    }
    return [Rule(name=name, drops=drops) for name, (active, drops) in rules.items() if active]


def filter_prompts(source: Path, output: Path | None, rules: list[Rule]) -> list[str]:
    """Flag the prompts that no rule drops as kept, or with `output` write just those to a new file.

    Without rules every prompt is kept. Raises UserError if no prompt would be left. Returns a line a rule.
    """
    rows, provenance = read_vstar(source)
    drops = [rule.drops for rule in rules]
    flagged = with_keep(rows, ~pl.any_horizontal(drops) if drops else pl.lit(True))
    if not flagged["keep"].any():
        raise UserError(f"no prompt of {source} would be left; nothing was changed. Loosen the rules")
    provenance = replace(
        provenance, context={**provenance.context, "filters": [rule.name for rule in rules] or ["none"]}
    )
    write_vstar(flagged.filter("keep") if output else flagged, provenance, output or source)
    lines = [f"{rule.name}: {rows.filter(rule.drops).height:,} prompts" for rule in rules]
    return [*lines, f"{output or source}: {flagged['keep'].sum():,} of {rows.height:,} prompts kept"]
