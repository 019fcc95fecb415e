"""Repetitions as rows of a Markdown table: median, range, and the ratio of each repetition to ours."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

OURS = "ours"
Values = dict[str, list[float | None]]
"""What each trainer took, a value a repetition; None where it did not get there."""


def markdown(columns: dict[str, Values], trainers: Sequence[str], digits: dict[str, int]) -> str:
    """A row a trainer; each column is followed by its ratio to ours."""
    header = [cell for name in columns for cell in (name, "ratio")]
    lines = [" | ".join(["", "trainer", *header, ""]).strip(), "|" + "---|" * (len(header) + 1)]
    for trainer in trainers:
        cells = [trainer]
        for name, values in columns.items():
            pairs = zip(values[trainer], values[OURS], strict=True)
            ratios = [a / b if a is not None and b is not None else None for a, b in pairs]
            cells += [spread(values[trainer], digits[name]), "1" if trainer == OURS else spread(ratios, 2)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Median and range; where a repetition has no value the rest, and how many there are of them."""
    found = [value for value in values if value is not None]
    if not found:
        return "—"
    text = f"{statistics.median(found):,.{digits}f}"
    if len(found) > 1:
        text += f" ({min(found):,.{digits}f}–{max(found):,.{digits}f})"
    return text if len(found) == len(values) else f"{text} in {len(found)} of {len(values)}"


def seconds_to(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """When a curve of (seconds, accuracy) first reaches an accuracy, on the line between two evaluations."""
    for (before, low), (after, high) in pairwise(curve):
        if low >= accuracy:
            return before
        if high >= accuracy:
            return before + (after - before) * (accuracy - low) / (high - low)
    return None
