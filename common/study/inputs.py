"""The tables that training reads, and the commands that make them: steps, each done once for all runs that share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from pydantic import BaseModel

from common.provenance import read_provenance
from common.runs import RunPaths
from common.segments.files import SEGMENTS_TABLE
from common.settings import as_toml
from common.store import sample_files
from common.study.plan import AdvantagesTable, Plan, VstarTable
from common.vstar_file import scan_vstar


class Cost(BaseModel):
    """The cost of a step."""

    seconds: float
    sampling_seconds: float = 0.0
    """The part that grows with the number of samples, if runs share some of them: the rest is starting and loading."""
    peak_gib: float

    def of(self, part: float) -> float:
        """The seconds that a part of the samples would have taken."""
        return self.seconds - self.sampling_seconds * (1 - part)


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
    may_share: bool = False
    """Whether several processes can do it together."""

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


NOTHING = Inputs(options=(), steps=(), cost=lambda cost_of: Cost(seconds=0.0, peak_gib=0.0), tokens=lambda: 0)


def inputs_of(
    table: VstarTable | AdvantagesTable | None, plan: Plan, paths_of: Callable[[str], RunPaths]
) -> Inputs:
    """The inputs of a run that trains on this table; `paths_of` a run's name."""
    match table:
        case VstarTable():
            return _vstar(table, plan.largest(table), paths_of(table.samples))
        case AdvantagesTable():
            return _advantages(table, paths_of(table.states), paths_of(table.values))
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
            ],
        )

    def cost(cost_of: Callable[[InputStep], Cost]) -> Cost:
        drawn = cost_of(step(largest))
        part = table.num_samples / largest.num_samples
        return Cost(seconds=drawn.of(part), peak_gib=drawn.peak_gib)

    def tokens() -> int:
        parts = scan_vstar(_kept(paths, table.name), ["completion_tokens"])
        return sum(int(part["completion_tokens"].list.sum().sum()) for part in parts)

    return Inputs(
        options=["--vstar", str(_kept(paths, table.name))],
        steps=[step(each) for each in dict.fromkeys([largest, table])],
        cost=cost,
        tokens=tokens,
    )


def _advantages(table: AdvantagesTable, states: RunPaths, values: RunPaths) -> Inputs:
    given = ["--segments", str(states.segments.absolute())]
    steps = [InputStep(command="segments", paths=states, made=states.segments)]
    if table.has_critic:
        steps.append(
            InputStep(command="critic", paths=values, made=values.critic, options=given, may_share=True)
        )
    steps.append(
        InputStep(
            command="advantages",
            paths=values,
            made=values.advantages,
            kept=_kept(values, table.name),
            options=given,
        )
    )

    def cost(cost_of: Callable[[InputStep], Cost]) -> Cost:
        costs = [cost_of(step) for step in steps]
        return Cost(
            seconds=sum(each.seconds for each in costs), peak_gib=max(each.peak_gib for each in costs)
        )

    def tokens() -> int:
        solutions = pl.scan_parquet(sample_files(states.samples)).select(pl.col("completion_tokens").sum())
        identity = SEGMENTS_TABLE.provenance(states.segments).identity
        # If the completer is the reference, the completions of a prompt itself are solutions.
        first = 1 if identity["segments"]["completer"] == identity["model"] else 0
        parts = SEGMENTS_TABLE.scan(states.segments, ["step", "completion_tokens"])
        drawn = (part.filter(pl.col("step") >= first)["completion_tokens"].list.sum().sum() for part in parts)
        return int(solutions.collect().item()) + sum(map(int, drawn))

    return Inputs(
        options=["--advantages", str(_kept(values, table.name))], steps=steps, cost=cost, tokens=tokens
    )


def _kept(paths: RunPaths, name: str) -> Path:
    return (paths.root / "tables" / f"{name}.parquet").absolute()


def drawn_cost(file: Path, seconds: float, peak_gib: float) -> Cost:
    """The cost of a process that drew the samples of a vstar.parquet, which may know of earlier processes."""
    recorded = read_provenance(file).context.get("cost", {})
    # Of a job that was stopped, only its samples know how long they took.
    drawn = recorded.get("seconds") or 0.0
    return Cost(
        seconds=max(seconds, drawn),
        sampling_seconds=drawn - recorded.get("loading_seconds", 0.0),
        peak_gib=peak_gib,
    )
