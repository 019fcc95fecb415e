"""Write docs/results.md, and its figures into docs/results/, from the studies' records in docs/evidence/studies/.

    .venv/bin/python -m benchmarks.results

The records are those of `python cli.py compare configs/studies/S.toml --results docs/evidence/studies/S`. The text is
results.md.jinja beside this file; all its tables, figures and numbers come from the records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files import atomic_path, write_text
from common.report.panels import Figures
from common.report.sheet import Sheet
from common.study.figures import study_figures
from common.study.page import REMARK
from common.study.plan import read_plan
from common.study.records import finished
from common.study.summary import Summary
from stage2_train.config import load_with_inputs

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "configs" / "studies"
RECORDS = ROOT / "docs" / "evidence" / "studies"
TEMPLATE = Path(__file__).parent / "results.md.jinja"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "results"


@dataclass(frozen=True, slots=True)
class Study:
    """A study as the template sees it."""

    name: str
    summary: Summary

    @classmethod
    def read(cls, name: str) -> "Study":
        plan = read_plan(STUDIES / f"{name}.toml", load_with_inputs)
        return cls(name, Summary.of(plan, finished(plan, RECORDS / name)))

    @property
    def runs(self) -> str:
        """How many runs have finished, of how many."""
        done, planned = len(self.summary.records), len(self.summary.plan.runs)
        return str(done) if done == planned else f"{done} of {planned}"

    @property
    def minutes(self) -> float:
        """The time of all runs."""
        return sum(record.seconds.total for record in self.summary.records.values()) / 60

    @property
    def machines(self) -> str:
        """The machines of its runs."""
        return "; ".join(dict.fromkeys(record.conditions.machine for record in self.summary.records.values()))

    def main(self) -> str:
        return self._markdown(self.summary.main_table())

    def speed(self) -> str:
        return self._markdown(self.summary.speed_table())

    def paired(self) -> str:
        return self._markdown(self.summary.paired_table())

    def costs(self) -> str:
        return self._markdown(self.summary.cost_table())

    def _markdown(self, sheet: Sheet | None) -> str:
        return "" if sheet is None else sheet.markdown()

    def value(self, arm: str, title: str) -> str:
        """A cell of the tables, for the text: of the first table that has a column of this title."""
        summary = self.summary
        tables = (summary.main_table(), summary.speed_table(), summary.paired_table(), summary.cost_table())
        sheet = next(each for each in tables if each is not None and title in each.header)
        cells = next(cells for name, cells in sheet.rows if name == arm)
        return cells[sheet.header.index(title)].text

    def lowest(self, arm: str, title: str) -> str:
        """The lowest value of the arm's seeds, of a column of the main table."""
        column = next(each for each in self.summary.columns() if each.title == title)
        place = next(each for each in self.summary.arms if each.name == arm)
        return f"{min(self.summary.values(place, column.of).values()):.{column.digits}f}"

    def has(self, name: str) -> bool:
        """Whether the records allow this figure."""
        return any(figure.name == name for figure in self.figures())

    def figure(self, name: str) -> str:
        """A figure of the study, as an image."""
        figure = next(each for each in self.figures() if each.name == name)
        alt = " ".join(panel.alt for panel in figure.panels)
        return f"![{alt}]({FIGURES.name}/{self.file(figure)})\n\n{figure.caption}"

    def figures(self) -> Sequence[Figures]:
        return study_figures(self.summary)

    def file(self, figure: Figures) -> str:
        return f"{self.name}-{figure.name}.svg"


def studies() -> dict[str, Study]:
    """The studies that have records, by name."""
    folders = sorted(RECORDS.iterdir()) if RECORDS.is_dir() else []
    return {folder.name: Study.read(folder.name) for folder in folders}


def render(found: dict[str, Study]) -> str:
    """The text of docs/results.md."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(studies=found, remark=REMARK)


def main() -> None:
    """Write the page, and the figures that it shows."""
    found = studies()
    text = render(found)
    write_text(PAGE, text)
    FIGURES.mkdir(exist_ok=True)
    for old in FIGURES.glob("*.svg"):
        if old.name not in text:
            old.unlink()
    for study in found.values():
        for figure in study.figures():
            if study.file(figure) in text:
                with atomic_path(FIGURES / study.file(figure)) as temporary:
                    figure.save(temporary, "svg")
    print(
        f"{PAGE.relative_to(ROOT)}: {', '.join(f'{name}, {each.runs} runs' for name, each in found.items())}"
    )


if __name__ == "__main__":
    main()
