"""What the lines of a training's metrics.jsonl say about its cost."""

from collections.abc import Mapping, Sequence

RATE, SECONDS = "throughput/completion_tokens_per_second", "time/iteration"


def training_seconds(lines: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """The seconds of iterations, and of the evaluations between them."""
    return (
        sum(line.get(SECONDS, 0.0) for line in lines),
        sum(line.get("time/evaluate", 0.0) for line in lines),
    )


def drawn_in_training(lines: Sequence[Mapping[str, float]]) -> int:
    """The completion tokens that were drawn; 0 for an objective that draws none, which logs no rate."""
    return round(sum(line[RATE] * line.get(SECONDS, 0.0) for line in lines if RATE in line))
