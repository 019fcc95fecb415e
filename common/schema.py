"""The contract between the stages: two Parquet schemas, their invariants, one writer and one reader each.

samples/*.parquet holds a row a completion, in append-only fragments. vstar.parquet holds a row a prompt and is all
that stage 2 needs from stage 1. A broken row is named in the error with the invariant that it breaks.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from common.artifacts import SCHEMA_VERSION, atomic_path, differences
from common.errors import UserError
from common.grading import Outcome

METADATA_KEY = b"astar_po"

SAMPLES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("extracted", pa.string()),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("reason", pa.string()),
    ]
)

VSTAR = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a file came from: `identity` is compared before anything is mixed, `context` is for the reader."""

    identity: dict[str, Any]
    context: dict[str, Any]

    def refuse_unless_same(self, found: "Provenance", *, what: str, advice: str) -> None:
        """Raise UserError, spelling out each difference, unless both have the same identity."""
        if lines := differences(self.identity, found.identity):
            raise UserError(f"{what} does not belong to this run: {'; '.join(lines)}; {advice}")


def _metadata(provenance: Provenance) -> dict[bytes, bytes]:
    document = {
        "schema_version": SCHEMA_VERSION,
        "identity": provenance.identity,
        "context": provenance.context,
    }
    return {METADATA_KEY: json.dumps(document).encode()}


def read_provenance(path: Path) -> Provenance:
    """The provenance of an artifact, without reading its rows. Raises UserError if it has none."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; make it with `python cli.py vstar`") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} carries no provenance; it was not written by `python cli.py vstar`")
    document = json.loads(metadata[METADATA_KEY])
    if document["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {document['schema_version']}; this checkout reads {SCHEMA_VERSION}"
        )
    return Provenance(identity=document["identity"], context=document["context"])


def _validate(frame: pl.DataFrame, schema: pa.Schema, invariants: dict[str, pl.Expr], path: Path) -> None:
    if missing := [name for name in schema.names if name not in frame.columns]:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}; make it anew with `python cli.py vstar`"
        )
    expected = pl.DataFrame(schema.empty_table()).schema
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


def _read(paths: list[Path], columns: list[str] | None = None) -> pl.DataFrame:
    try:
        return pl.read_parquet(paths, columns=columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"cannot read {', '.join(map(str, paths[:3]))}: {str(error).splitlines()[0]}; remove the damaged file"
        ) from error


def _write(frame: pl.DataFrame, schema: pa.Schema, provenance: Provenance, path: Path) -> None:
    table = frame.select(schema.names).to_arrow().cast(schema).replace_schema_metadata(_metadata(provenance))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def write_vstar(frame: pl.DataFrame, provenance: Provenance, path: Path) -> None:
    """Write vstar.parquet atomically, once every row satisfies every invariant."""
    _validate(frame, VSTAR, VSTAR_INVARIANTS, path)
    _write(frame, VSTAR, provenance, path)


def read_vstar(path: Path) -> tuple[pl.DataFrame, Provenance]:
    """Read vstar.parquet and check every invariant. Raises UserError naming the broken rule and row."""
    provenance = read_provenance(path)
    frame = _read([path])
    _validate(frame, VSTAR, VSTAR_INVARIANTS, path)
    return frame, provenance


class SampleStore:
    """A run's samples: Parquet fragments that appear under their final name only when whole, and never change.

    A sample is addressed by (prompt_id, sample_index). Resume, more samples a prompt and more prompts are the same
    question: which samples are missing?
    """

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        """Open the store. Raises UserError if it holds samples of another identity."""
        self.folder = folder
        self.provenance = provenance
        for fragment in self.fragments():
            provenance.refuse_unless_same(
                read_provenance(fragment),
                what=str(fragment),
                advice="choose another --run for this configuration",
            )

    def fragments(self) -> list[Path]:
        """The whole fragments, in a fixed order."""
        return sorted(self.folder.glob("part-*.parquet"))

    def present(self) -> set[tuple[str, int]]:
        """The samples that are there."""
        if not (fragments := self.fragments()):
            return set()
        return set(pl.scan_parquet(fragments).select("prompt_id", "sample_index").collect().iter_rows())

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add one fragment."""
        frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=SAMPLES))
        assert isinstance(frame, pl.DataFrame)
        _write(frame, SAMPLES, self.provenance, self.folder / f"part-{uuid.uuid4().hex}.parquet")

    def read(self) -> pl.DataFrame:
        """Every sample, each once. Raises UserError naming the broken rule and row."""
        return self._read(SAMPLES)

    def read_grades(self) -> pl.DataFrame:
        """The same without the completions' text, which is nearly all of the bytes and which V̂* does not need."""
        without_text = [field for field in SAMPLES if field.name not in ("completion", "extracted", "reason")]
        return self._read(pa.schema(without_text))

    def _read(self, schema: pa.Schema) -> pl.DataFrame:
        frame = _read(self.fragments(), schema.names)
        _validate(frame, schema, SAMPLES_INVARIANTS, self.folder)
        return frame
