"""The record of a finished run: everything that a study's tables and figures are made of, in a small JSON file."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from common.documents import read_document, read_metrics
from common.errors import UserError
from common.evaluations import TRAINED, Figures, read_results
from common.files import write_text
from common.provenance import context
from common.runs import RunPaths
from common.settings import shown
from common.study.inputs import Cost, total
from common.study.plan import Plan, Run
from common.training_cost import drawn_in_training, training_seconds


class Document(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class Point(Document):
    """An evaluation during training, and the means of the iterations since the one before; None if not logged."""

    iteration: int
    seconds: float
    """Of all iterations so far, without evaluations."""
    accuracy: float
    kl: float | None = None
    loss: float | None = None
    """The squared residual."""
    reward: float | None = None


class Seconds(Document):
    """A run's time by phase, in wall-clock seconds; the base model is not in it."""

    stage1: float
    """This run's share of making what its training reads; 0 if it needs nothing."""
    setup: float
    """The training process outside its iterations and evaluations: loading, checkpoints, export."""
    training: float
    """Iterations."""
    evaluating: float
    """Evaluations during training, which no total includes."""

    @property
    def total(self) -> float:
        return self.stage1 + self.setup + self.training


class Conditions(Document):
    """The machine and the libraries."""

    processor: str
    cores: int
    gpu: str | None
    load_average: float
    """Over the last minute of training."""
    python: str
    versions: dict[str, str | None]
    commit: str | None

    @property
    def machine(self) -> str:
        return f"{self.cores} cores of {self.processor}, {self.gpu or 'no GPU'}"


class Record(Document):
    """A finished run."""

    study: str
    arm: str
    seed: int
    config: dict[str, Any]
    """The whole config, defaults included, by dotted key."""
    trained: dict[str, Figures]
    """By benchmark."""
    reference: dict[str, Figures]
    curve: list[Point]
    iterations: int
    seconds: Seconds
    cpu_seconds: float | None
    """Processor time of this run's share of stage 1 and of the training process, evaluations included.

    None if an earlier process did a part of it.
    """
    peak_gib: float
    """Of the training process: of the GPU's memory, or without one of the resident set."""
    stage1_peak_gib: float | None
    """Of stage 1's process, without a GPU; None if the run needs no stage 1."""
    completion_tokens: float
    """The mean length of training's completions."""
    sampled_tokens: float
    """All completion tokens that were drawn for what training reads and in training, evaluations left out."""
    conditions: Conditions

    def time(self, point: Point) -> float:
        """The seconds until a point of the curve, stage 1 and set-up included."""
        return self.seconds.stage1 + self.seconds.setup + point.seconds

    def accuracy_at(self, seconds: float) -> float | None:
        """The accuracy after this time, on a line between the evaluations; None without a curve."""
        if not self.curve:
            return None
        return float(np.interp(seconds, [self.time(point) for point in self.curve], self._accuracies))

    def seconds_to(self, accuracy: float) -> float | None:
        """The time until this accuracy is reached first, on a line between the evaluations; None if it is not."""
        return self._reached(accuracy, self.time)

    def iterations_to(self, accuracy: float) -> float | None:
        """The iterations until this accuracy, likewise."""
        return self._reached(accuracy, lambda point: point.iteration)

    def _reached(self, accuracy: float, of: Callable[[Point], float]) -> float | None:
        if not self.curve or max(self._accuracies) < accuracy:
            return None
        place = next(number for number, value in enumerate(self._accuracies) if value >= accuracy)
        pair = self.curve[max(place - 1, 0) : place + 1]
        return float(np.interp(accuracy, [point.accuracy for point in pair], [of(point) for point in pair]))

    @property
    def _accuracies(self) -> list[float]:
        return [point.accuracy for point in self.curve]


def read_record(folder: Path, run: Run) -> Record | None:
    """The record of a run, if it is finished. Raises UserError if it is that of other settings, or damaged."""
    path = folder / run.record_name
    if not path.exists():
        return None
    record = read_document(path, Record, "remove it: the run is then measured again")
    if (key := _changed(record.config, run)) is not None:
        before, now = (_value_of(config, key) for config in (record.config, run.settings))
        raise UserError(
            f'{path} is the result of other settings than those of the arm "{run.arm.name}" now: {key} was {before} '
            f"and is {now}; remove it, rename the arm, or choose another --results folder"
        )
    return record


