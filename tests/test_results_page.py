"""docs/results.md is what the records of the studies give."""

import re

from benchmarks.results import FIGURES, PAGE, render, studies


def test_the_page_is_the_one_of_the_records_and_has_its_figures() -> None:
    text = render(studies())
    assert PAGE.read_text(encoding="utf-8") == text, "write it again: python -m benchmarks.results"
    named = re.findall(r"\]\((results/[^)]+\.svg)\)", text)
    assert sorted(named) == sorted(f"results/{file.name}" for file in FIGURES.iterdir())


def test_every_study_with_records_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in studies():
        assert f"`{name}`" in text, f"benchmarks/results.md.jinja has no part for {name}"
