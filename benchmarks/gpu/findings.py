"""What a part of `benchmarks.gpu` finds: tables, figures with an aim, and remarks; on disk as they come."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks.tables import markdown
from common.files import write_text

FORMAT = 1
"""Of the JSON documents."""

Cell = str | float | int | bool | None
Verdict = Literal["met", "missed", "not judged"]
Device = Literal["cpu", "cuda"]
Status = Literal["running", "finished", "failed", "too slow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A figure that has an aim."""

    what: str
    value: float | None
    aim: str
    verdict: Verdict


@dataclass(slots=True, kw_only=True)
class Findings:
    """Everything that one part has found so far. With a file, each addition is written to it at once."""

    part: str
    device: Device
    is_tiny: bool
    machine: dict[str, Cell]
    """The card, its driver, versions and the commit."""
    status: Status = "running"
    seconds: float = 0.0
    """Of the whole process, its start included."""
    tables: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)
    """Rows by the table's title."""
    checks: list[Check] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    end_of_output: list[str] = field(default_factory=list)
    """The last lines that a part printed which did not finish."""
    file: Path | None = None

    @property
    def is_judged(self) -> bool:
        """Whether aims of speed and memory apply: on a GPU, at real sizes."""
        return self.device == "cuda" and not self.is_tiny

    def row(self, title: str, **cells: Cell) -> None:
        """Add a row to a table; a column's name has `_` for a space."""
        named = {name.replace("_", " "): _finite(cell) for name, cell in cells.items()}
        self.tables.setdefault(title, []).append(named)
        self.write()

    def at_least(self, what: str, value: float, aim: float, *, of_the_hardware: bool = False) -> None:
        """Add a figure that should be at least so much; `of_the_hardware` if only a GPU can tell."""
        self._check(what, value, f"≥ {aim:g}", value >= aim, of_the_hardware)

    def at_most(self, what: str, value: float, aim: float, *, of_the_hardware: bool = False) -> None:
        """Add a figure that should be at most so much; see `at_least`."""
        self._check(what, value, f"≤ {aim:g}", value <= aim, of_the_hardware)

    def holds(self, what: str, truth: bool) -> None:
        """Add a statement that should be true."""
        self._check(what, float(truth), "true", truth, of_the_hardware=False)

    def _check(self, what: str, value: float, aim: str, is_met: bool, of_the_hardware: bool) -> None:
        verdict: Verdict = "met" if is_met else "missed"  # nan is missed
        if of_the_hardware and not self.is_judged:
            verdict = "not judged"
        found = value if math.isfinite(value) else None
        self.checks.append(Check(what=what, value=found, aim=aim, verdict=verdict))
        self.write()

    def remark(self, text: str) -> None:
        """Add a line of text."""
        self.remarks.append(text)
        self.write()

    @property
    def missed(self) -> int:
        """The checks that missed their aim, and the part itself if it did not finish."""
        return sum(check.verdict == "missed" for check in self.checks) + (self.status != "finished")

    def document(self) -> dict[str, Any]:
        """As JSON."""
        found = {"format": FORMAT, **asdict(self)}
        del found["file"]
        return found

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The inverse of `document`."""
        values = {name: value for name, value in document.items() if name != "format"}
        checks = [Check(**check) for check in values.pop("checks")]
        return cls(**values, checks=checks)

    def write(self) -> None:
        """Put everything so far into the file, if there is one."""
        if self.file is not None:
            write_text(self.file, json.dumps(self.document(), indent=1, ensure_ascii=False, allow_nan=False))

    def markdown(self) -> str:
        """Tables, checks and remarks for people."""
        blocks = [f"### {self.part}: {self.status}, {self.seconds:.0f} s"]
        for title, rows in self.tables.items():
            header = list(dict.fromkeys(name for row in rows for name in row))
            cells = [[shown(row.get(name)) for name in header] for row in rows]
            blocks.append(f"{title}\n\n{markdown(header, cells)}")
        if self.checks:
            cells = [[check.what, shown(check.value), check.aim, check.verdict] for check in self.checks]
            blocks.append(markdown(["check", "found", "aim", "verdict"], cells))
        blocks += self.remarks
        if self.end_of_output:
            blocks.append("\n".join(["```", *self.end_of_output, "```"]))
        return "\n\n".join(blocks)


def _finite(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def shown(cell: Cell) -> str:
    """A cell of a table: three to four digits of a number."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return cell
