"""What a table promises: a schema and named invariants, checked by one writer and one reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import UserError
from common.files import atomic_path
from common.provenance import Provenance


def validate(frame: pl.DataFrame, schema: pa.Schema, invariants: dict[str, pl.Expr], path: Path) -> None:
    """Raise UserError, naming the first broken row and rule, unless the frame is what the schema promises."""
    refuse_other_table(frame.schema, frame.height, schema, path)
    check = Check(schema, invariants, path)
    check.add(frame)
    check.conclude()


def refuse_other_table(columns: pl.Schema, rows: int, schema: pa.Schema, path: Path) -> None:
    if missing := [name for name in schema.names if name not in columns]:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}; make it anew with `python cli.py vstar`"
        )
    for name, expected in polars_schema(schema).items():
        if columns[name] != expected:
            raise UserError(
                f"{path}: column {name} holds {columns[name]}, not {expected}; "
                "make it anew with `python cli.py vstar`"
            )
    if not rows:
        raise UserError(f"{path} has no rows; make it anew with `python cli.py vstar`")


class Check:
    """Which rows of a table break which rule; the table may come in parts, and `conclude` says what was found."""

    def __init__(
        self,
        schema: pa.Schema,
        invariants: dict[str, pl.Expr],
        path: Path,
        applies: Callable[[set[str]], bool] = lambda columns: True,
    ) -> None:
        """`applies` chooses rules by the columns that they speak of."""
        present = {
            f"{field.name} is present": pl.col(field.name).is_not_null()
            for field in schema
            if not field.nullable
        }
        self._rules = {
            name: rule.fill_null(False).alias(name)
            for name, rule in {**present, **invariants}.items()
            if applies(set(rule.meta.root_names()))
        }
        self._path = path
        self._broken: dict[str, tuple[int, dict[str, Any]]] = {}

    def add(self, part: pl.DataFrame) -> bool:
        """Whether all these rows satisfy all rules; those that do not are counted."""
        held = part.select(rule.all() for rule in self._rules.values()).row(0, named=True)
        for name in (name for name, holds in held.items() if not holds):
            rule = self._rules[name]
            broken = part.filter(~rule)
            shown = ["prompt_id", *sorted(set(rule.meta.root_names()) - {"prompt_id"})]
            count, first = self._broken.get(name, (0, broken.select(shown).row(0, named=True)))
            self._broken[name] = (count + broken.height, first)
        return all(held.values())

    def conclude(self) -> None:
        """Raise UserError with the first rule that was broken, how often, and the first row that broke it."""
        for name in self._rules:
            if name in self._broken:
                count, row = self._broken[name]
                raise UserError(f"{self._path}: {count} rows break the rule “{name}”, the first is {row}")


def polars_schema(schema: pa.Schema) -> pl.Schema:
    """The same columns as polars names them."""
    return pl.DataFrame(schema.empty_table()).schema


def write_table(frame: pl.DataFrame, schema: pa.Schema, provenance: Provenance, path: Path) -> None:
    """Write a frame's columns of this schema atomically, with its provenance."""
    table = frame.select(schema.names).to_arrow().cast(schema)
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(provenance.metadata()), temporary, compression="zstd")
