"""Means over seeds with 95 % intervals, and the tables of a study."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.config import HELD_OUT
from common.evaluations import Figures
from common.report.sheet import Cell, Sheet
from common.study.plan import Arm, Plan
from common.study.records import Record

LEVEL = 0.95
SECONDS_A_MINUTE, SECONDS_AN_HOUR = 60.0, 3600.0
HOURS_FROM = 3 * SECONDS_AN_HOUR
"""From this longest run on, tables are in hours."""

POINTS_OF_A_CURVE = 4
"""Evaluations during training, the one before the first iteration included, from which a time is told."""

Values = Mapping[int, float]
"""A figure by seed."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds; `half` is half the width of Student's 95 % interval, None for a single seed."""

    value: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean | None":
        """None for no values."""
        if not values:
            return None
        value = statistics.fmean(values)
        if len(values) == 1:
            return cls(value, None, 1)
        from scipy.stats import t

        quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
        return cls(value, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def text(self, digits: int, *, signed: bool = False) -> str:
        sign = "+" if signed else ""
        text = f"{self.value:{sign},.{digits}f}"
        return text if self.half is None else f"{text} ± {self.half:,.{digits}f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of the tables; it may lack a value for some runs."""

    title: str
    digits: int
    of: Callable[[Record], float | None]
    better: Literal["low", "high"] | None = None
    is_time: bool = False
    """Whether other work on the machine changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A plan and the records of its finished runs, by arm and seed."""

    plan: Plan
    records: Mapping[tuple[str, int], Record]

    @classmethod
    def of(cls, plan: Plan, records: Mapping[str, Record]) -> "Summary":
        """`records` by record name."""
        return cls(
            plan=plan,
            records={
                (run.arm.name, run.seed): records[run.record_name]
                for run in plan.runs
                if run.record_name in records
            },
        )

    @property
    def arms(self) -> list[Arm]:
        """The arms that have a record."""
        return [arm for arm in self.plan.arms if self.of_arm(arm)]

    @property
    def has_equal_seeds(self) -> bool:
        """Whether all arms of the plan have as many records."""
        return len({len(self.of_arm(arm)) for arm in self.plan.arms}) == 1

    def of_arm(self, arm: Arm) -> dict[int, Record]:
        """An arm's records by seed."""
        return {seed: record for (name, seed), record in self.records.items() if name == arm.name}

    def values(self, arm: Arm, of: Callable[[Record], float | None]) -> Values:
        """A figure of an arm's runs, by seed."""
        found = {seed: of(record) for seed, record in self.of_arm(arm).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, arm: Arm, of: Callable[[Record], float | None]) -> Mean | None:
        return Mean.of(list(self.values(arm, of).values()))

    @property
    def benchmarks(self) -> list[str]:
        """In the order of the config."""
        return list(dict.fromkeys(name for record in self.records.values() for name in record.trained))

    @property
    def unit(self) -> tuple[str, float]:
        """The unit of times, and its seconds."""
        longest = max((record.seconds.total for record in self.records.values()), default=0.0)
        return ("h", SECONDS_AN_HOUR) if longest >= HOURS_FROM else ("min", SECONDS_A_MINUTE)

    @property
    def time(self) -> Column:
        """Stage 1, set-up and iterations."""
        unit, seconds = self.unit
        return Column(
            title=f"time, {unit}",
            digits=2,
            of=lambda record: record.seconds.total / seconds,
            better="low",
            is_time=True,
        )

    def shown(self, columns: Sequence[Column]) -> list[Column]:
        """The columns without times, if the plan compares none."""
        return [column for column in columns if self.plan.times or not column.is_time]

    def accuracies(self) -> list[Column]:
        """Sampled and greedy accuracy on the held-out prompts, and the headline figure of each other benchmark."""
        others = [name for name in self.benchmarks if name != HELD_OUT]
        return [
            _accuracy("pass@1", HELD_OUT, lambda figures: figures.pass_at_1),
            _accuracy("greedy", HELD_OUT, lambda figures: figures.greedy_accuracy),
            *(_accuracy(name, name, lambda figures: figures.accuracy) for name in others),
        ]

    def main_table(self) -> Sheet:
        """The paper's Table 1: time, memory, KL and accuracies."""
        columns = self.columns()
        table = self._table("Results", columns)
        base = [_of_reference(self, column) for column in columns]
        return Sheet(
            title=table.title,
            header=[*table.header, "seeds"],
            rows=[
                ("reference", [*base, Cell(text="/")]),
                *(
                    (name, [*cells, Cell(text=str(len(self.of_arm(arm))))])
                    for arm, (name, cells) in zip(self.arms, table.rows, strict=True)
                ),
            ],
        )

    def columns(self) -> list[Column]:
        """Those of the main table."""
        return self.shown([self.time, MEMORY, KL, *self.accuracies(), TOKENS])

    def cost_table(self) -> Sheet:
        """Time and memory by phase."""
        title = "Time and memory by phase" if self.plan.times else "Tokens and memory"
        return self._table(title, self.shown(COSTS))

    def targets(self) -> list[Column]:
        """The time, and the iterations, until each of the plan's accuracies is reached."""
        times = [self._time_to(accuracy) for accuracy in self.plan.targets]
        return self.shown([*times, *(_iterations_to(accuracy) for accuracy in self.plan.targets)])

    def _time_to(self, accuracy: float) -> Column:
        unit, scale = self.unit

        def of(record: Record) -> float | None:
            seconds = record.seconds_to(accuracy)
            return None if seconds is None else seconds / scale

        return Column(title=f"time to {accuracy:g}, {unit}", digits=2, of=of, better="low", is_time=True)

    def _accuracy_at(self, part: float) -> Column:
        """Accuracy after a part of the time that the fastest arm of the same seed takes."""
        unit, scale = self.unit
        fastest: dict[int, float] = {}
        for record in (record for record in self.records.values() if record.curve):
            total = record.seconds.total
            fastest[record.seed] = min(fastest.get(record.seed, total), total)
        mean = statistics.fmean(fastest.values()) * part / scale
        return Column(
            title=f"pass@1 after {mean:.2f} {unit}",
            digits=3,
            of=lambda record: record.accuracy_at(fastest.get(record.seed, 0.0) * part),
            better="high",
            is_time=True,
        )

    def speed_table(self) -> Sheet | None:
        """Time and iterations to an accuracy, and accuracy at an equal time.

        None if training was not evaluated often enough, or the plan has no target and compares no times. Arms whose
        training is not evaluated have none of them.
        """
        curves = [len(record.curve) for record in self.records.values() if record.curve]
        if min(curves, default=0) < POINTS_OF_A_CURVE:
            return None
        columns = self.shown([*self.targets(), self._accuracy_at(0.5), self._accuracy_at(1.0)])
        title = (
            "Time to an accuracy, and accuracy at an equal time"
            if self.plan.times
            else "Iterations to an accuracy"
        )
        return self._table(title, columns) if columns else None

    def paired_table(self) -> Sheet | None:
        """Differences to the first arm on the seeds that both have; None if there are no two arms."""
        if len(self.arms) < 2:
            return None
        first, *others = self.arms
        differences = [*self.accuracies(), KL]
        ratios = self.shown([self.time, *self.targets(), MEMORY])
        rows = []
        for arm in others:
            cells = [self._difference(arm, first, column) for column in differences]
            cells += [self._ratio(arm, first, column) for column in ratios]
            rows.append((arm.name, cells))
        return Sheet(
            title=f"Each arm against {first.name}, seed by seed",
            header=[
                *(f"{column.title}, difference" for column in differences),
                *(f"{column.title.partition(',')[0]}, ratio" for column in ratios),
            ],
            rows=rows,
        )

    def _difference(self, arm: Arm, first: Arm, column: Column) -> Cell:
        ours, theirs = self.values(arm, column.of), self.values(first, column.of)
        mean = Mean.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        if mean is None:
            return Cell(text="–")
        return Cell(text=mean.text(column.digits, signed=True) + _part(mean, self._common(arm, first)))

    def _ratio(self, arm: Arm, first: Arm, column: Column) -> Cell:
        ours, theirs = self.values(arm, column.of), self.values(first, column.of)
        logs = [math.log(ours[seed] / theirs[seed]) for seed in ours if theirs.get(seed) and ours[seed]]
        if (mean := Mean.of(logs)) is None:
            return Cell(text="–")
        text = f"{math.exp(mean.value):.2f} ×"
        if mean.half is not None:
            text += f" ({math.exp(mean.value - mean.half):.2f}–{math.exp(mean.value + mean.half):.2f})"
        return Cell(text=text + _part(mean, self._common(arm, first)))

    def _common(self, arm: Arm, first: Arm) -> int:
        """How many seeds both have."""
        return len(self.of_arm(arm).keys() & self.of_arm(first).keys())

    def _table(self, title: str, columns: Sequence[Column]) -> Sheet:
        ranked = [self._cells(column) for column in columns]
        rows = [(arm.name, [cells[number] for cells in ranked]) for number, arm in enumerate(self.arms)]
        return Sheet(title=title, header=[column.title for column in columns], rows=rows)

    def _cells(self, column: Column) -> list[Cell]:
        """A column of a table, one cell for each arm.

        An arm with fewer seeds than another, or with seeds that lack the figure, has no rank.
        """
        means = [self.mean(arm, column.of) for arm in self.arms]
        counts = [len(self.of_arm(arm)) for arm in self.arms]
        whole = [mean if mean and mean.count == max(counts) else None for mean in means]
        return [
            Cell(text=_text(mean, count, column.digits), rank=rank)
            for mean, count, rank in zip(means, counts, _ranks(whole, column.better), strict=True)
        ]


def _text(mean: Mean | None, count: int, digits: int) -> str:
    """The mean of a figure; of how many seeds, if some of `count` lack it."""
    return "–" if mean is None else mean.text(digits) + _part(mean, count)


def _part(mean: Mean, count: int) -> str:
    """Of how many seeds a mean is, if some of `count` lack the figure."""
    return f", in {mean.count} of {count}" if mean.count < count else ""


def _iterations_to(accuracy: float) -> Column:
    return Column(
        title=f"iterations to {accuracy:g}",
        digits=0,
        of=lambda record: record.iterations_to(accuracy),
        better="low",
    )


def _accuracy(title: str, benchmark: str, figure: Callable[[Figures], float | None]) -> Column:
    def of(record: Record) -> float | None:
        found = record.trained.get(benchmark)
        return None if found is None else figure(found)

    return Column(title=title, digits=3, of=of, better="high")


KL = Column(
    title="KL(π‖π_ref)", digits=3, of=lambda record: record.trained[HELD_OUT].kl_sequence, better="low"
)
MEMORY = Column(title="memory, GiB", digits=2, of=lambda record: record.peak_gib, better="low")
TOKENS = Column(title="tokens", digits=1, of=lambda record: record.trained[HELD_OUT].completion_tokens_mean)
COSTS = [
    Column(title="stage 1, s", digits=1, of=lambda record: record.seconds.stage1, is_time=True),
    Column(title="set-up, s", digits=1, of=lambda record: record.seconds.setup, is_time=True),
    Column(title="iterations, s", digits=1, of=lambda record: record.seconds.training, is_time=True),
    Column(
        title="an iteration, s",
        digits=2,
        of=lambda record: record.seconds.training / record.iterations,
        better="low",
        is_time=True,
    ),
    Column(title="iterations", digits=0, of=lambda record: float(record.iterations)),
    Column(title="processor, s", digits=0, of=lambda record: record.cpu_seconds, better="low", is_time=True),
    Column(title="sampled tokens, k", digits=0, of=lambda record: record.sampled_tokens / 1000, better="low"),
    Column(title="training, GiB", digits=2, of=lambda record: record.peak_gib),
    Column(title="stage 1, GiB", digits=2, of=lambda record: record.stage1_peak_gib),
]


def _ranks(means: Sequence[Mean | None], better: Literal["low", "high"] | None) -> list[int | None]:
    """1 for the best of the means, among three or more also 2 for the second; equal ones share a rank."""
    known = sorted({mean.value for mean in means if mean is not None}, reverse=better == "high")
    if better is None or len(known) < 2:
        return [None] * len(means)
    ranked = {value: rank for rank, value in enumerate(known[: 2 if len(known) > 2 else 1], start=1)}
    return [None if mean is None else ranked.get(mean.value) for mean in means]


def _of_reference(summary: Summary, column: Column) -> Cell:
    """An accuracy, or the mean length, of the reference model, as the first record of each seed has it."""
    mean = None
    if column.better == "high" or column is TOKENS:
        by_seed = {record.seed: record for record in reversed(list(summary.records.values()))}
        as_trained = [record.model_copy(update={"trained": record.reference}) for record in by_seed.values()]
        mean = Mean.of([value for record in as_trained if (value := column.of(record)) is not None])
    return Cell(text="/" if mean is None else mean.text(column.digits))
