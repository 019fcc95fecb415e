"""The contract between the stages: Parquet schemas, their invariants, and the one writer and reader of vstar.parquet.

samples/*.parquet (common/store.py) holds a row a completion. vstar.parquet holds a row a prompt and is all that
stage 2 needs from stage 1. A broken row is named in the error with the invariant that it breaks. A nullable column may
be missing from a file of an earlier format version; it is read as missing values.
"""

from pathlib import Path

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
    ]
)

_TOLERANCE = 1e-9
_OUTCOMES = [outcome.value for outcome in Outcome]
_solved = pl.col("outcomes").list.count_matches(Outcome.CORRECT.value)
_rounding = _TOLERANCE * (1 + pl.col("rewards").list.eval(pl.element().abs()).list.max())

VSTAR_INVARIANTS: dict[str, pl.Expr] = {
    "a prompt appears once": pl.col("prompt_id").is_unique(),
    "num_samples counts the rewards": pl.col("rewards").list.len() == pl.col("num_samples"),
    "num_samples counts the outcomes": pl.col("outcomes").list.len() == pl.col("num_samples"),
    "num_samples counts the lengths": pl.col("completion_tokens").list.len() == pl.col("num_samples"),
    "there is at least one sample": pl.col("num_samples") >= 1,
    "rewards are finite": pl.col("rewards").list.eval(pl.element().is_finite().fill_null(False)).list.all(),
    "outcomes are known": (
        pl.col("outcomes").list.eval(pl.element().is_in(_OUTCOMES).fill_null(False)).list.all()
    ),
    "pass_rate is the share of correct outcomes": (
        (pl.col("pass_rate") - _solved / pl.col("num_samples")).abs() < _TOLERANCE
    ),
    "pass_at_n says whether any sample is correct": pl.col("pass_at_n") == (_solved > 0),
    "beta1 is a number and not negative": (pl.col("beta1") >= 0) & pl.col("beta1").is_not_nan(),
    "beta1 is the same for every prompt": pl.col("beta1") == pl.col("beta1").first(),
    "vstar lies between the mean and the best reward": pl.col("vstar").is_between(
        pl.col("rewards").list.mean() - _rounding, pl.col("rewards").list.max() + _rounding
    ),
    "vstar_se is missing or not negative": (
        pl.col("vstar_se").is_null() | ((pl.col("vstar_se") >= 0) & pl.col("vstar_se").is_not_nan())
    ),
}

SAMPLES_INVARIANTS: dict[str, pl.Expr] = {
    "a sample appears once": pl.struct("prompt_id", "sample_index").is_unique(),
    "sample_index is not negative": pl.col("sample_index") >= 0,
    "rewards are finite": pl.col("reward").is_finite(),
    "outcomes are known": pl.col("outcome").is_in(_OUTCOMES),
}


def validate(frame: pl.DataFrame, schema: pa.Schema, invariants: dict[str, pl.Expr], path: Path) -> None:
    """Raise UserError, naming the first broken row and rule, unless the frame is what the schema promises."""
    if missing := [name for name in schema.names if name not in frame.columns]:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}; make it anew with `python cli.py vstar`"
        )
    expected = polars_schema(schema)
    for name in schema.names:
        if frame.schema[name] != expected[name]:
            raise UserError(
                f"{path}: column {name} holds {frame.schema[name]}, not {expected[name]}; "
                "make it anew with `python cli.py vstar`"
            )
    if frame.is_empty():
        raise UserError(f"{path} has no rows; make it anew with `python cli.py vstar`")
    present = {
        f"{field.name} is present": pl.col(field.name).is_not_null() for field in schema if not field.nullable
    }
    for name, rule in {**present, **invariants}.items():
        broken = frame.filter(~rule.fill_null(False))
        if broken.height:
            row = broken.select("prompt_id", *sorted(set(rule.meta.root_names()) - {"prompt_id"})).row(
                0, named=True
            )
            raise UserError(f"{path}: {broken.height} rows break the rule “{name}”, the first is {row}")


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
    validate(frame, VSTAR, VSTAR_INVARIANTS, path)
    write_table(frame, VSTAR, provenance, path)


def read_vstar(path: Path) -> tuple[pl.DataFrame, Provenance]:
    """Read vstar.parquet of any format version and check every invariant.

    Raises DamagedFile if it cannot be read, UserError naming a broken rule and row.
    """
    provenance = read_provenance(path)
    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DamagedFile(
            f"cannot read {path}: {str(error).splitlines()[0]}; remove it and make it anew with `python cli.py vstar`"
        ) from error
    types = polars_schema(VSTAR)
    later = [
        pl.lit(None, types[field.name]).alias(field.name)
        for field in VSTAR
        if field.nullable and field.name not in frame.columns
    ]
    frame = frame.with_columns(later)
    validate(frame, VSTAR, VSTAR_INVARIANTS, path)
    return frame.select(VSTAR.names), provenance
