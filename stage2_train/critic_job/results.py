"""A trained critic's figures, as figures.json keeps them and as the terminal shows them."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from pydantic import BaseModel
from rich.table import Table
from scipy.special import expit

from stage2_train.critic_job.figures import (
    DEFAULT_THRESHOLD,
    Calibration,
    FirstWrongStep,
    best_threshold,
    calibration,
    first_wrong_step,
    labelled_solutions,
)

FIGURES = "figures.json"
"""The file of a critic's figures, in its folder."""
KINDS = ("all", "intermediate", "terminal")
NONE = "–"


class CriticFigures(BaseModel, frozen=True):
    """The figures of a critic on held-out prompts. Without any there are none."""

    held_out_prompts: int
    held_out: dict[str, Calibration]
    """By kind of state: all, intermediate, and terminal, which are whole solutions."""
    threshold: float
    """The threshold with the best F1 on training prompts."""
    first_wrong_step: tuple[FirstWrongStep, ...]
    """At the default threshold and at that one; none without held-out prompts."""


def critic_figures(
    held_out: pl.DataFrame, training: pl.DataFrame, logits: Mapping[int, float]
) -> CriticFigures:
    """The figures of states with these logits, by number; `training` chooses the threshold.

    The tables are of `CriticData.states`.
    """
    threshold = best_threshold(*_solutions(training, logits))
    kinds = {
        "all": held_out,
        "intermediate": held_out.filter(~pl.col("is_terminal")),
        "terminal": held_out.filter("is_terminal"),
    }
    values, labels = _solutions(held_out, logits)
    return CriticFigures(
        held_out_prompts=held_out["prompt_id"].n_unique(),
        held_out={kind: _calibration(table, logits) for kind, table in kinds.items() if table.height},
        threshold=threshold,
        first_wrong_step=tuple(
            first_wrong_step(values, labels, each) for each in (DEFAULT_THRESHOLD, threshold)
        )
        if values
        else (),
    )


def _calibration(table: pl.DataFrame, logits: Mapping[int, float]) -> Calibration:
    logits_S = np.array([logits[number] for number in table["state"]])
    return calibration(logits_S, table["value"].to_numpy(), table["noise"].fill_null(np.nan).to_numpy())


def _solutions(table: pl.DataFrame, logits: Mapping[int, float]) -> tuple[list[list[float]], list[int]]:
    found = labelled_solutions(table)
    return [[float(expit(logits[state])) for state in states] for states, _ in found], [
        label for _, label in found
    ]


def rows_of(figures: CriticFigures) -> list[tuple[str, ...]]:
    """A table: the kinds of states beside each other, the figures below each other."""
    kinds = [figures.held_out[kind] for kind in KINDS if kind in figures.held_out]
    rows: list[tuple[str, ...]] = [
        ("", *(f"{kind} states" for kind in KINDS if kind in figures.held_out)),
        ("states", *(f"{each.states:,}" for each in kinds)),
        ("cross-entropy, nats", *(shown(each.cross_entropy) for each in kinds)),
        ("Brier score", *(shown(each.brier) for each in kinds)),
        ("that of a perfect critic", *(shown(each.brier_perfect) for each in kinds)),
        ("that of a constant", *(shown(each.brier_constant) for each in kinds)),
        ("expected calibration error", *(shown(each.calibration_error) for each in kinds)),
        ("Pearson correlation", *(shown(each.pearson) for each in kinds)),
        ("Spearman correlation", *(shown(each.spearman) for each in kinds)),
    ]
    return rows


def calibration_table(figures: CriticFigures) -> Table:
    """The same for the terminal."""
    head, *rows = rows_of(figures)
    table = Table(title=f"{figures.held_out_prompts:,} held-out prompts")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def first_wrong_lines(figures: Sequence[FirstWrongStep]) -> list[str]:
    """A line for each threshold."""
    return [
        f"first wrong step, threshold {each.threshold:.3f}: F1 {shown(each.f1)}, accuracy "
        f"{shown(each.accuracy_erroneous)} on {each.erroneous:,} erroneous solutions, {shown(each.accuracy_correct)} "
        f"on {each.correct:,} correct ones"
        for each in figures
    ]


def shown(value: float | None) -> str:
    """A figure with three decimals."""
    return NONE if value is None else f"{value:.3f}"