def _changed(config: Mapping[str, Any], run: Run) -> str | None:
    """The first key whose value is not the recorded one. A key that did not exist then may have its default."""
    settings = run.settings
    if (table := _table_of_one(config, settings) or _table_of_one(settings, config)) is not None:
        return table
    return next(
        (
            key
            for key, value in settings.items()
            if (config[key] != value if key in config else key in run.chosen)
        ),
        None,
    )


def _table_of_one(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """A key with a table in one of two configs, such as train.lora, and without a value in the other."""
    tables = {key[:place] for key in one for place, letter in enumerate(key) if letter == "."}
    return next((key for key in other if key in tables), None)


def _value_of(config: Mapping[str, Any], key: str) -> str:
    """The value of a key, for people."""
    if any(name.startswith(f"{key}.") for name in config):
        return "a table"
    value = config.get(key)
    return "not set" if value is None else shown(value)


def write_record(folder: Path, run: Run, record: Record) -> None:
    """Keep a finished run's record."""
    write_text(folder / run.record_name, record.model_dump_json(indent=1) + "\n")


def finished(plan: Plan, folder: Path) -> dict[str, Record]:
    """The records that there are, by the runs' record names."""
    found = {run.record_name: read_record(folder, run) for run in plan.runs}
    return {name: record for name, record in found.items() if record is not None}


def read_figures(paths: RunPaths, model: str) -> dict[str, Figures]:
    """A model's figures by benchmark, as `evaluate` has written them; {} if it has not finished."""
    results = read_results(paths)
    return {
        each.benchmark: each.model_copy(update={"path": ""})  # of this machine
        for each in (results.results if results else [])
        if each.model == model
    }


def training_curve(lines: Sequence[Mapping[str, float]]) -> list[Point]:
    """A point for each evaluation in these lines of metrics.jsonl."""
    points = []
    seconds = 0.0
    since: list[Mapping[str, float]] = []
    for line in lines:
        seconds += line.get("time/iteration", 0.0)
        since.append(line)
        if "evaluate/pass_at_1" not in line:
            continue
        means = {
            name: _mean([each[key] for each in since if key in each])
            for name, key in (("kl", "kl/sequence"), ("loss", "loss/regression"), ("reward", "reward/mean"))
        }
        points.append(
            Point(
                iteration=int(line["iteration"]),
                seconds=seconds,
                accuracy=line["evaluate/pass_at_1"],
                **means,
            )
        )
        since = []
    return points


def make_record(
    plan: Plan,
    run: Run,
    paths: RunPaths,
    *,
    reference: dict[str, Figures],
    stage1: Cost | None,
    stage1_tokens: int,
    setup: float,
    cpu_seconds: float | None,
    conditions: Conditions,
) -> Record:
    """The record of a run whose steps are all done.

    `reference` is its reference model's figures, `stage1` the cost of what its training reads and `stage1_tokens` the
    tokens sampled for that; `setup` are the training process's seconds outside iterations and evaluations, and
    `cpu_seconds` its processor time.
    """
    lines = [values for _, values in read_metrics(paths.metrics)]
    training, evaluating = training_seconds(lines)
    return Record(
        study=plan.study,
        arm=run.arm.name,
        seed=run.seed,
        config=dict(run.settings),
        trained=read_figures(paths, TRAINED),
        reference=reference,
        curve=training_curve(lines),
        iterations=int(lines[-1]["iteration"]),
        seconds=Seconds(
            stage1=stage1.seconds if stage1 else 0.0, setup=setup, training=training, evaluating=evaluating
        ),
        cpu_seconds=total([cpu_seconds, stage1.cpu_seconds if stage1 else 0.0]),
        peak_gib=max(line.get("memory/peak_gib", 0.0) for line in lines),
        stage1_peak_gib=stage1.peak_gib if stage1 and conditions.gpu is None else None,
        sampled_tokens=stage1_tokens + drawn_in_training(lines),
        completion_tokens=_mean(
            [line["completion/tokens_mean"] for line in lines if "completion/tokens_mean" in line]
        )
        or 0.0,
        conditions=conditions,
    )


def conditions(run: Run) -> Conditions:
    """The machine now; asked right after training, for the load average."""
    made = context(run.config)
    return Conditions(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        gpu=_gpu(),
        load_average=os.getloadavg()[0],
        python=made["python"],
        versions=made["versions"],
        commit=made["commit"],
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.machine())


def _gpu() -> str | None:
    """The names of this machine's GPUs, such as `4 × NVIDIA H100`."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    names = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    if result.returncode or not names:
        return None
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
