"""The figures of `evaluate`, models side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.evaluations import Comparison, Figures, Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A benchmark's table: a label and one cell per model in each row."""

    benchmark: str
    prompts: int
    models: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    comparisons: Sequence[str]
    """One line for each pair of models."""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else "{:.3f}–{:.3f}".format(*interval)


_ROWS: dict[str, Callable[[Figures], str]] = {
    "greedy accuracy": lambda figures: _number(figures.greedy_accuracy),
    "  95 % interval ": lambda figures: _interval(figures.greedy_accuracy_interval_95),
    "pass@1, sampled": lambda figures: _number(figures.pass_at_1),
    "  95 % interval": lambda figures: _interval(figures.pass_at_1_interval_95),
    "pass@8": lambda figures: _number(figures.pass_at_k.get("8")),
    "KL(π‖π_ref), nats": lambda figures: _number(figures.kl_sequence),
    "tokens per completion": lambda figures: f"{figures.completion_tokens_mean:.1f}",
    "truncated": lambda figures: f"{figures.truncated:.1%}",
}


def evaluated(results: Results) -> list[Evaluated]:
    """A table for each benchmark; rows without a figure are left out."""
    tables = []
    for benchmark in dict.fromkeys(each.benchmark for each in results.results):
        figures = [each for each in results.results if each.benchmark == benchmark]
        rows = [(label, [cell(each) for each in figures]) for label, cell in _ROWS.items()]
        tables.append(
            Evaluated(
                benchmark=benchmark.replace("_", "-"),
                prompts=figures[0].prompts,
                models=[each.model for each in figures],
                rows=[(label.rstrip(), cells) for label, cells in rows if set(cells) != {"–"}],
                comparisons=[_line(each) for each in results.comparisons if each.benchmark == benchmark],
            )
        )
    return tables


def _line(comparison: Comparison) -> str:
    low, high = comparison.interval_95
    return (
        f"{comparison.second} − {comparison.first}: {comparison.difference:+.3f} "
        f"(95 % interval {low:+.3f} to {high:+.3f}, p {comparison.p_value:.4f})"
    )
