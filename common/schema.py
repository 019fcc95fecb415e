"""The contract between the stages: Parquet schemas, their invariants, and the one writer and reader of vstar.parquet.

samples/*.parquet (common/store.py) holds a row a completion. vstar.parquet holds a row a prompt and is all that
stage 2 needs from stage 1. A broken row is named in the error with the invariant that it breaks. A nullable column may
be missing from a file of an earlier format version; it is read as missing values.

`read_vstar` and `write_vstar` hold the whole table. `scan_vstar` and `vstar_writer` check the same rules on BATCH_ROWS
prompts at a time; of all others they hold 8 bytes each, to tell that a prompt appears once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.artifacts import atomic_path
from common.errors import DamagedFile, UserError
from common.grading import Outcome
from common.provenance import Provenance, read_provenance

SAMPLES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("prompt_token_hash", pa.string()),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_raw", pa.binary()),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("extracted", pa.string()),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
"""`completion_raw` holds the completion, lone surrogates included, where `completion` (UTF-8) has no place for them."""

GRADES = pa.schema(
    [
        SAMPLES.field("prompt_id"),
        SAMPLES.field("sample_index"),
        pa.field("completion_hash", pa.string(), nullable=False),
        *(SAMPLES.field(name) for name in ("outcome", "extracted", "reward", "reason")),
    ]
)
"""Another grader's verdicts on samples that are stored already; each holds for the text with that hash alone."""

VSTAR = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("prompt_token_hash", pa.string()),
        pa.field("num_samples", pa.int32(), nullable=False),
        pa.field("rewards", pa.list_(pa.float64()), nullable=False),
        pa.field("outcomes", pa.list_(pa.string()), nullable=False),
        pa.field("completion_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("pass_rate", pa.float64(), nullable=False),
        pa.field("pass_at_n", pa.bool_(), nullable=False),
        pa.field("beta1", pa.float64(), nullable=False),
        pa.field("vstar", pa.float64(), nullable=False),
        pa.field("vstar_se", pa.float64()),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("dropped_by", pa.string()),
    ]
)
"""`dropped_by` names the first rule that dropped a prompt; missing where none did, and in files of versions 1 and 2."""

BATCH_ROWS = 65_536
"""Prompts that are in memory at a time where a table is streamed, and in a row group that is written."""

_READ_BYTES = 1 << 20
"""Of each column's compressed data at a time; by default pyarrow keeps all that it has read of a file."""
_VIEWS = pl.CompatLevel.newest()
"""How polars hands over text without copying it."""
_TOLERANCE = 1e-9
_OUTCOMES = [outcome.value for outcome in Outcome]
_solved = pl.col("outcomes").list.count_matches(Outcome.CORRECT.value)
_rounding = _TOLERANCE * (1 + pl.col("rewards").list.eval(pl.element().abs()).list.max())

_mean, _best = pl.col("rewards").list.mean(), pl.col("rewards").list.max()

_MEAN_TO_BEST = (
    "vstar lies between the mean and the best reward",
    pl.col("vstar").is_between(_mean - _rounding, _best + _rounding),
)

VSTAR_RANGES: dict[str, tuple[str, pl.Expr]] = {
    "plugin": _MEAN_TO_BEST,
    "jackknife": _MEAN_TO_BEST,
    "beta_binomial": (
        "vstar lies between 0 and 1",
        pl.col("vstar").is_between(-_TOLERANCE, 1 + _TOLERANCE),
    ),
}
"""What each estimator of V* promises of its values."""


_APPEARS_ONCE = pl.col("prompt_id").is_unique()
_FIRST_BETA1 = pl.col("beta1").first()


