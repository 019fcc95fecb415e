"""The part of a critic's record that other jobs read: the table of states that it was trained on."""

from pathlib import Path

from pydantic import BaseModel

from common.documents import read_document
from common.runs import RunPaths


class _TrainedWith(BaseModel):
    segments: str | None = None


class _Record(BaseModel):
    trained_with: _TrainedWith


def trained_on(critic: Path) -> str | None:
    """The hash of the table of states that a critic was trained on; None if that is not recorded."""
    file = critic / RunPaths.TRAINED_WITH
    if not file.is_file():
        return None
    return read_document(file, _Record, f"remove {critic}, and train the critic again").trained_with.segments
