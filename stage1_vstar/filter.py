"""Which prompts stage 2 trains on: named rules over vstar.parquet, as flags or into a new file, in bounded memory."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.contract import polars_schema
from common.errors import UserError
from common.grading import Outcome
from common.provenance import read_provenance
from common.value import reward_range
from common.vstar_file import VSTAR, scan_vstar, vstar_writer
from stage1_vstar.table import UNSOLVED, with_dropped

INTERVAL_WIDTH = "interval_width"
"""An extra column that rules may use: the width of the 95 % interval of V*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A condition for dropping a prompt, and its name in counts and records. It sees one prompt at a time."""

    name: str
    drops: pl.Expr


@dataclass(slots=True, kw_only=True)
class RuleCount:
    """How many prompts a rule matches, and how many of them no earlier rule matches: those it drops."""

    name: str
    matches: int = 0
    drops: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """The result of `filter_prompts`."""

    path: Path
    prompts: int
    kept: int
    rules: list[RuleCount]

    def lines(self) -> list[str]:
        """One line per rule, and one for the file."""
        return [
            *(f"{rule.name}: {rule.matches:,} prompts, {rule.drops:,} dropped by it" for rule in self.rules),
            f"{self.path}: {self.kept:,} of {self.prompts:,} prompts kept",
        ]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "path": str(self.path)}


def drop_rules(
    *,
    unsolved: bool,
    solved: bool,
    min_pass_rate: float,
    max_pass_rate: float,
    max_interval_width: float = math.inf,
    max_truncated: float = 1.0,
    where: Sequence[str] = (),
) -> list[Rule]:
    """The rules that are switched on, in the order in which they apply. Raises UserError."""
    if not 0 <= min_pass_rate <= max_pass_rate <= 1:
        raise UserError(
            f"the pass-rate range {min_pass_rate:g} to {max_pass_rate:g} is empty or outside 0 to 1; "
            "give --min-pass-rate and --max-pass-rate with 0 ≤ min ≤ max ≤ 1"
        )
    if not max_interval_width >= 0:
        raise UserError(f"--max-interval-width is {max_interval_width:g}; give a width of 0 or more")
    if not 0 <= max_truncated <= 1:
        raise UserError(f"--max-truncated is {max_truncated:g}; give a share from 0 to 1")
    pass_rate = pl.col("pass_rate")
    truncated = pl.col("outcomes").list.count_matches(Outcome.TRUNCATED.value) / pl.col("num_samples")
    rules = {
        UNSOLVED: (unsolved, ~pl.col("pass_at_n")),
        "all correct": (solved, pass_rate == 1),
        f"pass rate below {min_pass_rate:.12g}": (min_pass_rate > 0, pass_rate < min_pass_rate),
        f"pass rate above {max_pass_rate:.12g}": (max_pass_rate < 1, pass_rate > max_pass_rate),
        f"interval of V* wider than {max_interval_width:.12g}": (
            max_interval_width < math.inf,
            pl.col(INTERVAL_WIDTH) > max_interval_width,
        ),
        f"truncated share above {max_truncated:.12g}": (max_truncated < 1, truncated > max_truncated),
        **{f"not where {text}": (True, ~kept_where(text).fill_null(False)) for text in where},
    }
    return [Rule(name=name, drops=drops) for name, (active, drops) in rules.items() if active]


def kept_where(text: str) -> pl.Expr:
    """A condition in SQL on the columns of vstar.parquet and INTERVAL_WIDTH. Raises UserError if it is not valid."""
    advice = 'write a condition on the prompts to keep, such as "pass_rate < 0.9 and length(prompt) < 2000"'
    columns = pl.Schema({**polars_schema(VSTAR), INTERVAL_WIDTH: pl.Float64()})
    try:
        condition = pl.sql_expr(text)
        unknown = sorted(set(condition.meta.root_names()) - set(columns))
        if unknown:
            raise UserError(
                f"--where {text}: there is no column {', '.join(unknown)}; "
                f"the columns are {', '.join(columns)}"
            )
        if not condition.meta.root_names():
            raise UserError(f"--where {text} names no column; {advice}")
        [dtype] = pl.LazyFrame(schema=columns).select(condition).collect_schema().dtypes()
    except pl.exceptions.PolarsError as error:
        raise UserError(f"--where {text}: {str(error).splitlines()[0]}; {advice}") from error
    if dtype != pl.Boolean:
        raise UserError(f"--where {text} gives {dtype}, not true or false; {advice}")
    if not _looks_at_one_prompt(condition):
        raise UserError(f"--where {text} compares prompts with each other; {advice}")
    return condition


def _looks_at_one_prompt(expression: pl.Expr) -> bool:
    """Whether an expression's value for a prompt is independent of the other prompts."""
    kind = next(iter(json.loads(expression.meta.serialize(format="json"))))
    if kind not in ("BinaryExpr", "Cast", "Column", "Element", "Eval", "Function", "Literal", "Ternary"):
        return False
    if kind == "Function":
        try:
            if not expression.meta.is_row_separable():
                return False
        except pl.exceptions.PolarsError:
            pass  # the operators of SQL, which all are row by row, cannot tell without the columns' types
    return all(map(_looks_at_one_prompt, expression.meta.pop()))


