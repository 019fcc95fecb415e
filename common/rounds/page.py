"""The page of a run of rounds, one self-contained HTML file, and beside it its table as Markdown."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.evaluations import Figures as Evaluated
from common.files import write_text
from common.report.page import render_page
from common.report.panels import Figures, Panel
from common.report.plots import GREYS, LINE_STYLES
from common.report.sheet import Sheet
from common.rounds.plan import Plan
from common.rounds.summary import Reached, reached, table, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REMARK = (
    "All models answer the same questions. Intervals are 95 %, by bootstrap over prompts; a gain is over the round "
    "before. KL is in nats per completion, on the first benchmark. Tokens are those drawn before and in training, not "
    "those of evaluations. The time of a step is that of its process; of one that was stopped, at least what its files "
    "record."
)


def write_rounds(plan: Plan) -> Sheet:
    """Write rounds.html and rounds.md into the folder of the first run; returns a short table for the terminal."""
    found = reached(plan)
    sheet = table(found)
    figures = _figures(found)
    notice = None if plan.config.is_evaluated else "The config has no benchmark, so nothing was evaluated."
    title = f"Rounds of {plan.config.run}"
    parts = [f"# {title}", *([notice] if notice else []), sheet.markdown(), REMARK]
    write_text(plan.paths.rounds("md"), "\n\n".join(parts) + "\n")
    html = render_page(
        Path(__file__).parent / "page.html.jinja",
        run=plan.config.run,
        key_figures=_key_figures(found),
        notice=notice,
        sheet=sheet,
        remark=REMARK,
        figures=figures,
        pictures=figures.pictures() if figures else [],
        rounds=[(f"round {each.number}", _described(plan, each.number)) for each in plan.begun()],
        settings=plan.paths.settings.read_text(encoding="utf-8"),
    )
    write_text(plan.paths.rounds("html"), html)
    return table(found, is_short=True)


def _key_figures(found: Sequence[Reached]) -> list[tuple[str, str]]:
    rounds = found[1:]
    finished = [each for each in rounds if each.is_finished]
    hours = sum(sum(each.seconds.values()) for each in rounds) / 3600
    return [
        ("rounds, finished", f"{len(finished)} of {len(rounds)}"),
        *(_accuracy(finished[-1]) if finished else []),
        ("tokens drawn", f"{sum(each.tokens for each in rounds):,}"),
        ("hours", f"{hours:.2f}"),
    ]


def _described(plan: Plan, number: int) -> list[tuple[str, str]]:
    round = plan.round(number)
    return [
        ("run", round.config.run),
        ("reference", round.config.model.path),
        ("seed", str(round.config.seed)),
        ("steps", ", ".join(step.name for step in round.steps)),
    ]


def _accuracy(each: Reached) -> list[tuple[str, str]]:
    """The accuracy on the first benchmark; [] if nothing is evaluated."""
    return [
        (f"accuracy, {title_of(name)}, {each.name}", f"{figures.accuracy:.3f}")
        for name, figures in [*each.figures.items()][:1]
    ]


def _figures(found: Sequence[Reached]) -> Figures | None:
    """Accuracy by round, and against KL to the first reference; None if nothing was evaluated."""
    benchmarks = list(dict.fromkeys(name for each in found for name in each.figures))
    if not benchmarks:
        return None
    return Figures(
        name="accuracy",
        title="Accuracy by round, and against KL",
        caption="Round 0 is the first reference. Bars: 95 % intervals.",
        panels=[
            _panel(found, benchmarks, "round", _by_round),
            _panel(found, benchmarks, "KL to the first reference", _by_kl),
        ],
    )


def _panel(
    found: Sequence[Reached],
    benchmarks: Sequence[str],
    xlabel: str,
    across: Callable[[int, Evaluated], float | None],
) -> Panel:
    """Accuracy on each benchmark against a figure of the model."""
    lines = {
        name: [
            (x, each.figures[name])
            for number, each in enumerate(found)
            if name in each.figures and (x := across(number, each.figures[name])) is not None
        ]
        for name in benchmarks
    }

    def draw(axes: "Axes") -> None:
        for place, (name, points) in enumerate(lines.items()):
            ys = [figures.accuracy for _, figures in points]
            ends = [figures.interval for _, figures in points]
            axes.errorbar(
                [x for x, _ in points],
                ys,
                yerr=[
                    [y - low for y, (low, _) in zip(ys, ends, strict=True)],
                    [high - y for y, (_, high) in zip(ys, ends, strict=True)],
                ],
                label=title_of(name),
                color=GREYS[place % len(GREYS)],
                linestyle=LINE_STYLES[place % len(LINE_STYLES)],
                marker="o",
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
            )
        if across is _by_round:
            axes.set_xticks(range(len(found)))
        axes.set(xlabel=xlabel, title="accuracy")

    words = [
        f"{title_of(name)}: " + ", ".join(f"{figures.accuracy:.3f} at {x:.3g}" for x, figures in points)
        for name, points in lines.items()
    ]
    return Panel(draw=draw, alt=f"Accuracy against {xlabel}. {'; '.join(words)}.")


def _by_round(number: int, figures: Evaluated) -> float | None:
    return float(number)


def _by_kl(number: int, figures: Evaluated) -> float | None:
    return figures.kl_sequence
