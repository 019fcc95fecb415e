"""The tables that training reads, and the commands that make them: steps, each done once for all runs that share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.processes import Finished
from common.provenance import read_provenance
from common.runs import RunPaths
from common.segments.cost import drawn_tokens, recorded_cost
from common.settings import as_toml
from common.study.plan import AdvantagesTable, Plan, VstarTable
from common.vstar_file import scan_vstar


class Cost(BaseModel):
    """The cost of a step."""

    seconds: float
    sampling_seconds: float = 0.0
    """The part that grows with the number of samples, if runs share some of them: the rest is starting and loading."""
    cpu_seconds: float | None = None
    """Processor time; None if it is not known, since an earlier process did a part of the step."""
    peak_gib: float

    def of(self, part: float) -> "Cost":
        """The cost that a part of the samples would have had; processor time is taken as spread evenly over time."""
        seconds = self.seconds - self.sampling_seconds * (1 - part)
        cpu_seconds = None if self.cpu_seconds is None else self.cpu_seconds * seconds / self.seconds
        return Cost(seconds=seconds, cpu_seconds=cpu_seconds, peak_gib=self.peak_gib)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStep:
    """A command that makes something that training reads."""

    command: str
    paths: RunPaths
    """The run in whose folder it works."""
    made: Path
    """The file or folder that it makes there."""
    kept: Path | None = None
    """Where a copy is kept, if the next such step writes over it."""
    values: Sequence[str] = ()
    """Settings besides the arm's."""
    options: Sequence[str] = ()
    starts_over: bool = False
    """Whether it begins anew if its cost is not recorded: its files do not know how long an earlier process took."""

    @property
    def name(self) -> str:
        """Of its cost."""
        return f"{self.paths.root.name}-{self.kept.stem if self.kept else self.command}"

    @property
    def title(self) -> str:
        """For people."""
        return " ".join([self.command, self.paths.root.name, *([self.kept.stem] if self.kept else [])])

    @property
    def result(self) -> Path:
        """What shows that it is done."""
        return self.kept or self.made

    @property
    def draws(self) -> bool:
        """Whether it draws samples, of which it draws the missing ones alone."""
        return self.command in ("vstar", "segments")

    def recorded(self) -> dict[str, Any]:
        """The cost of its samples, as what it made has it."""
        if self.command == "segments":
            return recorded_cost(self.made)
        if self.command == "vstar":
            cost: dict[str, Any] = read_provenance(self.result).context.get("cost", {})
            return cost
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run's training reads."""

    options: Sequence[str]
    """By which the command `train` is told."""
    steps: Sequence[InputStep]
    cost: Callable[[Callable[[InputStep], Cost]], Cost]
    """The run's share of the steps' costs."""
    tokens: Callable[[], int]
    """The tokens that were sampled for it."""


NOTHING = Inputs(
    options=(),
    steps=(),
    cost=lambda cost_of: Cost(seconds=0.0, cpu_seconds=0.0, peak_gib=0.0),
    tokens=lambda: 0,
)


def inputs_of(
    table: VstarTable | AdvantagesTable | None, plan: Plan, paths_of: Callable[[str], RunPaths]
) -> Inputs:
    """The inputs of a run that trains on this table; `paths_of` a run's name."""
    match table:
        case VstarTable():
            return _vstar(table, plan.largest(table), paths_of(table.samples))
        case AdvantagesTable():
            return _advantages(table, plan.widest(table), paths_of(table.states), paths_of(table.values))
        case None:
            return NOTHING


def _vstar(table: VstarTable, largest: VstarTable, paths: RunPaths) -> Inputs:
    """The largest table is drawn first; the others are computed from its samples."""

    def step(each: VstarTable) -> InputStep:
        return InputStep(
            command="vstar",
            paths=paths,
            made=paths.vstar,
            kept=_kept(paths, each.name),
            values=[
                f"vstar.num_samples={each.num_samples}",
                f"vstar.beta1={as_toml(each.beta1)}",
                f"vstar.drop_unsolved={as_toml(each.drop_unsolved)}",
                f"vstar.keep_token_ids={as_toml(each.keep_token_ids)}",
            ],
        )

    def cost(cost_of: Callable[[InputStep], Cost]) -> Cost:
        return cost_of(step(largest)).of(table.num_samples / largest.num_samples)

    def tokens() -> int:
        parts = scan_vstar(_kept(paths, table.name), ["completion_tokens"])
        return sum(int(part["completion_tokens"].list.sum().sum()) for part in parts)

    return Inputs(
        options=["--vstar", str(_kept(paths, table.name))],
        steps=[step(each) for each in dict.fromkeys([largest, table])],
        cost=cost,
        tokens=tokens,
    )


def _advantages(
    table: AdvantagesTable, widest: AdvantagesTable, states: RunPaths, values: RunPaths
) -> Inputs:
    """The widest table is made first, with the critic's values; the others are computed from it, next to free."""
    given = ["--segments", str(states.segments.absolute())]

    def step(each: AdvantagesTable) -> InputStep:
        return InputStep(
            command="advantages",
            paths=values,
            made=values.advantages,
            kept=_kept(values, each.name),
            values=[f"advantages.min_gap={as_toml(each.min_gap)}"],
            options=given,
            starts_over=each == widest,
        )

    charged = [InputStep(command="segments", paths=states, made=states.segments)]
    if table.has_critic:
        charged.append(
            InputStep(command="critic", paths=values, made=values.critic, options=given, starts_over=True)
        )
    charged.append(step(widest))

    def cost(cost_of: Callable[[InputStep], Cost]) -> Cost:
        costs = [cost_of(each) for each in charged]
        return Cost(
            seconds=sum(each.seconds for each in costs),
            cpu_seconds=total([each.cpu_seconds for each in costs]),
            peak_gib=max(each.peak_gib for each in costs),
        )

    return Inputs(
        options=["--advantages", str(_kept(values, table.name))],
        steps=[*charged, *([step(table)] if table != widest else [])],
        cost=cost,
        tokens=lambda: drawn_tokens(states),
    )


def _kept(paths: RunPaths, name: str) -> Path:
    return (paths.root / "tables" / f"{name}.parquet").absolute()


def total(seconds: Sequence[float | None]) -> float | None:
    """The sum; None if one of them is not known."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def cost_of_step(step: InputStep, last: Finished, *, is_continued: bool) -> Cost:
    """The cost of a step from its last process; `is_continued`: there were samples before that."""
    recorded = step.recorded()
    # Of a job that was stopped, only its samples know how long they took.
    drawn = recorded.get("seconds") or 0.0
    return Cost(
        seconds=max(last.seconds, drawn),
        sampling_seconds=drawn - recorded.get("loading_seconds", 0.0),
        cpu_seconds=None if is_continued else last.cpu_seconds,
        peak_gib=last.peak_gib,
    )
