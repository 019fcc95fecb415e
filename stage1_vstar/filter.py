"""Which rows of a table stage 2 trains on: named rules, as flags or into a new file, in bounded memory.

The rows are the prompts of vstar.parquet, or the states of advantages.parquet.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.contract import polars_schema
from common.errors import UserError
from common.grading import Outcome
from common.provenance import Provenance, read_provenance
from common.value import reward_range
from common.vstar_file import VSTAR, scan_vstar, vstar_writer
from stage1_vstar.table import UNSOLVED, with_dropped

INTERVAL_WIDTH = "interval_width"
"""An extra column that rules may use: the width of the 95 % interval of V*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A condition for dropping a row, and its name in counts and records. It sees one row at a time."""

    name: str
    drops: pl.Expr


@dataclass(slots=True, kw_only=True)
class RuleCount:
    """How many rows a rule matches, and how many of them no earlier rule matches: those it drops."""

    name: str
    matches: int = 0
    drops: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """The result of a filter."""

    path: Path
    noun: str
    """What the rows are."""
    rows: int
    kept: int
    rules: list[RuleCount]

    def lines(self) -> list[str]:
        """One line per rule, and one for the file."""
        return [
            *(
                f"{rule.name}: {rule.matches:,} {self.noun}, {rule.drops:,} dropped by it"
                for rule in self.rules
            ),
            f"{self.path}: {self.kept:,} of {self.rows:,} {self.noun} kept",
        ]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        rules = [asdict(rule) for rule in self.rules]
        return {"path": str(self.path), self.noun: self.rows, "kept": self.kept, "rules": rules}


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
    }
    active_rules = [Rule(name=name, drops=drops) for name, (active, drops) in rules.items() if active]
    return [*active_rules, *rules_where(where)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the conditions of a table may use, and how to talk about its rows."""

    noun: str
    columns: pl.Schema
    example: str


PROMPTS = Rows(
    noun="prompts",
    columns=pl.Schema({**polars_schema(VSTAR), INTERVAL_WIDTH: pl.Float64()}),
    example="pass_rate < 0.9 and length(prompt) < 2000",
)


def rules_where(where: Sequence[str], about: Rows = PROMPTS) -> list[Rule]:
    """The rules that drop rows that do not fulfil these conditions. Raises UserError."""
    return [Rule(name=f"not where {text}", drops=~kept_where(text, about).fill_null(False)) for text in where]


def kept_where(text: str, about: Rows = PROMPTS) -> pl.Expr:
    """A condition in SQL on a table's columns. Raises UserError if it is not valid."""
    columns, noun = about.columns, about.noun
    advice = f'write a condition on the {noun} to keep, such as "{about.example}"'
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
    if not _looks_at_one_row(condition):
        raise UserError(f"--where {text} compares {noun} with each other; {advice}")
    return condition


def _looks_at_one_row(expression: pl.Expr) -> bool:
    """Whether an expression's value for a row is independent of the other rows."""
    kind = next(iter(json.loads(expression.meta.serialize(format="json"))))
    if kind not in ("BinaryExpr", "Cast", "Column", "Element", "Eval", "Function", "Literal", "Ternary"):
        return False
    if kind == "Function":
        try:
            if not expression.meta.is_row_separable():
                return False
        except pl.exceptions.PolarsError:
            pass  # the operators of SQL, which all are row by row, cannot tell without the columns' types
    return all(map(_looks_at_one_row, expression.meta.pop()))


def filter_prompts(source: Path, output: Path | None, rules: list[Rule]) -> Filtered:
    """Flag the prompts of vstar.parquet that no rule drops as kept, see `filter_rows`."""
    provenance = filtered_by(rules, read_provenance(source))
    uses_width = any(INTERVAL_WIDTH in rule.drops.meta.root_names() for rule in rules)
    limits = _reward_limits(source) if uses_width else None
    return filter_rows(
        scan_vstar(source),
        vstar_writer(output or source, provenance, changed=FLAGS),
        rules,
        source=source,
        output=output,
        noun=PROMPTS.noun,
        seen_by_rules=lambda rows: _with_interval_width(rows, limits) if limits else rows,
    )


FLAGS = ("keep", "dropped_by")
"""The columns that a filter changes."""


def filtered_by(rules: Sequence[Rule], provenance: Provenance) -> Provenance:
    """The provenance of a filtered table."""
    names = [rule.name for rule in rules]
    return replace(provenance, context={**provenance.context, "filters": names or ["none"]})


def filter_rows(
    parts: Iterable[pl.DataFrame],
    writer: AbstractContextManager[Callable[[pl.DataFrame], None]],
    rules: Sequence[Rule],
    *,
    source: Path,
    output: Path | None,
    noun: str,
    seen_by_rules: Callable[[pl.DataFrame], pl.DataFrame],
) -> Filtered:
    """Flag the rows that no rule drops as kept, or with `output` write just those to a new file.

    A dropped row carries the name of the first rule that matches it. Without rules every row is kept. Raises UserError
    if none would be left.
    """
    counts = [RuleCount(name=rule.name) for rule in rules]
    total = kept = 0
    with writer as write:
        for rows in parts:
            matches = _matches(seen_by_rules(rows), rules)
            flagged = with_dropped(rows, _first_match(matches))
            drops = dict(flagged["dropped_by"].value_counts().iter_rows())
            for count in counts:
                count.matches += int(matches[count.name].sum())
                count.drops += drops.get(count.name, 0)
            total += rows.height
            kept += int(flagged["keep"].sum())
            write(flagged.filter("keep") if output else flagged)
        if not kept:
            raise UserError(
                f"no {noun.removesuffix('s')} of {source} would be left; nothing was changed. Loosen the rules"
            )
    return Filtered(path=output or source, noun=noun, rows=total, kept=kept, rules=counts)


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


def _matches(rows: pl.DataFrame, rules: Sequence[Rule]) -> pl.DataFrame:
    """Whether a rule drops a row: one column per rule."""
    try:
        return rows.select(rule.drops.alias(rule.name) for rule in rules)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"the rules cannot be applied: {str(error).splitlines()[0]}; correct --where"
        ) from error


def _first_match(matches: pl.DataFrame) -> pl.Expr:
    """The name of the first rule that drops each row; missing if none does."""
    names = [pl.when(pl.lit(matches[name])).then(pl.lit(name)) for name in matches.columns]
    return pl.coalesce(*names, pl.lit(None, pl.String))
