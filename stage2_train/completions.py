"""A few of training's completions, for people to read: artifacts/<run>/completions/iteration-000010.parquet.

One file per evaluation, which polars, DuckDB and pandas read together as completions/*.parquet. Training rollouts join
stage 1's rows on prompt_id; held-out prompts have none, and no pass rate or V̂* here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from common.files import atomic_path, discard
from common.rollout import Rollout

SHOWN = 8
"""Completions of each kind per file."""
MOST_FILES = 256

COLUMNS: Mapping[str, pl.DataType] = {
    "iteration": pl.Int32(),
    "part": pl.String(),
    "prompt_id": pl.String(),
    "prompt": pl.String(),
    "completion": pl.String(),
    "completion_tokens": pl.Int32(),
    "outcome": pl.String(),
    "reward": pl.Float64(),
    "pass_rate": pl.Float64(),
    "vstar": pl.Float64(),
}
"""`part` is train or held_out; of an iteration, training rollouts come before its update and held-out ones after."""


def write_completions(
    folder: Path,
    iteration: int,
    *,
    training: Sequence[Rollout],
    held_out: Sequence[Rollout],
    pass_rate: Mapping[str, float],
    vstar: Mapping[str, float],
) -> None:
    """Write the first few rollouts of each kind; `pass_rate` and `vstar` are stage 1's, by prompt id."""
    rows = [
        (
            iteration,
            part,
            rollout.prompt.id,
            rollout.prompt.text,
            rollout.completion.text.encode("utf-8", "replace").decode("utf-8"),
            len(rollout.completion.token_ids),
            rollout.graded.outcome.value,
            rollout.reward,
            pass_rate.get(rollout.prompt.id) if part == "train" else None,
            vstar.get(rollout.prompt.id) if part == "train" else None,
        )
        for part, rollouts in (("train", training), ("held_out", held_out))
        for rollout in rollouts[:SHOWN]
    ]
    with atomic_path(folder / f"iteration-{iteration:06d}.parquet") as temporary:
        pl.DataFrame(rows, schema=dict(COLUMNS), orient="row").write_parquet(temporary)
    _thin_out(folder)


def _thin_out(folder: Path) -> None:
    """Of too many files, remove every second of the older ones, but not the first."""
    files = sorted(folder.glob("iteration-*.parquet"), key=_iteration)
    if len(files) > MOST_FILES:
        for file in files[1 : -MOST_FILES // 2 : 2]:
            discard(file)


def forget_completions(folder: Path, first_iteration: int) -> None:
    """Remove the files of `first_iteration` and later: those iterations were lost."""
    for file in folder.glob("iteration-*.parquet"):
        if _iteration(file) >= first_iteration:
            discard(file)


def _iteration(file: Path) -> int:
    return int(file.stem.removeprefix("iteration-"))
