"""The cost of each stage, as far as its files record it."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.grading.judge import JudgeUsage
from common.report.stage1 import Stage1

SECONDS_AN_HOUR = 3600
_PARTS = {
    "time/rollout": "rollouts, with grading",
    "time/reference": "reference log-probs",
    "time/old": "log-probs of the old policy",
    "time/values": "the critic's values",
    "time/update": "updates",
    "time/history": "history of prompts",
    "time/weight_sync": "weights to the engine",
    "time/evaluate": "evaluations",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A stage's cost; None if the run's files do not record it."""

    stage: str
    what: str
    seconds: float | None
    tokens: int
    """Completion tokens."""
    devices: int | None
    parts: Sequence[tuple[str, float]] = ()
    """Seconds by activity."""

    @property
    def device_hours(self) -> float | None:
        if self.seconds is None or self.devices is None:
            return None
        return self.seconds * self.devices / SECONDS_AN_HOUR


def stage1_cost(stage1: Stage1) -> Cost:
    """The cost of drawing and grading the samples, over all jobs that took part."""
    recorded = stage1.provenance.context.get("cost", {})
    judge = f"; {JudgeUsage(**recorded['judge'])}" if "judge" in recorded else ""
    return Cost(
        stage="stage 1",
        what="sampling and grading by all jobs, from their start to their last file of samples, loading included"
        f"{judge}",
        seconds=recorded.get("seconds"),
        tokens=int(stage1.outcomes["tokens"].sum()),
        devices=recorded.get("devices"),
    )


def stage2_cost(metrics: Sequence[dict[str, float]]) -> Cost:
    """The cost of the iterations and the evaluations between them."""

    def total(name: str) -> float:
        return sum(point.get(name, 0.0) for point in metrics)

    steps = [point for point in metrics if "time/iteration" in point]
    tokens = (
        point.get("throughput/completion_tokens_per_second", 0.0) * point["time/iteration"] for point in steps
    )
    processes = {point.get("train/processes") for point in steps}
    known = processes.pop() if len(processes) == 1 else None
    return Cost(
        stage="stage 2",
        what="training iterations and the evaluations between them, without loading and checkpoints",
        seconds=total("time/iteration") + total("time/evaluate"),
        tokens=round(sum(tokens)),
        devices=None if known is None else int(known),
        parts=[(label, seconds) for name, label in _PARTS.items() if (seconds := total(name))],
    )
