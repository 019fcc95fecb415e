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
from common.evaluations import REFERENCE, TRAINED
from common.files import atomic_path, discard, write_text
from common.processes import Execute, Finished, program
from common.remote.places import named
from common.runs import OWN, RunPaths
from common.settings import as_toml, own_models
from common.steps import BY_SEVERAL, REMEDY, remove_checkpoints, remove_result
from common.store import sample_files
from common.study.inputs import Cost, Inputs, InputStep, cost_of_step, inputs_of
from common.study.plan import Plan, Run
from common.study.records import Conditions, Record, conditions, make_record, read_figures, write_record
from common.terminal.console import Terminal
from common.training_cost import training_seconds


class StepFailed(UserError):
    """A step of a run ended with an error; runs that do without it can go on."""


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
            stage1=self._inputs(run).cost(self._cost_of) if run.table else None,
            stage1_tokens=self._inputs(run).tokens(),
            setup=trained.setup_seconds,
            cpu_seconds=trained.cpu_seconds,
            conditions=trained.conditions,
        )
        write_record(self.results, run, record)
        remove_checkpoints(paths)
        return record

    def missing(self, run: Run) -> list[str]:
        """The names of the steps that are still to do for a run."""
        steps = []
        if run.base is not None and not self._paths(run.base).base_model.exists():
            steps.append(f"base-model {run.base}")
        steps += [step.title for step in self._inputs(run).steps if not self._is_done(step)]
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
        elif command == "train":
            self._train(run)
        elif command == "evaluate":
            model = REFERENCE if names[0] == run.reference else TRAINED
            self._command("evaluate", names[0], run, options=["--model", model])
        else:
            self._make(next(each for each in self._inputs(run).steps if each.title == step), run)

    def _inputs(self, run: Run) -> Inputs:
        return inputs_of(run.table, self.plan, self._paths)

    def _make(self, step: InputStep, run: Run) -> None:
        """Do a step, keep a copy of its result and its cost."""
        is_continued = step.draws and bool(sample_files(step.paths.samples))
        if step.starts_over:
            remove_result(step.command, step.paths)
        last = self._command(step.command, step.paths.root.name, run, step.values, options=step.options)
        if step.kept is not None:
            with atomic_path(step.kept) as temporary:
                shutil.copyfile(step.made, temporary)
        cost = cost_of_step(step, last, is_continued=is_continued)
        write_text(self._cost(step.name), cost.model_dump_json())

    def _train(self, run: Run) -> None:
        paths = self._paths(run.name)
        if paths.trained_with.exists():
            discard(paths.root)  # it ended, and its cost was not written
        before = [line for line, _ in read_metrics(paths.metrics)]
        cost = self._command("train", run.name, run, options=self._inputs(run).options)
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
    ) -> Finished:
        models = self._models(run) if command != "base-model" else []
        overrides = [*run.arm.overrides(run.seed), *models, *values]
        arguments = [
            *program(self.plan.processes if command in BY_SEVERAL else 1),
            *(command, "--config", str(self.plan.config), "--run", name),
            *(part for override in overrides for part in ("--set", override)),
            *options,
        ]
        log = self.root / "logs" / f"{name}-{command}.log"
        environment = {"ASTAR_PO_ARTIFACTS": named(self.runs)}
        try:
            return self.execute(arguments, log, environment)
        except UserError as error:
            raise StepFailed(str(error)) from error

    def _models(self, run: Run) -> list[str]:
        """The settings by which models of a run's own folder are those of the base run."""
        if run.base is None:
            return []
        base = named(self._paths(run.base).root)
        return [f"{key}={as_toml(path.replace(OWN, base))}" for key, path in own_models(run.config).items()]

    def _cost_of(self, step: InputStep) -> Cost:
        return read_document(self._cost(step.name), Cost, REMEDY)

    def _is_done(self, step: InputStep) -> bool:
        return step.result.exists() and self._cost(step.name).exists()

    def _cost(self, name: str) -> Path:
        return self.root / "costs" / f"{name}.json"

    def _paths(self, name: str) -> RunPaths:
        return RunPaths(self.runs / name)
