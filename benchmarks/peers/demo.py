"""The demo's task by each trainer, from the start of the first process to a held-out accuracy.

Ours is `cli.py vstar` and `cli.py train`. All three start from the same base model and take the same problems,
reward, completions an update, learning rate and seed. Held-out accuracy is one sampled completion of each of 512
problems, from the same random streams: ours samples them while it trains, the weights that TRL's trainers save are
put into the same engine afterwards. Neither the evaluations nor the saving count as training time.
"""

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import trl_python
from benchmarks.peers.job import Job, Report
from benchmarks.peers.processes import Finished, run
from benchmarks.peers.table import OURS, Values, markdown, seconds_to
from common.data.prompts import PromptRenderer, load_prompts
from common.runs import run_paths
from stage2_train.config import Config, load_config

CONFIG = Path("configs/demo.toml")
TRAINERS = {OURS: "", "TRL A2PO": "a2po", "TRL GRPO": "grpo"}
EVALUATE_EVERY = 4
"""Iterations between two points of a curve."""
THREADS = {
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
}
"""The thread settings of cli.py, for every trainer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trainer once."""

    iterations: list[float]
    """The seconds from the first process's start to the end of each iteration."""
    curve: list[tuple[float, float]]
    """(seconds, held-out accuracy)."""
    stage1_seconds: float
    total_seconds: float
    """From the first process's start to the last one's end, evaluations included where they happen inside."""
    cpu_seconds: float
    peak_mib: float


def compare(repetitions: int, iterations: int, accuracies: list[float], folder: Path) -> str:
    """Run every trainer `repetitions` times, in a changing order; returns the table."""
    base = run_paths("demo").base_model
    if not base.is_dir():
        run([sys.executable, "cli.py", "base-model"], folder / "base_model.log", THREADS)
    trl_python()
    runs: dict[str, list[Run]] = {trainer: [] for trainer in TRAINERS}
    for repetition in range(repetitions):
        first = repetition % len(TRAINERS)
        names = list(TRAINERS)
        for trainer in names[first:] + names[:first]:
            config = settings(base, iterations, seed=repetition)
            place = folder / f"{trainer.replace(' ', '-').lower()}-{repetition}"
            place.mkdir()
            done = ours(config, place) if trainer == OURS else peer(TRAINERS[trainer], config, place)
            runs[trainer].append(done)
            print(
                f"{trainer}, seed {repetition}: {done.total_seconds:.0f} s, stage 1 {done.stage1_seconds:.0f} s, "
                f"held-out {done.curve[-1][1]:.3f}, peak {done.peak_mib:,.0f} MiB",
                flush=True,
            )
        before = {runs[trainer][repetition].curve[0][1] for trainer in TRAINERS}
        assert len(before) == 1, f"one base model, evaluated in one way, has accuracies {before}"
    document = {trainer: [asdict(one) for one in found] for trainer, found in runs.items()}
    (folder / "runs.json").write_text(json.dumps(document))
    return report(runs, accuracies)


def settings(base: Path, iterations: int, seed: int) -> Config:
    """The demo's config, and how its in-training evaluation is made comparable."""
    return load_config(
        CONFIG,
        [
            f'model.path="{base}"',
            f"seed={seed}",
            f"train.iterations={iterations}",
            f"train.evaluate_every={EVALUATE_EVERY}",
            "evaluate.training_prompts=512",
        ],
        run="peers",
    )


def ours(config: Config, folder: Path) -> Run:
    """Both stages, by the command line."""
    overrides = [
        f'model.path="{config.model.path}"',
        f"seed={config.seed}",
        f"train.iterations={config.train.iterations}",
        f"train.evaluate_every={config.train.evaluate_every}",
        f"evaluate.training_prompts={config.evaluate.training_prompts}",
    ]
    options = [part for override in overrides for part in ("--set", override)]
    environment = {**THREADS, "ASTAR_PO_ARTIFACTS": str(folder)}
    stage1, stage2 = (
        run(
            [sys.executable, "cli.py", command, "--config", str(CONFIG), "--run", config.run, *options],
            folder / f"{command}.log",
            environment,
        )
        for command in ("vstar", "train")
    )
    lines = (folder / config.run / "metrics.jsonl").read_text().splitlines()
    ends = _logged_at(folder / config.run / "tensorboard")
    rows = [json.loads(line) for line in lines]
    evaluations = {row["iteration"]: row["time/evaluate"] for row in rows if "time/evaluate" in row}
    # The first one warms the engine up, which the peers do on the clock: what it takes longer than the next is ours.
    evaluations[0] = min(list(evaluations.values())[:2])
    evaluating = 0.0
    iterations, curve = [], []
    for metrics in rows:
        evaluating += evaluations.get(metrics["iteration"], 0.0)
        seconds = stage1.seconds + ends[metrics["iteration"]] - stage2.began - evaluating
        if metrics["iteration"] > 0:
            iterations.append(seconds)
        if "evaluate/pass_at_1" in metrics:
            curve.append((seconds, metrics["evaluate/pass_at_1"]))
    return Run(
        iterations=iterations,
        curve=curve,
        stage1_seconds=stage1.seconds,
        total_seconds=stage1.seconds + stage2.seconds,
        cpu_seconds=stage1.cpu_seconds + stage2.cpu_seconds,
        peak_mib=max(stage1.peak_mib, stage2.peak_mib),
    )


