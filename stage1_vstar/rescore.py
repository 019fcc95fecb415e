"""A new β1 over cached rewards: no model, no generation."""

from pathlib import Path

from common.schema import read_vstar, write_vstar
from stage1_vstar.table import with_beta1


def rescore(source: Path, output: Path, beta1: float) -> str:
    """Recompute V̂* under `beta1` (in [0, inf]) and write it to `output`; returns what changed, in a line."""
    rows, provenance = read_vstar(source)
    rescored = with_beta1(rows, beta1)
    write_vstar(rescored, provenance, output)
    return (
        f"{output}: {rows.height:,} prompts, β1 {rows['beta1'][0]:g} → {beta1:g}, "
        f"mean V̂* {rows['vstar'].mean():.4f} → {rescored['vstar'].mean():.4f}"
    )
