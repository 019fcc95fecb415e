"""The cost of each stage, as far as its files record it."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.documents import read_document
from common.grading.judge import JudgeUsage
from common.processes import Finished
from common.report.stage1 import Stage1
from common.runs import RunPaths
from common.segments.cost import drawn_tokens, recorded_cost
from common.steps import REMEDY
from common.training_cost import drawn_in_training, training_seconds

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


def step_level_costs(paths: RunPaths) -> list[Cost]:
    """The costs of states, critic and advantages, as far as the run has them.

    Only the states record theirs. Those of the other two are known if they were steps of `rounds`.
    """
    costs = []
    if paths.segments.exists():
        recorded = recorded_cost(paths.segments)
        costs.append(
            Cost(
                stage="segments",
                what="solutions, and completions of their states, drawn and graded by all jobs, loading included",
                seconds=recorded.get("seconds"),
                tokens=drawn_tokens(paths),
                devices=recorded.get("devices"),
            )
        )
    others = (
        ("critic", paths.critic, "its training and test"),
        ("advantages", paths.advantages, "the values of next steps"),
    )
    for command, made, what in others:
        if made.exists():
            record = paths.step(command, "json")
            seconds = read_document(record, Finished, REMEDY).seconds if record.exists() else None
            costs.append(
                Cost(stage=command, what=f"{what}, loading included", seconds=seconds, tokens=0, devices=None)
            )
    return costs


def stage2_cost(metrics: Sequence[dict[str, float]]) -> Cost:
    """The cost of the iterations and the evaluations between them."""

    def total(name: str) -> float:
        return sum(point.get(name, 0.0) for point in metrics)

    processes = {point.get("train/processes") for point in metrics if "time/iteration" in point}
    known = processes.pop() if len(processes) == 1 else None
    return Cost(
        stage="stage 2",
        what="training iterations and the evaluations between them, without loading and checkpoints",
        seconds=sum(training_seconds(metrics)),
        tokens=drawn_in_training(metrics),
        devices=None if known is None else int(known),
        parts=[(label, seconds) for name, label in _PARTS.items() if (seconds := total(name))],
    )