def _logged_at(folder: Path) -> dict[int, float]:
    """When each iteration was logged, in seconds since the epoch."""
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    events: Any = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = ("time/iteration", "evaluate/pass_at_1")
    return {event.step: event.wall_time for tag in tags for event in events.Scalars(tag)}


def peer(trainer: str, config: Config, folder: Path) -> Run:
    """One of TRL's trainers, and its curve."""
    base = Path(config.model.path)
    renderer = PromptRenderer(base, config.data)
    prompts = load_prompts(config.data, config, renderer)
    updates = config.train.batch_size // config.train.mini_batch_size
    assert config.train.iterations is not None
    Job.like(
        config,
        trainer=trainer,
        model=str(base),
        prompts=[
            {"prompt": renderer.template.replace("{prompt}", prompt.text), "answer": prompt.answer}
            for prompt in prompts
        ],
        weights=str(folder),
        save_every=EVALUATE_EVERY * updates,
        seed=config.seed,
        updates=config.train.iterations * updates,
        micro_batch_size=config.train.mini_batch_size,
    ).write(folder / "job.json")
    finished, told = run_trl(folder)
    iterations = [end - finished.began for end in told.updates[updates - 1 :: updates]]
    weights = {int(file.stem) // updates: file for file in folder.glob("*.safetensors")}
    accuracy = evaluate(config, base, {0: base / "model.safetensors", **weights}, folder)
    return Run(
        iterations=iterations,
        curve=[
            (iterations[number - 1] if number else told.began - finished.began, accuracy[number])
            for number in sorted(accuracy)
        ],
        stage1_seconds=told.began - told.imported if trainer == "a2po" else 0.0,
        total_seconds=finished.seconds,
        cpu_seconds=finished.cpu_seconds,
        peak_mib=finished.peak_mib,
    )


def run_trl(folder: Path) -> tuple[Finished, Report]:
    """The job in a folder, by TRL's interpreter."""
    command = [trl_python(), "-m", "benchmarks.peers.trl_run", folder / "job.json", folder / "report.json"]
    environment = {**THREADS, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ".", "PYTHONWARNINGS": "ignore"}
    finished = run([str(part) for part in command], folder / "trl.log", environment)
    return finished, Report.read(folder / "report.json")


def evaluate(config: Config, base: Path, weights: dict[int, Path], folder: Path) -> dict[int, float]:
    """Held-out accuracy of each weights file, in a process of its own."""
    task = {
        "config": config.model_dump(mode="json"),
        "base": str(base),
        "weights": {str(number): str(file) for number, file in weights.items()},
    }
    (folder / "evaluate.json").write_text(json.dumps(task))
    run(
        [sys.executable, "-m", "benchmarks.peers.evaluate", str(folder / "evaluate.json")],
        folder / "evaluate.log",
        THREADS,
    )
    found: dict[str, float] = json.loads((folder / "accuracy.json").read_text())
    return {int(number): accuracy for number, accuracy in found.items()}


def report(runs: dict[str, list[Run]], accuracies: list[float]) -> str:
    """The table of the runs."""

    def column(value: Any) -> Values:
        return {trainer: [value(one) for one in found] for trainer, found in runs.items()}

    columns = {
        f"s to held-out {accuracy:g}": column(lambda one, goal=accuracy: seconds_to(one.curve, goal))
        for accuracy in accuracies
    }
    digits = dict.fromkeys(columns, 0)
    columns |= {
        "of it stage 1": column(lambda one: one.stage1_seconds),
        "s an iteration": column(lambda one: statistics.median(_differences(one.iterations))),
        "CPU s in all": column(lambda one: one.cpu_seconds),
        "held-out at the end": column(lambda one: one.curve[-1][1]),
        "peak MiB": column(lambda one: one.peak_mib),
    }
    digits |= dict.fromkeys(columns.keys() - digits.keys(), 0) | {
        "s an iteration": 2,
        "held-out at the end": 3,
    }
    return markdown(columns, list(runs), digits)


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]
