"""The steps of a study's runs, each a command of the command line in a process of its own.

A step is done if its result is there, whole; so a study that was stopped anywhere, however hard, continues with the
same command. Its cost is written right after it. Where that was prevented, the step is repeated.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from common.documents import read_document, read_metrics
from common.errors import UserError
from common.files import atomic_path, write_text
from common.processes import Execute, Finished, program
from common.provenance import read_provenance
from common.runs import RunPaths
from common.settings import as_toml
from common.study.plan import Plan, Run, Table
from common.study.records import (
    REFERENCE,
    TRAINED,
    Conditions,
    Record,
    conditions,
    make_record,
    read_figures,
    training_seconds,
    write_record,
)
from common.terminal.console import Terminal

REMEDY = "remove it: the step is then repeated"


class StepFailed(UserError):
    """A step of a run ended with an error; runs that do without it can go on."""


class Drawn(BaseModel):
    """The cost of drawing a table's samples."""

    seconds: float
    sampling_seconds: float
    """The part that grows with the number of samples: the rest is starting and loading."""
    peak_gib: float

    def of(self, part: float) -> float:
        """The seconds that a part of the samples would have taken."""
        return self.seconds - self.sampling_seconds * (1 - part)


class Trained(BaseModel):
    """The cost of training that metrics.jsonl does not have."""

    setup_seconds: float
    cpu_seconds: float | None
    """None if an earlier process did a part of it."""
    conditions: Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Does the steps of runs."""

    plan: Plan
    root: Path
    """The study's folder."""
    results: Path
    """The folder of records."""
    console: Terminal
    execute: Execute
    _failed: dict[str, str] = field(default_factory=dict)
    """Errors by the name of the step, so that no run repeats a step that has failed for another one."""

    @property
    def runs(self) -> Path:
        """The folder of the runs of all steps."""
        return self.root / "runs"

    def complete(self, run: Run) -> Record:
        """Do whatever is missing of a run, and keep its record. Raises StepFailed."""
        for step in self.missing(run):
            if (error := self._failed.get(step)) is not None:
                raise StepFailed(f"{step} has failed: {error}")
            self.console.print(f"{run.title}: {step}")
            try:
                self._do(step, run)
            except StepFailed as error:
                self._failed[step] = str(error)
                raise
        paths = self._paths(run.name)
        trained = read_document(self._cost(run.name), Trained, REMEDY)
        record = make_record(
            self.plan,
            run,
            paths,
            reference=read_figures(self._paths(run.reference), REFERENCE),
            stage1=self._stage1_cost(run.table) if run.table else None,
            setup=trained.setup_seconds,
            cpu_seconds=trained.cpu_seconds,
            conditions=trained.conditions,
        )
        write_record(self.results, run, record)
        # They continue a training, and this one has ended; a large model's take most of the disk.
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
        return record

    def missing(self, run: Run) -> list[str]:
        """The names of the steps that are still to do for a run."""
        steps = []
        if run.base is not None and not self._paths(run.base).base_model.exists():
            steps.append(f"base-model {run.base}")
        if run.table is not None:
            largest = self.plan.largest(run.table)
            tables = dict.fromkeys([largest, run.table])
            steps += [f"vstar {table.samples} {table.name}" for table in tables if not self._has(table)]
        if not self._cost(run.name).exists():
            steps.append(f"train {run.name}")
        for model, name in ((REFERENCE, run.reference), (TRAINED, run.name)):
            if not read_figures(self._paths(name), model):
                steps.append(f"evaluate {name}")
        return steps

    def _do(self, step: str, run: Run) -> None:
        command, *names = step.split(" ")
        if command == "base-model":
            self._command("base-model", names[0], run)
        elif command == "vstar":
            assert run.table is not None, "only runs that need it have this step"
            largest = self.plan.largest(run.table)
            self._compute(largest if names[1] == largest.name else run.table, run)
        elif command == "train":
            self._train(run)
        else:
            model = REFERENCE if names[0] == run.reference else TRAINED
            self._command("evaluate", names[0], run, options=["--model", model])

    def _compute(self, table: Table, run: Run) -> None:
        """Stage 1 for a table: draws what is missing, then keeps a copy of the result."""
        values = [
            f"vstar.num_samples={table.num_samples}",
            f"vstar.beta1={as_toml(table.beta1)}",
            f"vstar.drop_unsolved={as_toml(table.drop_unsolved)}",
        ]
        cost = self._command("vstar", table.samples, run, values)
        with atomic_path(self._file(table)) as temporary:
            shutil.copyfile(self._paths(table.samples).vstar, temporary)
        recorded = read_provenance(self._file(table)).context["cost"]
        # Of a job that was stopped, only its samples know how long they took.
        seconds = recorded["seconds"] or 0.0
        drawn = Drawn(
            seconds=max(cost.seconds, seconds),
            sampling_seconds=seconds - recorded["loading_seconds"],
            peak_gib=cost.peak_gib,
        )
        write_text(self._cost(f"{table.samples}-{table.name}"), drawn.model_dump_json())

    def _train(self, run: Run) -> None:
        paths = self._paths(run.name)
        if paths.trained_with.exists():
            shutil.rmtree(paths.root)  # it ended, and its cost was not written
        before = [line for line, _ in read_metrics(paths.metrics)]
        options = [] if run.table is None else ["--vstar", str(self._file(run.table))]
        cost = self._command("train", run.name, run, options=options, processes=self.plan.processes)
        after = read_metrics(paths.metrics)
        # The lines of iterations that an earlier process did are kept as they are.
        kept = next(
            (place for place, (old, new) in enumerate(zip(before, after, strict=False)) if old != new[0]),
            min(len(before), len(after)),
        )
        own = sum(training_seconds([values for _, values in after[kept:]]))
        trained = Trained(
            setup_seconds=cost.seconds - own,
            cpu_seconds=None if before else cost.cpu_seconds,
            conditions=conditions(run),
        )
        write_text(self._cost(run.name), trained.model_dump_json(indent=1))

    def _command(
        self,
        command: str,
        name: str,
        run: Run,
        values: Sequence[str] = (),
        *,
        options: Sequence[str] = (),
        processes: int = 1,
    ) -> Finished:
        model = [] if run.base is None else [f"model.path={self._paths(run.base).base_model.absolute()}"]
        overrides = [*run.arm.overrides(run.seed), *(model if command != "base-model" else []), *values]
        arguments = [
            *program(processes),
            *(command, "--config", str(self.plan.config), "--run", name),
            *(part for override in overrides for part in ("--set", override)),
            *options,
        ]
        log = self.root / "logs" / f"{name}-{command}.log"
        environment = {"ASTAR_PO_ARTIFACTS": str(self.runs.absolute())}
        try:
            return self.execute(arguments, log, environment)
        except UserError as error:
            raise StepFailed(str(error)) from error

    def _stage1_cost(self, table: Table) -> tuple[float, float]:
        """Seconds of stage 1, of whose sampling a table with fewer samples has its share, and the peak in GiB."""
        largest = self.plan.largest(table)
        cost = read_document(self._cost(f"{largest.samples}-{largest.name}"), Drawn, REMEDY)
        return cost.of(table.num_samples / largest.num_samples), cost.peak_gib

    def _has(self, table: Table) -> bool:
        return self._file(table).exists() and self._cost(f"{table.samples}-{table.name}").exists()

    def _file(self, table: Table) -> Path:
        return self._paths(table.samples).root / "tables" / f"{table.name}.parquet"

    def _cost(self, name: str) -> Path:
        return self.root / "costs" / f"{name}.json"

    def _paths(self, name: str) -> RunPaths:
        return RunPaths(self.runs / name)
