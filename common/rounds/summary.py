"""The rounds side by side: their figures, read from the files of their runs, as a table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from common.config import HELD_OUT
from common.documents import read_metrics
from common.evaluations import REFERENCE, TRAINED, Figures, Results, read_results
from common.report.page import duration
from common.report.sheet import Cell, Sheet
from common.rounds.plan import Plan, Round
from common.rounds.steps import cost_of
from common.runs import RunPaths
from common.segments.cost import drawn_tokens
from common.segments.files import ADVANTAGES_TABLE
from common.store import stored_tokens
from common.training_cost import drawn_in_training
from common.vstar_file import scan_vstar

UNKNOWN = "–"
INTERVAL = ", 95 %"
"""The end of the names of rows with intervals."""
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1:
    """Figures of a round's vstar.parquet."""

    prompts: int
    kept: int
    pass_rate: float
    vstar: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """The accuracy less that of the round before, on the same questions, with its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A round's figures; what it has not reached yet is missing."""

    name: str
    is_finished: bool
    """Whether all its steps are done."""
    figures: Mapping[str, Figures]
    """By benchmark, from the evaluation of all rounds: their KL is to the first reference."""
    gains: Mapping[str, Gain]
    """By benchmark."""
    own_kl: float | None
    """KL to the round's own reference."""
    stage1: Stage1 | None
    prompts: int | None
    """Prompts trained on; None if the objective takes them all."""
    tokens: int
    """Tokens of all completions that were drawn, without those of evaluations."""
    seconds: Mapping[str, float]
    """By step."""


def reached(plan: Plan) -> list[Reached]:
    """The reference, as round 0, and every round that has begun."""
    results = read_results(plan.paths) or Results(results=[])
    rounds = plan.begun()
    found = [
        Reached(
            name=REFERENCE,
            is_finished=True,
            figures=_figures_of(results, lambda model: model == REFERENCE),
            gains={},
            own_kl=None,
            stage1=None,
            prompts=None,
            tokens=0,
            seconds={},
        )
    ]
    for round in rounds:
        found.append(_reached(plan, round, results))
    return found


def _reached(plan: Plan, round: Round, results: Results) -> Reached:
    is_finished = all(cost_of(step) is not None for step in round.steps)
    if not is_finished:  # what the evaluation of all has of this round is of one that was removed
        results = Results(results=[])
    own = _figures_of(read_results(round.paths) or Results(results=[]), lambda model: model == TRAINED)
    stage1 = _stage1(round.paths) if "vstar" in plan.inputs else None
    return Reached(
        name=f"round {round.number}",
        is_finished=is_finished,
        figures=_figures_of(results, lambda model: _is_of(model, round)),
        gains=_gains(plan, round, results),
        own_kl=_kl(own),
        stage1=stage1,
        prompts=stage1.kept if stage1 else _prompts_of_states(round.paths),
        tokens=_tokens(round.paths, draws_states="segments" in plan.inputs),
        seconds=_seconds(round),
    )


def _seconds(round: Round) -> dict[str, float]:
    """By command; a round's two evaluations are one entry."""
    seconds: dict[str, float] = {}
    for step in round.steps:
        if (cost := cost_of(step)) is not None:
            command = step.arguments[0]
            seconds[command] = seconds.get(command, 0.0) + cost.seconds
    return seconds


def _is_of(model: str, round: Round) -> bool:
    """Whether a name in the results is that of a round's model, wherever the artifacts were then."""
    return Path(model).parts[-2:] == round.model.parts[-2:]


def _figures_of(results: Results, is_meant: Callable[[str], bool]) -> dict[str, Figures]:
    return {each.benchmark: each for each in results.results if is_meant(each.model)}


def _gains(plan: Plan, round: Round, results: Results) -> dict[str, Gain]:
    """The paired comparisons with the round before; a pair is in the order in which its models were evaluated last."""
    before = None if round.number == 1 else plan.round(round.number - 1)

    def is_before(model: str) -> bool:
        return model == REFERENCE if before is None else _is_of(model, before)

    found = {}
    for each in results.comparisons:
        low, high = each.interval_95
        if is_before(each.first) and _is_of(each.second, round):
            found[each.benchmark] = Gain(value=each.difference, interval=(low, high))
        elif is_before(each.second) and _is_of(each.first, round):
            found[each.benchmark] = Gain(value=-each.difference, interval=(-high, -low))
    return found


def _kl(figures: Mapping[str, Figures]) -> float | None:
    return next((each.kl_sequence for each in figures.values() if each.kl_sequence is not None), None)


