"""The contract of one kind of table: a schema, named rules and a format version, checked by one writer and one reader.

Each kind of Parquet file of this project has one Contract. Rows that break it are neither written nor returned: the
error names the rule, the number of rows that break it and the first of them.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DamagedFile, UserError
from common.files import atomic_path
from common.overlap import ahead, behind
from common.provenance import Migrations, Provenance, read_provenance

BATCH_ROWS = 65_536
"""Rows in memory at a time when a table is streamed, and rows per written row group."""

_DICTIONARY_BYTES = 1 << 17
"""Bytes of a row group's distinct values at which a column is written without a dictionary: ids and prompts."""

_VIEWS = pl.CompatLevel.newest()
"""The text type that polars exports without copying."""

_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
"""The errors of reading a damaged file."""


@dataclass(frozen=True, slots=True)
class Unique:
    """The rule that no two rows of a table agree in all of these columns. They name a row in error messages."""

    columns: Sequence[str]

    @property
    def key(self) -> pl.Expr:
        return pl.col(self.columns[0]) if len(self.columns) == 1 else pl.struct(self.columns)


@dataclass(frozen=True, slots=True)
class Constant:
    """The rule that every row of a table has the same value in this column."""

    column: str


Rule = pl.Expr | Unique | Constant
"""An expression holds for each row by itself; the other two are about the rows of a table together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """One kind of table. Columns that a file's version lacks are read as missing values."""

    schema: pa.Schema
    invariants: Mapping[str, Rule]
    """The rules, by the claim that each makes. The first broken one is reported."""
    version: int
    """The format version that is written into each file; newer files are not read."""
    migrations: Migrations
    """Migrations from each older version to the next."""
    remedy: str
    """The command that makes such a file again."""
    may_be_empty: bool = False

    def __post_init__(self) -> None:
        assert sorted(self.migrations) == list(range(1, self.version)), "every older version can be read"

    def validate(self, frame: pl.DataFrame, path: Path) -> None:
        """Raise UserError, naming the first broken rule and row, unless the frame fulfils the contract of `path`."""
        self._refuse_other_table(frame.schema, frame.height, path)
        check = _Check(self._rules(), self._key(), path)
        check.add(frame)
        check.conclude()

    def write(self, frame: pl.DataFrame, provenance: Provenance, path: Path) -> None:
        """Write a file atomically, if every row satisfies every rule."""
        self.validate(frame, path)
        with self._new_file(path, provenance) as add:
            for rows in frame.iter_slices(BATCH_ROWS):
                add(rows)

    def read(self, path: Path) -> tuple[pl.DataFrame, Provenance]:
        """Read a file of any format version and check every rule.

        Raises DamagedFile if it cannot be read, UserError naming a broken rule and row.
        """
        provenance = self.provenance(path)
        try:
            frame = self._with_later_columns(pl.read_parquet(path, glob=False))
        except _UNREADABLE as error:
            raise self._damaged(path, error) from error
        self.validate(frame, path)
        return frame.select(self.schema.names), provenance

    def scan(self, path: Path, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """The rows of a file as `read` gives them, BATCH_ROWS at a time, in bounded memory.

        With `columns`, other columns are not read, and rules that use them are not checked. Rows that break a rule are
        not yielded; the error is raised at the end, when they are counted. Raises the errors of `read`.
        """
        columns = self.schema.names if columns is None else columns
        self.provenance(path)
        with path.open("rb") as file:
            metadata = pq.read_metadata(file)
            table = self._with_later_columns(pl.DataFrame(metadata.schema.to_arrow_schema().empty_table()))
            self._refuse_other_table(table.schema, metadata.num_rows, path)
            rules = {name: rule for name, rule in self._rules().items() if _columns(rule) <= set(columns)}
            repeated = {
                name: self._repeated(file, metadata.num_rows, path, rule)
                for name, rule in rules.items()
                if isinstance(rule, Unique)
            }
            check = _Check(rules, self._key(), path, repeated)
            with closing(self._parts(file, path, columns)) as parts:
                for rows in parts:
                    if check.add(rows):
                        yield rows
            check.conclude()

    @contextmanager
    def writer(
        self, path: Path, provenance: Provenance, *, changed: Collection[str] | None = None
    ) -> Iterator[Callable[[pl.DataFrame], None]]:
        """Write a file in parts, atomically: it appears when the context ends without an error.

        Yields the function that writes a part. With `changed`, parts are rows of `scan` that differ only in these
        columns; only the rules that use them are checked, since all others have been. Uniqueness of rows is checked
        within each part. `path` may be the file that is being scanned.
        """
        about = set(self.schema.names if changed is None else changed)
        rules = {name: rule for name, rule in self._rules().items() if _columns(rule) & about}
        check = _Check(rules, self._key(), path)
        with self._new_file(path, provenance) as add:

            def write(rows: pl.DataFrame) -> None:
                if not rows.is_empty():
                    check.add(rows)
                    add(rows)

            yield write
            check.conclude()

    @contextmanager
    def _new_file(self, path: Path, provenance: Provenance) -> Iterator[Callable[[pl.DataFrame], None]]:
        """Yields a function that adds a row group; a thread writes it. The file appears when the context ends well."""
        schema = pa.schema([field.with_type(_exported(field.type)) for field in self.schema])
        # Readers take the Parquet columns' types. Bounds of texts and lists help none, and cost a tenth of the time.
        numbers = [field.name for field in schema if pa.types.is_primitive(field.type)]
        with (
            atomic_path(path) as temporary,
            pq.ParquetWriter(
                temporary,
                schema,
                compression="zstd",
                store_schema=False,
                write_statistics=numbers,
                dictionary_pagesize_limit=_DICTIONARY_BYTES,
            ) as writer,
            behind(writer.write_table) as write,
        ):
            writer.add_key_value_metadata(provenance.metadata(self.version))
            yield lambda rows: write(
                rows.select(self.schema.names).to_arrow(compat_level=_VIEWS).cast(schema)
            )

    def stamped(self, provenance: Provenance) -> pa.Schema:
        """The schema of a new file, with its provenance as metadata."""
        return self.schema.with_metadata(provenance.metadata(self.version))

    def provenance(self, path: Path) -> Provenance:
        """The provenance of a file, see `read_provenance`. Raises UserError for a table of another kind."""
        needed = [field.name for field in self.schema if not field.nullable]
        return read_provenance(path, self.version, self.migrations, self.remedy, needed)

    def _rules(self) -> dict[str, Rule]:
        present = {
            f"{field.name} is present": pl.col(field.name).is_not_null()
            for field in self.schema
            if not field.nullable
        }
        return {**present, **self.invariants}

    def _key(self) -> list[str]:
        """The columns that tell rows apart."""
        return [
            name for rule in self.invariants.values() if isinstance(rule, Unique) for name in rule.columns
        ]

    def _refuse_other_table(self, columns: pl.Schema, rows: int, path: Path) -> None:
        advice = f"make it again with `{self.remedy}`"
        if missing := [name for name in self.schema.names if name not in columns]:
            raise UserError(f"{path} lacks the columns {', '.join(missing)}; {advice}")
        for name, expected in polars_schema(self.schema).items():
            if columns[name] != expected:
                raise UserError(f"{path}: column {name} holds {columns[name]}, not {expected}; {advice}")
        if not rows and not self.may_be_empty:
            raise UserError(f"{path} has no rows; {advice}")

    def _with_later_columns(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The frame, completed by missing values for the columns that its format version lacks."""
        types = polars_schema(self.schema)
        return frame.with_columns(
            pl.lit(None, types[field.name]).alias(field.name)
            for field in self.schema
            if field.nullable and field.name not in frame.columns
        )

    def _damaged(self, path: Path, error: Exception) -> DamagedFile:
        return DamagedFile(
            f"cannot read {path}: {str(error).splitlines()[0]}; remove it and make it again with `{self.remedy}`"
        )

    def _parts(self, file: BinaryIO, path: Path, columns: Sequence[str]) -> Generator[pl.DataFrame]:
        """These columns of an open file, BATCH_ROWS at a time; while one part is in use, the next is read."""
        metadata = pq.read_metadata(file)
        file.seek(0)  # polars takes what follows
        names = metadata.schema.to_arrow_schema().names
        table = pl.scan_parquet(file, glob=False).select(name for name in columns if name in names)
        starts = range(0, metadata.num_rows, BATCH_ROWS)
        with closing(ahead(table.slice(start, BATCH_ROWS).collect() for start in starts)) as parts:
            try:
                for part in parts:
                    yield self._with_later_columns(part).select(columns)
            except _UNREADABLE as error:
                raise self._damaged(path, error) from error

    def _repeated(self, file: BinaryIO, height: int, path: Path, rule: Unique) -> pl.Series:
        """The keys that appear more than once. Holds an 8-byte hash per row; keys with equal hashes are compared."""

        def keys() -> Iterator[pl.Series]:
            return (part.select(rule.key).to_series() for part in self._parts(file, path, rule.columns))

        hashes = np.empty(height, dtype=np.uint64)
        filled = 0
        for part in keys():
            hashes[filled : filled + len(part)] = part.hash().to_numpy()
            filled += len(part)
        hashes.sort()
        twice = pl.Series(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
        if twice.is_empty():
            return pl.DataFrame(schema=polars_schema(self.schema)).select(rule.key).to_series()
        suspects = pl.concat([part.filter(part.hash().is_in(twice.implode())) for part in keys()])
        return suspects.filter(suspects.is_duplicated()).unique()


class _Check:
    """Counts the rows of a table that break each rule; the table may come in parts. `conclude` raises the error."""

    def __init__(
        self,
        rules: Mapping[str, Rule],
        key: Sequence[str],
        path: Path,
        repeated: Mapping[str, pl.Series] | None = None,
    ) -> None:
        """`repeated` has, by rule, the keys that appear more than once in the table; without it parts are checked."""
        self._rules = rules
        self._key = key
        self._path = path
        self._repeated = repeated or {}
        self._bound: dict[str, pl.Expr] = {}
        self._broken: dict[str, tuple[int, dict[str, Any]]] = {}

    def add(self, part: pl.DataFrame) -> bool:
        """Whether all these rows satisfy all rules; rows that do not are counted."""
        if part.is_empty():
            return True
        if not self._bound:
            self._bound = {
                name: self._expression(name, rule, part).fill_null(False).alias(name)
                for name, rule in self._rules.items()
            }
        held = (
            part.select(rule.all() for rule in self._bound.values()).row(0, named=True) if self._bound else {}
        )
        for name in (name for name, holds in held.items() if not holds):
            rule = self._bound[name]
            broken = part.filter(~rule)
            key = [column for column in self._key if column in part.columns]
            shown = [*key, *sorted(set(rule.meta.root_names()) - set(key))]
            count, first = self._broken.get(name, (0, broken.select(shown).row(0, named=True)))
            self._broken[name] = (count + broken.height, first)
        return all(held.values())

    def _expression(self, name: str, rule: Rule, first_part: pl.DataFrame) -> pl.Expr:
        match rule:
            case Unique() if name in self._repeated:
                return ~rule.key.is_in(self._repeated[name].implode())
            case Unique():
                return rule.key.is_unique()
            case Constant(column):
                return pl.col(column) == pl.lit(first_part[column][0], first_part.schema[column])
            case _:
                return rule

    def conclude(self) -> None:
        """Raise UserError with the first broken rule, the number of rows that break it, and the first of them."""
        for name in self._rules:
            if name in self._broken:
                count, row = self._broken[name]
                raise UserError(f"{self._path}: {count} rows break the rule “{name}”, the first is {row}")


def _columns(rule: Rule) -> set[str]:
    """The columns that a rule uses."""
    match rule:
        case Unique(columns):
            return set(columns)
        case Constant(column):
            return {column}
        case _:
            return set(rule.meta.root_names())


def polars_schema(schema: pa.Schema) -> pl.Schema:
    """The same columns as polars names them."""
    return pl.DataFrame(schema.empty_table()).schema


def _exported(kind: pa.DataType) -> pa.DataType:
    """The type as polars exports it without copying."""
    if pa.types.is_string(kind):
        return pa.string_view()
    if pa.types.is_list(kind):
        return pa.large_list(kind.value_field.with_type(_exported(kind.value_type)))
    return kind