def filter_prompts(source: Path, output: Path | None, rules: list[Rule]) -> Filtered:
    """Flag the prompts that no rule drops as kept, or with `output` write just those to a new file.

    A dropped prompt carries the name of the first rule that matches it. Without rules every prompt is kept. Raises
    UserError if no prompt would be left.
    """
    provenance = read_provenance(source)
    names = [rule.name for rule in rules]
    provenance = replace(provenance, context={**provenance.context, "filters": names or ["none"]})
    counts = [RuleCount(name=name) for name in names]
    uses_width = any(INTERVAL_WIDTH in rule.drops.meta.root_names() for rule in rules)
    limits = _reward_limits(source) if uses_width else None
    prompts = kept = 0
    with vstar_writer(output or source, provenance, changed=("keep", "dropped_by")) as write:
        for rows in scan_vstar(source):
            matches = _matches(_with_interval_width(rows, limits) if limits else rows, rules)
            flagged = with_dropped(rows, _first_match(matches))
            drops = dict(flagged["dropped_by"].value_counts().iter_rows())
            for count in counts:
                count.matches += int(matches[count.name].sum())
                count.drops += drops.get(count.name, 0)
            prompts += rows.height
            kept += int(flagged["keep"].sum())
            write(flagged.filter("keep") if output else flagged)
        if not kept:
            raise UserError(f"no prompt of {source} would be left; nothing was changed. Loosen the rules")
    return Filtered(path=output or source, prompts=prompts, kept=kept, rules=counts)


def _reward_limits(source: Path) -> tuple[float, float]:
    """The range of rewards over the whole file, to which the intervals of all its parts refer."""
    parts = scan_vstar(source, ["prompt_id", "rewards"])
    ranges = [reward_range(rows["rewards"].explode().to_numpy()) for rows in parts]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _with_interval_width(rows: pl.DataFrame, limits: tuple[float, float]) -> pl.DataFrame:
    from stage1_vstar.uncertainty import interval

    counts_P = rows["num_samples"].to_numpy().astype(np.int64)
    found = interval(rows["rewards"].explode().to_numpy(), counts_P, rows["beta1"][0], limits=limits)
    return rows.with_columns(pl.Series(INTERVAL_WIDTH, found.high_P - found.low_P))


def _matches(rows: pl.DataFrame, rules: list[Rule]) -> pl.DataFrame:
    """Whether a rule drops a prompt: one row per prompt, one column per rule."""
    try:
        return rows.select(rule.drops.alias(rule.name) for rule in rules)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"the rules cannot be applied: {str(error).splitlines()[0]}; correct --where"
        ) from error


def _first_match(matches: pl.DataFrame) -> pl.Expr:
    """The name of the first rule that drops each prompt; missing if none does."""
    names = [pl.when(pl.lit(matches[name])).then(pl.lit(name)) for name in matches.columns]
    return pl.coalesce(*names, pl.lit(None, pl.String))
