"""The figures of a study, in the form of the paper's Figures 2 to 5: panels for the page, sheets of them as files."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from common.report.panels import Figures, Panel
from common.report.plots import GREYS, LINE_STYLES
from common.settings import shown
from common.study.plan import Arm
from common.study.records import Point, Record
from common.study.summary import KL, MEMORY, Column, Mean, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DARK = GREYS[:4]
"""The greys that a thin line is seen in."""
SYMBOLS = {
    "train.learning_rate": "learning rate",
    "vstar.num_samples": "N",
    "vstar.beta1": "β₁",
    "train.objective.beta2": "β₂",
    "train.objective.beta": "β",
    "train.objective.group_size": "completions per prompt",
}
"""How a key is written on an axis."""
OfPoint = Callable[[Record, Point], float | None]
"""A figure of an evaluation during training; None if it was not measured."""


def study_figures(summary: Summary) -> list[Figures]:
    """All figures that the records allow: panels without a value are left out, and figures without a panel."""
    if not summary.arms:
        return []
    loose = [arm for arm in summary.arms if arm.grid is None]
    methods = loose if len(loose) > 1 else summary.arms
    keys = dict.fromkeys(arm.key for arm in summary.arms if arm.key is not None)
    figures = [
        _trade_offs(summary, methods),
        _curves(summary, methods),
        *(_effect(summary, key) for key in keys),
    ]
    return [figure for figure in figures if figure.panels]


def _style(place: int) -> dict[str, Any]:
    """The style of the arm at a place: marker, grey and line; hollow markers after the first greys are used up."""
    return {
        "color": _grey(place),
        "marker": MARKERS[place % len(MARKERS)],
        "markerfacecolor": _grey(place) if place // len(DARK) % 2 == 0 else "1.0",
        "linestyle": LINE_STYLES[place % len(LINE_STYLES)],
        "markersize": 4.5,
        "linewidth": 1.2,
    }


def _grey(place: int) -> str:
    return DARK[place % len(DARK)]


def _accuracy(summary: Summary) -> Column:
    return summary.accuracies()[0]


def _trade_offs(summary: Summary, arms: Sequence[Arm]) -> Figures:
    """The paper's Figure 2: accuracy against time, memory and KL."""
    panels = [
        panel
        for column in summary.shown([summary.time, MEMORY, KL])
        if (panel := _against(summary, arms, column)) is not None
    ]
    return Figures(
        name="trade-offs",
        title=f"Accuracy against {'time, ' if summary.plan.times else ''}memory and KL",
        caption="In the form of the paper's Figure 2. Points: means over seeds; bars: 95 % intervals."
        + (" Time is stage 1, set-up and iterations." if summary.plan.times else ""),
        panels=panels,
    )


def _against(summary: Summary, arms: Sequence[Arm], column: Column) -> Panel | None:
    accuracy = _accuracy(summary)
    points = [
        (place, arm, across, up)
        for place, arm in enumerate(arms)
        if (across := summary.mean(arm, column.of)) is not None
        and (up := summary.mean(arm, accuracy.of)) is not None
    ]
    if not points:
        return None

    def draw(axes: "Axes") -> None:
        for place, arm, across, up in points:
            axes.errorbar(
                across.value,
                up.value,
                xerr=across.half,
                yerr=up.half,
                label=arm.name,
                **_style(place) | {"linestyle": "none", "elinewidth": 0.8},
            )
        axes.set(xlabel=column.title, title=f"held-out {accuracy.title}")

    words = [f"{arm.name} {up.text(3)} at {across.text(column.digits)}" for _, arm, across, up in points]
    return Panel(draw=draw, alt=f"{accuracy.title} against {column.title}: {'; '.join(words)}.")


def _curves(summary: Summary, arms: Sequence[Arm]) -> Figures:
    """Accuracy during training."""
    unit, seconds = summary.unit

    def time(record: Record, point: Point) -> float:
        return record.time(point) / seconds

    def kl(record: Record, point: Point) -> float | None:
        is_logged = any(each.kl is not None for each in record.curve)
        return 0.0 if is_logged and point.iteration == 0 else point.kl

    def accuracy(record: Record, point: Point) -> float | None:
        return point.accuracy

    panels = [
        panel
        for xlabel, across in (
            (f"time, {unit}", time) if summary.plan.times else ("iteration", _iteration),
            ("KL(π‖π_ref) in training", kl),
        )
        if (panel := _course(summary, arms, xlabel, across, accuracy, "held-out pass@1")) is not None
    ]
    return Figures(
        name="curves",
        title="Accuracy during training",
        caption="Means over seeds of the evaluations during training; shaded: 95 % intervals. "
        + ("Time includes loading and, where the arm needs it, stage 1. " if summary.plan.times else "")
        + "KL is the mean since the evaluation before; objectives without a reference do not log it.",
        panels=panels,
    )


def _iteration(record: Record, point: Point) -> float:
    return float(point.iteration)


