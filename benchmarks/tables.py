"""The output of benchmarks: Markdown tables, and repetitions in a few digits."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Values = dict[str, list[float | None]]
"""The values of each contestant, one per repetition; None if it did not reach the goal."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column holds names and whose others hold figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(values: Sequence[float | None], digits: int) -> str:
    """Median and range; if repetitions have no value, those of the others, and how many there are."""
    found = [value for value in values if value is not None]
    if not found:
        return "—"
    text = f"{statistics.median(found):,.{digits}f}"
    if len(found) > 1:
        text += f" ({min(found):,.{digits}f}–{max(found):,.{digits}f})"
    return text if len(found) == len(values) else f"{text} in {len(found)} of {len(values)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of all contestants; the others are compared with the first."""

    name: str
    digits: int
    values: Values


def comparison(contestant: str, columns: Sequence[Column]) -> str:
    """One row per contestant; each column is followed by its ratio to the first one's, repetition by repetition."""
    names = list(columns[0].values)
    rows = []
    for name in names:
        cells = [name]
        for column in columns:
            own, base = column.values[name], column.values[names[0]]
            ratios = [
                a / b if a is not None and b is not None else None for a, b in zip(own, base, strict=True)
            ]
            cells += [spread(own, column.digits), "1" if name == names[0] else spread(ratios, 2)]
        rows.append(cells)
    return markdown([contestant, *(cell for column in columns for cell in (column.name, "ratio"))], rows)
