"""The steps of a run of rounds, each a command of the command line in a process of its own.

A step is done if its record is there, which is written right after it. If that was prevented, the step is repeated:
a command continues, or finds that nothing is left to do, or begins anew if its files do not know its cost.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.config import RunConfig
from common.documents import read_document, read_metrics
from common.errors import UserError
from common.files import atomic_path, write_text
from common.model.files import model_identity, reference_model
from common.processes import Execute, Finished, program
from common.provenance import differences, read_provenance
from common.rounds.plan import Plan, Round, Step
from common.segments.cost import recorded_cost
from common.settings import Loader, as_document, flat, shown
from common.steps import REMEDY, remove_checkpoints, remove_result
from common.terminal.console import Terminal
from common.training_cost import training_seconds

MAY_CHANGE = (
    *("engine.", "grader.workers", "grader.max_concurrent", "grader.timeout_seconds", "grader.memory_gib"),
    *(
        "train.tokens_per_micro_batch",
        "train.gradient_checkpointing",
        "train.offload_reference",
        "train.zero_stage",
    ),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.wandb_project", "train.hang_minutes"),
    "model.path",
)
"""Beginnings of the keys that may change between two calls: resources, observation, and the place of the reference,
which is known by its weights."""


class KnownModel(BaseModel):
    """A model, and its identity when it was used first."""

    path: str
    identity: dict[str, Any]


class Pointer(BaseModel):
    """round.json: a round's place among the others."""

    number: int
    run: str
    """The run whose rounds they are."""
    before: str | None
    """The run of the round before; None in round 1."""
    seed: int
    where: list[str]
    reference: KnownModel
    first_reference: KnownModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Does the steps of rounds."""

    plan: Plan
    console: Terminal
    execute: Execute

    def prepare(self, begun: Sequence[Round], load: Loader) -> None:
        """Write the config of the first run. Raises UserError if it is not that of the rounds that have begun."""
        for round in begun:
            _refuse_changed(round.config, load(round.paths.settings)[0])
            if (before := self._pointer(round).where) != list(self.plan.where):
                raise UserError(
                    f"the prompts of {round.config.run} were chosen by --where {before or 'nothing'}, now by "
                    f"{list(self.plan.where) or 'nothing'}; give the same, or choose another --run"
                )
        write_text(self.plan.paths.settings, as_document(self.plan.config))

    def make_base_model(self) -> None:
        """Make the demo's reference if it is not there."""
        step = self.plan.base_model
        if step is not None and not self.plan.paths.base_model.exists():
            self.console.print(f"{self.plan.config.run}: {step.name}")
            self._do(step)

    def complete(self, round: Round) -> bool:
        """Do whatever is missing of a round; returns whether anything was. Raises UserError."""
        self._begin(round)
        missing = [step for step in round.steps if not step.paths.step(step.name, "json").exists()]
        for step in missing:
            self.console.print(f"round {round.number}: {step.name}")
            try:
                self._do(step)
            except UserError as error:
                raise UserError(
                    f"round {round.number}, {step.name}: {error}; mend the cause, and start the same command again: it "
                    "repeats nothing that is done"
                ) from error
        remove_checkpoints(round.paths)
        return bool(missing)

    def _begin(self, round: Round) -> None:
        """Write a round's config and pointer. Raises UserError if its reference is no longer the one it began with."""
        folder = reference_model(round.config)
        identity = model_identity(folder, self.plan.paths.known_weights)
        if round.number == 1:
            self._refuse_other_vstar(folder, identity)
        has_begun = round.paths.pointer.exists()
        if has_begun and self._pointer(round).reference.identity != identity:
            raise UserError(
                f"{folder} is not the model that {round.config.run} began with: bring it back, or remove the folders "
                "of that round and of those after it"
            )
        if not has_begun and round.paths.config.exists():
            raise UserError(
                f"{round.paths.root} is another run, not a round of {self.plan.config.run}: rename or remove it, or "
                "choose another --run"
            )
        write_text(round.paths.settings, as_document(round.config))
        if not has_begun:
            reference = KnownModel(path=round.config.model.path, identity=identity)
            write_text(round.paths.pointer, self._placed(round, reference).model_dump_json(indent=2) + "\n")

    def _refuse_other_vstar(self, folder: Path, identity: dict[str, Any]) -> None:
        """Raise UserError if the first run has a table of another model, beside which it could not evaluate."""
        table = self.plan.paths.vstar
        if not self.plan.config.is_evaluated or not table.is_file():
            return
        if lines := differences(identity, read_provenance(table).identity["model"]):
            raise UserError(
                f"{table} is of another model than {folder}, which the rounds are to start at: "
                f"{'; '.join(lines.values())}; remove that file, or choose another --run"
            )

    def _placed(self, round: Round, reference: KnownModel) -> Pointer:
        is_first = round.number == 1
        return Pointer(
            number=round.number,
            run=self.plan.config.run,
            before=None if is_first else self.plan.round(round.number - 1).config.run,
            seed=round.config.seed,
            where=list(self.plan.where),
            reference=reference,
            first_reference=reference if is_first else self._pointer(self.plan.round(1)).reference,
        )

    def _pointer(self, round: Round) -> Pointer:
        remedy = "remove the folder of the round: it is then begun again"
        return read_document(round.paths.pointer, Pointer, remedy)

    def _do(self, step: Step) -> None:
        remove_result(step.name, step.paths)
        arguments = [*program(step.processes), *step.arguments]
        cost = self.execute(arguments, step.paths.step(step.name, "log"), {})
        if step.name == "evaluate":
            _share(step.paths.evaluations / "samples", self.plan.paths.evaluations / "samples")
        cost = cost.model_copy(update={"seconds": max(cost.seconds, _recorded_seconds(step))})
        write_text(step.paths.step(step.name, "json"), cost.model_dump_json())


def cost_of(step: Step) -> Finished | None:
    """The cost of a step; None if it is not done."""
    path = step.paths.step(step.name, "json")
    return read_document(path, Finished, REMEDY) if path.exists() else None


def _recorded_seconds(step: Step) -> float:
    """The seconds that a step's own files know of: of one that was stopped, its last process does not know them all."""
    if step.name == "vstar":
        return read_provenance(step.paths.vstar).context.get("cost", {}).get("seconds") or 0.0
    if step.name == "segments":
        return recorded_cost(step.paths.segments).get("seconds") or 0.0
    if step.name == "train":
        return sum(training_seconds([values for _, values in read_metrics(step.paths.metrics)]))
    return 0.0


def _share(source: Path, target: Path) -> None:
    """Give another store the samples of this one, whose files are named by their content and never change."""
    for file in source.glob("*/*.parquet"):
        place = target / file.relative_to(source)
        if not place.exists():
            with atomic_path(place) as temporary:
                shutil.copyfile(file, temporary)


def _refuse_changed(now: RunConfig, before: RunConfig) -> None:
    """Raise UserError if a config is not the one that a round began with."""
    for key, old, new in _changes(before, now):
        if not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{now.run} began with other settings than those now: {key} was {shown(old)} and is {shown(new)}; give "
                "the same, or choose another --run"
            )


def _changes(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    old, new = (flat(json.loads(config.to_json())) for config in (before, now))
    for key in {**old, **new}:
        values = old.get(key, "not set"), new.get(key, "not set")
        if values[0] != values[1]:
            yield key, *values
