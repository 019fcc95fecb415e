"""What drawing the states of segments.parquet has cost, as the files of its run have it."""

from pathlib import Path
from typing import Any

import polars as pl

from common.runs import RunPaths
from common.segments.files import SEGMENTS_TABLE
from common.store import stored_tokens


def recorded_cost(segments: Path) -> dict[str, Any]:
    """`seconds` of all processes that drew for a table of states, and their `devices`; empty for an imported table."""
    cost: dict[str, Any] = SEGMENTS_TABLE.provenance(segments).context.get("cost", {})
    return cost


def drawn_tokens(paths: RunPaths) -> int:
    """The tokens of a run's solutions, and of the completions of its states without their prefixes; 0 without states.

    Nothing was drawn for an imported table.
    """
    if not paths.segments.exists():
        return 0
    identity = SEGMENTS_TABLE.provenance(paths.segments).identity
    if "completer" not in identity["segments"]:
        return 0
    # If the completer is the reference, the completions of a prompt itself are solutions.
    first = 1 if identity["segments"]["completer"] == identity["model"] else 0
    parts = SEGMENTS_TABLE.scan(paths.segments, ["step", "completion_tokens"])
    drawn = (part.filter(pl.col("step") >= first)["completion_tokens"].list.sum().sum() for part in parts)
    return stored_tokens(paths.samples) + sum(map(int, drawn))
