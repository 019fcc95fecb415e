"""A new β1 over cached rewards: no model, no generation."""

from pathlib import Path

import polars as pl

from common.schema import read_vstar, write_vstar
from stage1_vstar.table import with_beta1


def rescore(source: Path, output: Path, beta1: float) -> str:
    """Recompute V̂* under `beta1` (in [0, inf]) and write it to `output`; returns what changed, in a line."""
    rows, provenance = read_vstar(source)
    rescored = with_beta1(rows, beta1)
    write_vstar(rescored, provenance, output)
    before, after = (table.select(pl.col("vstar").mean()).item() for table in (rows, rescored))
    return (
        f"{output}: {rows.height:,} prompts, β1 {rows['beta1'][0]:g} → {beta1:g}, "
        f"mean V̂* {before:.4f} → {after:.4f}"
    )
