"""The files that `sweep` writes and `report` reads: their paths, and the digest of the samples that they describe."""

import hashlib
from pathlib import Path

import polars as pl
from pydantic import BaseModel

from common.grading import Outcome
from common.runs import RunPaths


def sweep_file(source: Path, suffix: str) -> Path:
    """The paths of a table's sweep; the table need not belong to a run."""
    return RunPaths(source.parent).sweep(source, suffix)


class SweptFrom(BaseModel):
    """The digests of a sweep's samples and drawings; older sweeps do not record them."""

    samples: str | None = None
    drawings: dict[str, str] = {}


class MeanAndSd(BaseModel):
    """Mean and standard deviation over subsets of N samples."""

    mean: float
    sd: float


class SweptColumn(BaseModel):
    """The figures that depend on N."""

    num_samples: int
    dropped: MeanAndSd
    time_saved: MeanAndSd


class SweptFigures(BaseModel):
    """The figures of a sweep that are shown."""

    by_num_samples: list[SweptColumn]


class SamplesDigest:
    """A digest of everything that a sweep reads from a table: prompts and samples in order, independent of the parts.

    Columns that `rescore` and `filter` change (V̂*, keep) are not in it, since a sweep does not depend on them.
    """

    def __init__(self) -> None:
        # One stream per column: a column's bytes do not depend on how the rows are cut into parts.
        self._streams = [hashlib.sha256() for _ in range(5)]

    def add(self, rows: pl.DataFrame) -> None:
        """Add the next rows of vstar.parquet."""
        samples = rows.select(
            pl.col("rewards").explode().cast(pl.Float64),
            (pl.col("outcomes").explode() == Outcome.CORRECT.value).cast(pl.UInt8),
            pl.col("completion_tokens").explode().cast(pl.Int64),
        )
        parts = [
            "".join(f"{name}\n" for name in rows["prompt_id"]).encode(),
            *(
                column.to_numpy().tobytes()
                for column in (rows["num_samples"].cast(pl.Int64), *samples.iter_columns())
            ),
        ]
        for stream, part in zip(self._streams, parts, strict=True):
            stream.update(part)

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        return hashlib.sha256(b"".join(stream.digest() for stream in self._streams)).hexdigest()