def vstar_invariants(
    estimator: str, *, appears_once: pl.Expr = _APPEARS_ONCE, beta1: pl.Expr = _FIRST_BETA1
) -> dict[str, pl.Expr]:
    """What holds for every row of a table whose V̂* is of this estimator.

    Of a part of a table one cannot tell whether a prompt appears once, and which `beta1` is the table's: say it then.
    """
    range_name, in_range = VSTAR_RANGES[estimator]
    return {
        "a prompt appears once": appears_once,
        "num_samples counts the rewards": pl.col("rewards").list.len() == pl.col("num_samples"),
        "num_samples counts the outcomes": pl.col("outcomes").list.len() == pl.col("num_samples"),
        "num_samples counts the lengths": pl.col("completion_tokens").list.len() == pl.col("num_samples"),
        "there is at least one sample": pl.col("num_samples") >= 1,
        "rewards are finite": pl.col("rewards")
        .list.eval(pl.element().is_finite().fill_null(False))
        .list.all(),
        "outcomes are known": (
            pl.col("outcomes").list.eval(pl.element().is_in(_OUTCOMES).fill_null(False)).list.all()
        ),
        "pass_rate is the share of correct outcomes": (
            (pl.col("pass_rate") - _solved / pl.col("num_samples")).abs() < _TOLERANCE
        ),
        "pass_at_n says whether any sample is correct": pl.col("pass_at_n") == (_solved > 0),
        "beta1 is a number and not negative": (pl.col("beta1") >= 0) & pl.col("beta1").is_not_nan(),
        "beta1 is the same for every prompt": pl.col("beta1") == beta1,
        range_name: in_range,
        "vstar_se is missing or not negative": (
            pl.col("vstar_se").is_null() | ((pl.col("vstar_se") >= 0) & pl.col("vstar_se").is_not_nan())
        ),
        "no rule dropped a prompt that is kept": ~pl.col("keep") | pl.col("dropped_by").is_null(),
    }


SAMPLES_INVARIANTS: dict[str, pl.Expr] = {
    "a sample appears once": pl.struct("prompt_id", "sample_index").is_unique(),
    "sample_index is not negative": pl.col("sample_index") >= 0,
    "rewards are finite": pl.col("reward").is_finite(),
    "outcomes are known": pl.col("outcome").is_in(_OUTCOMES),
}


def validate(frame: pl.DataFrame, schema: pa.Schema, invariants: dict[str, pl.Expr], path: Path) -> None:
    """Raise UserError, naming the first broken row and rule, unless the frame is what the schema promises."""
    _refuse_other_table(frame.schema, frame.height, schema, path)
    check = Check(schema, invariants, path)
    check.add(frame)
    check.conclude()


def _refuse_other_table(columns: pl.Schema, rows: int, schema: pa.Schema, path: Path) -> None:
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


def write_vstar(frame: pl.DataFrame, provenance: Provenance, path: Path) -> None:
    """Write vstar.parquet atomically, once every row satisfies every invariant."""
    validate(frame, VSTAR, vstar_invariants(estimator_of(provenance)), path)
    write_table(frame, VSTAR, provenance, path)


def read_vstar(path: Path) -> tuple[pl.DataFrame, Provenance]:
    """Read vstar.parquet of any format version and check every invariant.

    Raises DamagedFile if it cannot be read, UserError naming a broken rule and row.
    """
    provenance = read_provenance(path)
    try:
        frame = _with_later_columns(pl.read_parquet(path, glob=False))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from error
    validate(frame, VSTAR, vstar_invariants(estimator_of(provenance)), path)
    return frame.select(VSTAR.names), provenance


