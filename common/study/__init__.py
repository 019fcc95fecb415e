"""Compare arms (objectives, settings) over seeds: runs, records, tables and figures of one study.

Each step of a run is a command of the command line in a process of its own, so nothing of the stages is imported.
"""

from collections.abc import Collection
from pathlib import Path

from common.errors import UserError
from common.processes import Execute, execute
from common.runs import exclusive_run, run_paths
from common.settings import Loader
from common.study.page import write_report
from common.study.plan import Plan, read_plan
from common.study.records import finished
from common.study.steps import StepFailed, Steps
from common.study.summary import Summary
from common.terminal.console import Terminal


def compare(
    path: Path,
    load: Loader,
    console: Terminal,
    *,
    results: Path | None = None,
    dry_run: bool = False,
    execute: Execute = execute,
) -> None:
    """Do the runs of a study that have no record yet, and write the report after each.

    `results` is the folder of records, by default the study's own; `dry_run` only lists the runs. Raises UserError for
    a mistake in the study before anything runs, and at the end if a run has failed.
    """
    plan = read_plan(path, load)
    paths = run_paths(plan.study)
    records = results or paths.root / "results"
    steps = Steps(plan=plan, root=paths.root, results=records, console=console, execute=execute)
    done = finished(plan, records)
    if dry_run:
        _list(steps, done.keys(), console)
        return
    failures: dict[str, str] = {}
    with exclusive_run(paths, "compare"):
        console.print(_progress(plan, len(done)))
        for run in plan.runs:
            if run.record_name in done:
                continue
            try:
                done[run.record_name] = steps.complete(run)
            except StepFailed as error:
                failures[run.title] = str(error)
                console.print(f"{run.title} failed: {error}")
                continue
            write_report(plan, Summary.of(plan, done), paths.root, failures)
            console.print(f"{run.title}: done. {_progress(plan, len(done))}")
        if not done:
            raise UserError(f"no run of {plan.study} has finished: {next(iter(failures.values()))}")
        summary = Summary.of(plan, done)
        page = write_report(plan, summary, paths.root, failures)
        console.print(summary.main_table().on_terminal())
        console.print(
            f"{page}: tables and figures on a page; beside it the figures as PNG and SVG, and tables.md"
        )
    if failures:
        raise UserError(
            f"{len(failures)} of {len(plan.runs)} runs failed: {', '.join(failures)}; mend the cause that is named "
            "above, and start the same command again: it repeats nothing that is done"
        )


def _progress(plan: Plan, done: int) -> str:
    arms, seeds = len(plan.arms), len(plan.seeds)
    return (
        f"{plan.study}: {arms} arm{'s' if arms > 1 else ''} × {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{done} of {len(plan.runs)} runs done"
    )


def _list(steps: Steps, done: Collection[str], console: Terminal) -> None:
    """Print every run with the steps that it still takes; a step that several need is listed with the first."""
    console.print(_progress(steps.plan, len(done)))
    listed: set[str] = set()
    for run in steps.plan.runs:
        if run.record_name in done:
            console.print(f"{run.title}: done")
            continue
        todo = [step for step in steps.missing(run) if step not in listed]
        listed.update(todo)
        console.print(f"{run.title}: {', '.join(todo) or 'its record'}")
