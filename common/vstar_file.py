"""vstar.parquet, the contract between the stages: one row per prompt, all that stage 2 needs of stage 1."""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.contract import Check, polars_schema, refuse_other_table, validate, write_table
from common.errors import DamagedFile
from common.files import atomic_path
from common.grading import OUTCOMES, Outcome
from common.provenance import Provenance, read_provenance

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
            pl.col("outcomes").list.eval(pl.element().is_in(OUTCOMES).fill_null(False)).list.all()
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
        refuse_other_table(table.schema, file.metadata.num_rows, VSTAR, path)
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