def _stage1(paths: RunPaths) -> Stage1 | None:
    if not paths.vstar.exists():
        return None
    rows = pl.concat(scan_vstar(paths.vstar, ["pass_rate", "vstar", "keep"]))
    return Stage1(
        prompts=rows.height,
        kept=int(rows["keep"].sum()),
        pass_rate=statistics.fmean(rows["pass_rate"]),
        vstar=statistics.fmean(rows["vstar"]),
    )


def _prompts_of_states(paths: RunPaths) -> int | None:
    """The prompts of the states that the step-level method trains on."""
    if not paths.advantages.exists():
        return None
    rows = pl.concat(ADVANTAGES_TABLE.scan(paths.advantages, ["prompt_id", "keep"]))
    return rows.filter("keep")["prompt_id"].n_unique()


def _tokens(paths: RunPaths, *, draws_states: bool) -> int:
    before = drawn_tokens(paths) if draws_states else stored_tokens(paths.samples)
    return before + drawn_in_training([values for _, values in read_metrics(paths.metrics)])


def table(found: Sequence[Reached], *, is_short: bool = False) -> Sheet:
    """One column for each round, one row for each figure that any of them has.

    A short one, for a terminal, has accuracy and KL alone, without intervals.
    """
    benchmarks = list(dict.fromkeys(name for each in found for name in each.figures))
    rows: dict[str, Callable[[Reached], str]] = {}
    for name in benchmarks:
        rows |= _of_benchmark(name)
    rows |= {
        "KL to the first reference": lambda each: _number(_kl(each.figures)),
        "KL to the round's own reference": lambda each: _number(each.own_kl),
    }
    if is_short:
        rows = {name: of for name, of in rows.items() if not name.endswith(INTERVAL)}
    else:
        rows |= _of_work(list(dict.fromkeys(name for each in found for name in each.seconds)))
    cells = {name: [Cell(text=of(each)) for each in found] for name, of in rows.items()}
    return Sheet(
        title="The rounds side by side",
        header=[each.name for each in found],
        rows=[(name, row) for name, row in cells.items() if {cell.text for cell in row} != {UNKNOWN}],
    )


def _of_work(steps: Sequence[str]) -> dict[str, Callable[[Reached], str]]:
    """The rows about what a round trained on, and what it took."""
    return {
        "pass rate in stage 1": lambda each: _number(each.stage1.pass_rate if each.stage1 else None),
        "mean V̂* in stage 1": lambda each: _number(each.stage1.vstar if each.stage1 else None),
        "prompts trained on": _prompts,
        "tokens drawn": lambda each: f"{each.tokens:,}" if each.tokens else UNKNOWN,
        **{f"time: {name}": _time(name) for name in steps},
    }


def title_of(benchmark: str) -> str:
    """A benchmark's name for people."""
    return "held-out" if benchmark == HELD_OUT else benchmark


def _of_benchmark(name: str) -> dict[str, Callable[[Reached], str]]:
    title = title_of(name)

    def of(figure: Callable[[Figures], str]) -> Callable[[Reached], str]:
        return lambda each: figure(each.figures[name]) if name in each.figures else UNKNOWN

    def gained(figure: Callable[[Gain], str]) -> Callable[[Reached], str]:
        return lambda each: figure(each.gains[name]) if name in each.gains else UNKNOWN

    return {
        f"{title}: pass@1": of(lambda figures: _number(figures.pass_at_1)),
        f"{title}: pass@1{INTERVAL}": of(lambda figures: _interval(figures.pass_at_1_interval_95)),
        f"{title}: greedy": of(lambda figures: _number(figures.greedy_accuracy)),
        f"{title}: greedy{INTERVAL}": of(lambda figures: _interval(figures.greedy_accuracy_interval_95)),
        f"{title}: gain": gained(lambda gain: f"{gain.value:+.3f}"),
        f"{title}: gain{INTERVAL}": gained(lambda gain: _interval(gain.interval, sign="+")),
    }


def _prompts(each: Reached) -> str:
    if each.prompts is None:
        return UNKNOWN
    return f"{each.prompts:,} of {each.stage1.prompts:,}" if each.stage1 else f"{each.prompts:,}"


def _time(step: str) -> Callable[[Reached], str]:
    return lambda each: duration(each.seconds[step]) if step in each.seconds else UNKNOWN


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _interval(interval: Interval | None, *, sign: str = "") -> str:
    return UNKNOWN if interval is None else f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"
