"""A study's page: one self-contained HTML file, and beside it the figures as PNG and SVG and the tables as Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import atomic_path, write_text
from common.report.page import render_page
from common.report.sheet import Sheet
from common.settings import shown
from common.study.figures import study_figures
from common.study.plan import Plan
from common.study.summary import Summary

BUSY = 1.5
"""The load average per core above which a training was not alone."""
REMARK = (
    "Means over seeds ± half the width of Student's 95 % interval; a single seed has none. Time is wall clock: "
    "stage 1 (if the arm needs it), loading, iterations, checkpoints and export, without evaluations and the base"
    " model. Stage 1 makes the table that training reads: V̂*, or for direct_advantage states, critic and "
    "advantages. Of samples for V̂* that arms share, each is charged loading, and of sampling the part of its N in "
    "the largest N; of states, critic and advantages that arms share, each is charged the whole. Processor time is "
    "that of stage 1 and of the training process, here with its evaluations. Sampled tokens are those drawn in "
    "stage 1 and in training. Memory is the peak of the training process: the GPU's, or without one the resident "
    "set. KL is in nats per completion, from the evaluation's samples. Curves are of evaluations during training, "
    "of which direct_advantage has none. The accuracy at a time, and the time and the iterations to an accuracy, lie "
    "on lines between these evaluations, which sample; all of set-up counts as before the first iteration."
)


def write_report(plan: Plan, summary: Summary, folder: Path, failures: Mapping[str, str]) -> Path:
    """Write report.html, tables.md and the figures into the study's folder."""
    tables = study_tables(summary)
    figures = study_figures(summary)
    for figure in figures:
        for suffix in ("png", "svg"):
            with atomic_path(folder / f"{figure.name}.{suffix}") as temporary:
                figure.save(temporary, suffix)
    notices = _notices(plan, summary)
    write_text(folder / "tables.md", _markdown(plan, tables, notices))
    page = folder / "report.html"
    html = render_page(
        Path(__file__).parent / "page.html.jinja",
        study=plan.study,
        figures_of_study=_key_figures(plan, summary),
        remark=REMARK,
        tables=tables,
        figures=[(figure, figure.pictures()) for figure in figures],
        notices=notices,
        failures=dict(failures),
        arms=[(arm.name, [(key, shown(value)) for key, value in arm.settings.items()]) for arm in plan.arms],
        conditions=_conditions(summary),
        source=plan.source,
    )
    write_text(page, html)
    return page


def study_tables(summary: Summary) -> list[Sheet]:
    """All tables that the records allow."""
    tables = (summary.main_table(), summary.speed_table(), summary.paired_table(), summary.cost_table())
    return [table for table in tables if table is not None]


def _markdown(plan: Plan, tables: Sequence[Sheet], notices: Sequence[str]) -> str:
    parts = [
        f"# {plan.study}",
        *notices,
        *(f"## {table.title}\n\n{table.markdown()}" for table in tables),
        REMARK,
    ]
    return "\n\n".join(parts) + "\n"


def _key_figures(plan: Plan, summary: Summary) -> list[tuple[str, str]]:
    hours = sum(record.seconds.total for record in summary.records.values()) / 3600
    return [
        ("arms", str(len(plan.arms))),
        ("seeds", str(len(plan.seeds))),
        ("runs, finished", f"{len(summary.records)} of {len(plan.runs)}"),
        *([("hours, all runs", f"{hours:.2f}")] if plan.times else []),
    ]


def _notices(plan: Plan, summary: Summary) -> list[str]:
    """What limits the comparison."""
    machines = dict.fromkeys(record.conditions.machine for record in summary.records.values())
    versions = {str(sorted(record.conditions.versions.items())) for record in summary.records.values()}
    busy = [
        record
        for record in summary.records.values()
        if record.conditions.load_average > BUSY * record.conditions.cores
    ]
    found = []
    if not plan.times:
        found.append(
            "The study compares no times, as the machine may have done other work meanwhile. What is said of time "
            "below does not apply."
        )
    elif busy:
        found.append(
            f"Other work shared the machine with {len(busy)} of {len(summary.records)} runs (load average above "
            f"{BUSY:g} per core), so their times are too long. Processor time below is affected less."
        )
    if len(machines) > 1 and plan.times:
        found.append(
            f"The runs are of different machines, so their times do not compare: {'; '.join(machines)}."
        )
    if len(versions) > 1:
        found.append("The runs are of different versions of the libraries; their records have the versions.")
    if not summary.has_equal_seeds:
        found.append("Not all arms have all seeds yet: compare those that have the same ones.")
    return found


def _conditions(summary: Summary) -> list[tuple[str, str]]:
    records = list(summary.records.values())
    if not records:
        return []
    loads = [record.conditions.load_average for record in records]
    versions = {
        f"{name} {version}"
        for record in records
        for name, version in record.conditions.versions.items()
        if version is not None
    }
    return [
        ("machine", "\n".join(dict.fromkeys(record.conditions.machine for record in records))),
        ("load average over the last minute of training", f"{min(loads):.1f} to {max(loads):.1f}"),
        ("python", ", ".join(dict.fromkeys(record.conditions.python for record in records))),
        ("libraries", "\n".join(sorted(versions))),
        ("commit", "\n".join(dict.fromkeys(record.conditions.commit or "unknown" for record in records))),
    ]
