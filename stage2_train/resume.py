"""Decide whether a run is finished or continues from a checkpoint, and refuse a checkpoint that does not match."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from common.config import SamplingParams
from common.documents import read_document
from common.errors import UserError
from common.provenance import ACCEPTED, UNRECORDED, differences
from common.runs import RunPaths
from stage2_train.config import Config, TrainConfig
from stage2_train.data import TrainingData
from stage2_train.objectives import ObjectiveConfig
from stage2_train.split import Split

MAY_DIFFER: Mapping[str, Any] = {
    "run": True,
    "vstar": True,
    **dict.fromkeys(("segments", "critic", "advantages"), True),
    "evaluate": True,
    "engine": True,
    "grader": {
        **dict.fromkeys(("workers", "max_concurrent", "timeout_seconds", "memory_gib"), True),
        "judge": {"url", "request_timeout_seconds", "retries", "requests_per_minute", "api_key_env"},
    },
    "train": {
        **dict.fromkeys(
            ("epochs", "iterations", "checkpoint_every", "keep_checkpoints", "evaluate_every"), True
        ),
        **dict.fromkeys(("tokens_per_micro_batch", "gradient_checkpointing"), True),
        **dict.fromkeys(("zero_stage", "offload_optimizer", "offload_reference"), True),
        **dict.fromkeys(("wandb_project", "hang_minutes"), True),
        "lora": {"in_engine"},
    },
}
"""Settings that may differ between a run and its continuation: length, observation and resources."""


def origin(config: Config, data: TrainingData) -> dict[str, Any]:
    """Everything that shapes the trajectory, including data and V̂*: a run and its continuation must agree on it."""
    return {"config": config.model_dump(mode="json", exclude=MAY_DIFFER), **data.digest()}


def with_defaults(origin: dict[str, Any]) -> dict[str, Any]:
    """The record of an older version, with the settings of [train] and [sampling] that this version records."""
    config = origin["config"]
    sampling = SamplingParams().model_dump(mode="json") | config["sampling"]
    free = {key for key, differs in MAY_DIFFER["train"].items() if differs is True}
    recorded = {key: value for key, value in config["train"].items() if key not in free}
    train = TrainConfig().model_dump(mode="json", exclude=MAY_DIFFER["train"]) | recorded
    with suppress(ValidationError):  # an objective unknown to this version is refused as a different one
        objective = TypeAdapter(ObjectiveConfig).validate_python(train["objective"])
        train["objective"] = objective.model_dump(mode="json")
    filled = origin | {"config": config | {"sampling": sampling, "train": train}}
    if "identity" in origin:
        model = {"config": UNRECORDED} | origin["identity"]["model"]
        filled["identity"] = origin["identity"] | {"model": model}
    return filled


def record(config: Config, data: TrainingData) -> dict[str, Any]:
    """The record written beside a trained model."""
    found = {"iterations": data.iterations(config), "origin": origin(config, data)}
    return {**found, ACCEPTED: data.accepted_mismatches}


class TrainedWith(BaseModel):
    """Identifies a trained model, to tell whether a run would give the same one."""

    iterations: int
    origin: dict[str, Any]


def is_finished(paths: RunPaths, trained_with: dict[str, Any]) -> bool:
    """Whether the exported model is the one that this run would give."""
    if not paths.trained_with.is_file():
        return False
    found = read_document(
        paths.trained_with, TrainedWith, "remove it: `train` exports the model of its last checkpoint again"
    )
    same = not differences(trained_with["origin"], with_defaults(found.origin))
    return same and bool(found.iterations == trained_with["iterations"])


def refuse_other_origin(
    paths: RunPaths, ours: dict[str, Any], state: dict[str, Any], iterations: int
) -> None:
    """Raise UserError unless the newest checkpoint belongs to this run; `state` is its state, {} without one."""
    if not state:
        return
    if lines := differences(ours, with_defaults(state["origin"])):
        raise UserError(
            f"{paths.checkpoints} was made with another config or other data: {'; '.join(lines.values())}; "
            "choose another --run, or delete that folder"
        )
    if state["iteration"] > iterations:
        raise UserError(
            f"{paths.checkpoints} is at iteration {state['iteration']} already, beyond the {iterations} asked for; "
            "choose another --run, or delete that folder"
        )


def refuse_other_zero(checkpoint: Path, ours: Split, saved: Split) -> None:
    """Raise UserError if only one of the two splits is without ZeRO, between which DeepSpeed does not convert."""
    if bool(ours.zero_stage) != bool(saved.zero_stage):
        remedy = "1, 2 or 3" if saved.zero_stage else "0"
        raise UserError(
            f"{checkpoint} was made by {saved}, which cannot be continued {'under' if ours.zero_stage else 'without'} "
            f"ZeRO: set train.zero_stage to {remedy}, or choose another --run"
        )