def _course(
    summary: Summary, arms: Sequence[Arm], xlabel: str, across: OfPoint, up: OfPoint, title: str
) -> Panel | None:
    """One figure of training's evaluations against another; None if no arm has both."""
    lines = [
        (place, arm, points)
        for place, arm in enumerate(arms)
        if (points := _mean_course(list(summary.of_arm(arm).values()), across, up))
    ]
    if not lines:
        return None

    def draw(axes: "Axes") -> None:
        for place, arm, points in lines:
            xs = [x for x, _ in points]
            axes.plot(xs, [mean.value for _, mean in points], label=arm.name, **_style(place))
            if all(mean.half is not None for _, mean in points):
                low = [mean.value - (mean.half or 0.0) for _, mean in points]
                high = [mean.value + (mean.half or 0.0) for _, mean in points]
                axes.fill_between(xs, low, high, color=_grey(place), alpha=0.15, linewidth=0)
        axes.set(xlabel=xlabel, title=title)

    words = [
        f"{arm.name} {points[0][1].value:.3g} at {points[0][0]:.3g}, {points[-1][1].value:.3g} at {points[-1][0]:.3g}"
        for _, arm, points in lines
    ]
    return Panel(draw=draw, alt=f"{title} against {xlabel}: {'; '.join(words)}.")


def _mean_course(records: Sequence[Record], across: OfPoint, up: OfPoint) -> list[tuple[float, Mean]]:
    """Means over the records that have a value at an iteration; iterations that one of them lacks are left out."""
    by_iteration: dict[int, list[tuple[float, float]]] = {}
    for record in records:
        for point in record.curve:
            x, y = across(record, point), up(record, point)
            if x is not None and y is not None:
                by_iteration.setdefault(point.iteration, []).append((x, y))
    course = []
    for _, pairs in sorted(by_iteration.items()):
        if len(pairs) == len(records) and (mean := Mean.of([y for _, y in pairs])) is not None:
            course.append((sum(x for x, _ in pairs) / len(pairs), mean))
    return course


def _effect(summary: Summary, key: str) -> Figures:
    """The paper's Figures 3 to 5: what the values of a key do to the loss, the reward, the accuracy and the time."""
    arms = [arm for arm in summary.arms if arm.key == key]
    symbol = SYMBOLS.get(key, key)
    unit, seconds = summary.unit
    stage2 = Column(
        title=f"iterations of stage 2, {unit}",
        digits=2,
        of=lambda record: record.seconds.training / seconds,
        is_time=True,
    )
    panels = [
        _course(summary, arms, "iteration", _iteration, lambda record, point: point.loss, "regression loss"),
        _course(
            summary, arms, "iteration", _iteration, lambda record, point: point.reward, "training reward"
        ),
        *(_by_value(summary, arms, column, symbol) for column in summary.shown([_accuracy(summary), stage2])),
    ]
    return Figures(
        name=f"effect-{key.replace('.', '-')}",
        title=f"The effect of {symbol}",
        caption="In the form of the paper's Figures 3 to 5. Loss and reward: means since the evaluation before. Bars: "
        "95 % intervals over seeds. Dashed: arms without this key.",
        panels=[panel for panel in panels if panel is not None],
    )


def _ordered(values: Iterable[Any]) -> list[str]:
    """Different values as texts: numbers by size, others as the study has them."""
    each = {shown(value): value for value in values}
    if all(isinstance(value, int | float) for value in each.values()):
        return sorted(each, key=lambda text: float(each[text]))
    return list(each)


def _by_value(summary: Summary, arms: Sequence[Arm], column: Column, symbol: str) -> Panel | None:
    """A figure by the key's value, one line for each grid; other arms that are in no grid are level lines."""
    values = _ordered(arm.value for arm in arms)
    grids = dict.fromkeys(arm.grid for arm in arms)
    level = [(arm, summary.mean(arm, column.of)) for arm in summary.arms if arm.grid is None]
    found = {
        grid: sorted(
            (
                (values.index(shown(arm.value)), mean)
                for arm in arms
                if arm.grid == grid and (mean := summary.mean(arm, column.of)) is not None
            ),
            key=lambda point: point[0],
        )
        for grid in grids
    }
    if not any(found.values()):
        return None

    def draw(axes: "Axes") -> None:
        for place, (grid, points) in enumerate(found.items()):
            axes.errorbar(
                [x for x, _ in points],
                [mean.value for _, mean in points],
                yerr=[mean.half or 0.0 for _, mean in points],
                label=grid if len(found) + len(level) > 1 else None,
                **_style(place) | {"elinewidth": 0.8},
            )
        for place, (arm, mean) in enumerate(level):
            if mean is not None:
                axes.axhline(
                    mean.value, color=_grey(len(grids) + place), linestyle="--", linewidth=0.9, label=arm.name
                )
        axes.set_xticks(range(len(values)), values)
        axes.set(xlabel=symbol, title=column.title)

    words = [
        f"{grid}: " + ", ".join(f"{mean.text(column.digits)} at {values[x]}" for x, mean in points)
        for grid, points in found.items()
    ]
    return Panel(draw=draw, alt=f"{column.title} by {symbol}. {'; '.join(words)}.")
