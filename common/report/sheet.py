"""A table of figures: on a page, as Markdown, and on the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A figure, and its rank among those that it is compared with, 1 and 2 alone; None for no rank."""

    text: str
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A table: the titles of its columns, and the name of each row with its cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]

    def markdown(self) -> str:
        """As Markdown; the best of a column in bold, the second in italics."""
        marks = {1: "**", 2: "*", None: ""}
        lines = [
            ["", *self.header],
            ["---", *["---:"] * len(self.header)],
            *(
                [name, *(f"{marks[cell.rank]}{cell.text}{marks[cell.rank]}" for cell in cells)]
                for name, cells in self.rows
            ),
        ]
        return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)

    def on_terminal(self) -> Table:
        """For the terminal."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("")
        for title in self.header:
            table.add_column(title, justify="right", overflow="fold")
        for name, cells in self.rows:
            table.add_row(name, *(cell.text for cell in cells))
        return table


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("A*", "A\\*")
