"""What `sweep` leaves for `report`: where it lies, and of which samples it is."""

import hashlib
from pathlib import Path

import polars as pl
from pydantic import BaseModel

from common.grading import Outcome
from common.runs import RunPaths


def sweep_file(source: Path, suffix: str) -> Path:
    """Where the sweep of a table lies, which need not be a run's."""
    return RunPaths(source.parent).sweep(source, suffix)


class SweptFrom(BaseModel):
    """Of which samples a sweep is, and its drawings by their digests; older ones do not say."""

    samples: str | None = None
    drawings: dict[str, str] = {}


class MeanAndSd(BaseModel):
    """Over subsets of N samples."""

    mean: float
    sd: float


class SweptColumn(BaseModel):
    """What depends on N."""

    num_samples: int
    dropped: MeanAndSd
    time_saved: MeanAndSd


class SweptFigures(BaseModel):
    """What is shown of a sweep's figures."""

    by_num_samples: list[SweptColumn]


class SamplesDigest:
    """A digest of all that a sweep reads of a table: prompts and samples in their order, whatever parts they come in.

    What `rescore` and `filter` change (V̂*, keep) is not in it, as a sweep does not depend on it.
    """

    def __init__(self) -> None:
        # A stream a column: the bytes of a column are the same however the rows are cut into parts.
        self._streams = [hashlib.sha256() for _ in range(5)]

    def add(self, rows: pl.DataFrame) -> None:
        """Go on with the next rows of vstar.parquet."""
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
        """Of all rows so far."""
        return hashlib.sha256(b"".join(stream.digest() for stream in self._streams)).hexdigest()
