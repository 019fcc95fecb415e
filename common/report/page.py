"""The page: one self-contained HTML file that opens from disk, on a phone as well as on paper.

It has no script, and its policy forbids the browser to run or load any. Drawings are images within the file, and model
output passes through the template's escaping.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.documents import read_document
from common.errors import UserError
from common.files import file_digest, write_text
from common.grading import Outcome
from common.provenance import ACCEPTED
from common.report.browser import SAMPLES_SHOWN, Group, browse
from common.report.cost import stage1_cost, stage2_cost, step_level_costs
from common.report.curves import training_pictures
from common.report.distributions import pass_rate_picture, vstar_picture
from common.report.evaluations import Evaluated
from common.report.picture import Picture
from common.report.regrades import Regrade
from common.report.stage1 import PROMPTS_SHOWN, Stage1
from common.report.sweep_files import SweptFigures, SweptFrom
from common.report.text import visible
from common.runs import RunPaths

_HERE = Path(__file__).parent

MEANINGS: dict[Outcome, str] = {
    Outcome.CORRECT: "the answer is right",
    Outcome.WRONG: "an answer, but not the right one",
    Outcome.UNPARSED: "no answer found, or one that cannot be read",
    Outcome.GOLD_UNPARSED: "the reference answer cannot be read",
    Outcome.TRUNCATED: "cut at the token limit, never read",
    Outcome.VERIFIER_TIMEOUT: "the grader ran out of time",
    Outcome.VERIFIER_CRASH: "the grader failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeRow:
    """How many completions have this outcome."""

    name: str
    meaning: str
    samples: int
    share: float
    mean_tokens: float


def write_page(
    paths: RunPaths,
    stage1: Stage1 | None,
    metrics: Sequence[dict[str, float]],
    evaluations: Sequence[Evaluated],
) -> Path:
    """Write report/report.html from what a run has so far: the rows of vstar.parquet, metrics, evaluations."""
    costs = [
        *([stage1_cost(stage1)] if stage1 is not None else []),
        *step_level_costs(paths),
        *([stage2_cost(metrics)] if metrics else []),
    ]
    sections = _stage1(paths, stage1) if stage1 is not None else {}
    html = render_page(
        _HERE / "page.html.jinja",
        run=paths.root.name,
        has_vstar=stage1 is not None,
        has_advantages=paths.advantages.exists(),
        sweep=_sweep(paths, stage1) if stage1 else None,
        regrades=_regrades(paths),
        curves=training_pictures(metrics) if metrics else [],
        evaluations=evaluations,
        costs=costs,
        documents=_documents(paths),
        **sections,
    )
    write_text(paths.page, html)
    return paths.page


def render_page(template: Path, **values: Any) -> str:
    """A page in this project's style, which the template takes as `style` and, for its policy, `style_hash`."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    return (
        _environment(template.parent)
        .get_template(template.name)
        .render(
            style=Markup(style),
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            **values,
        )
    )


def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["duration"] = duration
    return environment


def _stage1(paths: RunPaths, stage1: Stage1) -> dict[str, Any]:
    groups: list[Group] = []
    trouble = None
    try:
        groups = browse(paths, stage1)
    except UserError as error:
        trouble = str(error)
    context = stage1.provenance.context
    return {
        "figures": _key_figures(stage1.prompts, context.get("estimator", "plugin")),
        "accepted": context.get(ACCEPTED, []),
        "pictures": [pass_rate_picture(stage1.prompts), vstar_picture(stage1.prompts)],
        "dropped": _dropped(stage1.prompts),
        "outcomes": outcome_rows(stage1.outcomes),
        "groups": groups,
        "trouble": trouble,
        "prompts_shown": PROMPTS_SHOWN,
        "samples_shown": SAMPLES_SHOWN,
        "identity": list(flat(stage1.provenance.identity)),
        "context": list(flat(context)),
    }


def _key_figures(prompts: pl.DataFrame, estimator: str) -> list[tuple[str, str]]:
    columns = ("num_samples", "pass_rate", "pass_at_n", "vstar", "vstar_se")
    num_samples_P, rate_P, pass_at_n_P, vstar_P, se_P = (prompts[name].to_numpy() for name in columns)
    low, high = num_samples_P.min(), num_samples_P.max()
    return [
        ("prompts", f"{prompts.height:,}"),
        ("kept for training", f"{prompts['keep'].sum():,}"),
        ("samples (N)", f"{low}" if low == high else f"{low}–{high}"),
        ("pass rate", f"{rate_P.mean():.3f}"),
        ("pass@N", f"{pass_at_n_P.mean():.3f}"),
        ("β₁", f"{prompts['beta1'][0]:g}"),
        ("mean V̂*", f"{vstar_P.mean():.3f}"),
        ("mean SE of V̂*", f"{se_P[known].mean():.3f}" if (known := ~np.isnan(se_P)).any() else "–"),
        *([("estimator", estimator)] if estimator != "plugin" else []),
    ]


def _dropped(prompts: pl.DataFrame) -> list[tuple[str, int]]:
    """The rules that dropped prompts, with their numbers, the largest first; old files do not record them."""
    counts = prompts["dropped_by"].drop_nulls().value_counts(sort=True)
    return [(rule, count) for rule, count in counts.iter_rows()]


def outcome_rows(outcomes: pl.DataFrame) -> list[OutcomeRow]:
    """Completions by outcome, the most frequent first."""
    total = outcomes["samples"].sum()
    return [
        OutcomeRow(
            name=name,
            meaning=MEANINGS[Outcome(name)],
            samples=samples,
            share=samples / total,
            mean_tokens=tokens / samples,
        )
        for name, samples, tokens in outcomes.iter_rows()
    ]


def _sweep(paths: RunPaths, stage1: Stage1) -> dict[str, Any] | None:
    """The plot of `sweep` and its figures by N; empty if they are not of these samples."""
    drawing, document = (paths.sweep(paths.vstar, suffix) for suffix in ("svg", "json"))
    if not document.exists():
        return None
    remedy = f"remove it, or make it again with `python cli.py sweep --run {paths.root.name}`"
    made_of = read_document(document, SweptFrom, remedy)
    drawn = file_digest(drawing) if drawing.exists() else None
    if (made_of.samples, made_of.drawings.get("svg")) != (stage1.samples_digest, drawn):
        return {"picture": None}
    return {
        "picture": Picture(
            svg=drawing.read_text(encoding="utf-8"),
            alt="Plots of what other N and β₁ would have given; sweep.json beside this page has the numbers.",
        ),
        "by_num_samples": read_document(document, SweptFigures, remedy).by_num_samples,
    }


def _regrades(paths: RunPaths) -> list[Regrade]:
    """The results of `regrade`, one summary per grader."""
    files = [regraded.summary for regraded in paths.regrades if regraded.summary.exists()]
    remedy = "remove it, or make it again with `python cli.py regrade`"
    return [read_document(file, Regrade, remedy) for file in files]


def _documents(paths: RunPaths) -> list[tuple[str, str]]:
    """The complete files that record how the run was made."""
    files = [paths.config, paths.trained_with]
    return [
        (str(file.relative_to(paths.root)), file.read_text(encoding="utf-8", errors="replace"))
        for file in files
        if file.exists()
    ]


def flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a nested document as text, under its dotted name."""
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}.")
        elif isinstance(value, list):
            yield name, "\n".join(map(str, value)) or "none"
        else:
            yield name, "–" if value is None else str(value) or "(empty)"


def duration(seconds: float) -> str:
    """Seconds in readable units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
