"""The figures of `evaluate`, models side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.evaluations import TRAINED, Comparison, Figures, Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A benchmark's table: a label and one cell per model in each row."""

    benchmark: str
    prompts: int
    models: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str]
    """One line for each pair of models, and what else there is to say."""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else "{:.3f}–{:.3f}".format(*interval)


def _rows(figures: Sequence[Figures]) -> Iterator[tuple[str, list[str]]]:
    """The labels, and a cell of each of these."""
    yield "greedy accuracy", [_number(each.greedy_accuracy) for each in figures]
    yield "  95 % interval", [_interval(each.greedy_accuracy_interval_95) for each in figures]
    yield "pass@1, sampled", [_number(each.pass_at_1) for each in figures]
    yield "  95 % interval", [_interval(each.pass_at_1_interval_95) for each in figures]
    for k in sorted({int(k) for each in figures for k in each.pass_at_k} - {1}):
        yield f"pass@{k}", [_number(each.pass_at_k.get(str(k))) for each in figures]
    yield "KL(π‖π_ref), nats", [_number(each.kl_sequence) for each in figures]
    yield "tokens per completion", [f"{each.completion_tokens_mean:.1f}" for each in figures]
    yield "truncated", [f"{each.truncated:.1%}" for each in figures]


def evaluated(results: Results, *, of_trained: Sequence[str] = ()) -> list[Evaluated]:
    """A table for each benchmark; rows without a figure are left out.

    `of_trained` are notes on the figures of the run's trained model.
    """
    tables = []
    for benchmark in dict.fromkeys(each.benchmark for each in results.results):
        figures = [each for each in results.results if each.benchmark == benchmark]
        models = [each.model for each in figures]
        notes = [_line(each) for each in results.comparisons if each.benchmark == benchmark]
        tables.append(
            Evaluated(
                benchmark=benchmark.replace("_", "-"),
                prompts=figures[0].prompts,
                models=models,
                rows=[(label, cells) for label, cells in _rows(figures) if set(cells) != {"–"}],
                notes=[*notes, *(of_trained if TRAINED in models else ())],
            )
        )
    return tables


def _line(comparison: Comparison) -> str:
    low, high = comparison.interval_95
    return (
        f"{comparison.second} − {comparison.first}: {comparison.difference:+.3f} "
        f"(95 % interval {low:+.3f} to {high:+.3f}, p {comparison.p_value:.4f})"
    )
