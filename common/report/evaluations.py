"""The figures of `evaluate`, models side by side."""

from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel


class Result(BaseModel):
    """The figures of a model that are shown."""

    greedy_accuracy: float
    pass_at_1: float
    pass_at_1_interval_95: tuple[float, float]
    pass_at_k: dict[str, float]
    kl_sequence: float
    completion_tokens_mean: float


_ROWS: dict[str, Callable[[Result], str]] = {
    "greedy accuracy": lambda result: f"{result.greedy_accuracy:.3f}",
    "pass@1, sampled": lambda result: f"{result.pass_at_1:.3f}",
    "  95 % interval": lambda result: "{:.3f}–{:.3f}".format(*result.pass_at_1_interval_95),
    "pass@8": lambda result: f"{result.pass_at_k['8']:.3f}" if "8" in result.pass_at_k else "–",
    "KL(π‖π_ref), nats": lambda result: f"{result.kl_sequence:.3f}",
    "tokens a completion": lambda result: f"{result.completion_tokens_mean:.1f}",
}


def evaluation_rows(evaluations: Mapping[str, Result]) -> list[tuple[str, Sequence[str]]]:
    """A label, and one cell for each model."""
    return [(label, [cell(result) for result in evaluations.values()]) for label, cell in _ROWS.items()]