def scan_vstar(path: Path, columns: Sequence[str] = VSTAR.names) -> Iterator[pl.DataFrame]:
    """The rows of vstar.parquet as `read_vstar` gives them, BATCH_ROWS at a time, in bounded memory.

    With `columns`, which contain prompt_id, the others are not read, and rules that speak of others are not checked.
    Rows that break a rule are not yielded; the error comes in the end, when they are counted. Raises what `read_vstar`
    raises.
    """
    estimator = estimator_of(read_provenance(path))
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        table = _with_later_columns(pl.DataFrame(file.schema_arrow.empty_table()))
        _refuse_other_table(table.schema, file.metadata.num_rows, VSTAR, path)
        appears_once = ~pl.col("prompt_id").is_in(_repeated_prompts(file, path).implode())
        check: Check | None = None
        for part in _parts(file, path, [name for name in columns if name in file.schema_arrow.names]):
            rows = _with_later_columns(part).select(columns)
            if check is None:
                beta1 = pl.lit(rows["beta1"][0]) if "beta1" in columns else pl.col("beta1")
                invariants = vstar_invariants(estimator, appears_once=appears_once, beta1=beta1)
                check = Check(VSTAR, invariants, path, set(columns).issuperset)
            if check.add(rows):
                yield rows
        if check is not None:
            check.conclude()


@contextmanager
def vstar_writer(
    path: Path, provenance: Provenance, *, changed: Collection[str]
) -> Iterator[Callable[[pl.DataFrame], None]]:
    """Write vstar.parquet a part at a time, atomically: the file is there when the context ends without an error.

    Yields the function that writes a part: rows of `scan_vstar` that differ in the columns `changed` only. The rules
    that speak of these are checked, all others have been. `path` may be the file that is being scanned.
    """
    check: Check | None = None
    schema = VSTAR.with_metadata(provenance.metadata())
    behind: list[Future[None]] = []

    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ThreadPoolExecutor(1) as thread,
    ):

        def write(rows: pl.DataFrame) -> None:
            nonlocal check
            if rows.is_empty():
                return
            if check is None:
                invariants = vstar_invariants(estimator_of(provenance), beta1=pl.lit(rows["beta1"][0]))
                check = Check(VSTAR, invariants, path, lambda names: not names.isdisjoint(changed))
            check.add(rows)
            table = rows.select(VSTAR.names).to_arrow(compat_level=_VIEWS).cast(schema)
            while behind:
                behind.pop().result()
            behind.append(thread.submit(writer.write_table, table))

        yield write
        while behind:
            behind.pop().result()
        if check is not None:
            check.conclude()


def estimator_of(provenance: Provenance) -> str:
    """By which estimator the V̂* of a table were computed; the paper's where its context names none."""
    return str(provenance.context.get("estimator", "plugin"))


def _with_later_columns(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with missing values for the columns that its format version lacks."""
    types = polars_schema(VSTAR)
    return frame.with_columns(
        pl.lit(None, types[field.name]).alias(field.name)
        for field in VSTAR
        if field.nullable and field.name not in frame.columns
    )


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(
        f"cannot read {path}: {str(error).splitlines()[0]}; remove it and make it anew with `python cli.py vstar`"
    )


def _parts(file: pq.ParquetFile, path: Path, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The rows of an open file, BATCH_ROWS at a time; while one part is being used, the next is read."""
    parts = map(pl.DataFrame, file.iter_batches(BATCH_ROWS, columns=list(columns)))
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, parts, None)
        while True:
            try:
                part = ahead.result()
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from error
            if part is None:
                return
            ahead = thread.submit(next, parts, None)
            yield part


def _repeated_prompts(file: pq.ParquetFile, path: Path) -> pl.Series:
    """The prompt ids that appear more than once. Holds 8 bytes a prompt: ids are compared where their hashes agree."""
    hashes_P = np.empty(file.metadata.num_rows, dtype=np.uint64)
    filled = 0
    for part in _parts(file, path, ["prompt_id"]):
        hashes_P[filled : filled + part.height] = part["prompt_id"].hash().to_numpy()
        filled += part.height
    hashes_P.sort()
    twice = pl.Series(np.unique(hashes_P[1:][hashes_P[1:] == hashes_P[:-1]]))
    if twice.is_empty():
        return twice.cast(pl.String)
    suspects = [
        part["prompt_id"].filter(part["prompt_id"].hash().is_in(twice.implode()))
        for part in _parts(file, path, ["prompt_id"])
    ]
    ids = pl.concat(suspects)
    return ids.filter(ids.is_duplicated()).unique()
