"""The demo's task by each trainer, from the start of the first process to a held-out accuracy.

Ours is what `cli.py run` does, stage 1 (with A*-PO) and stage 2, and each trainer of TRL's has a run of ours beside it.
All start from the same base model and take the same problems, reward, completions per update, learning rate and seed.
Our GRPO has the settings of TRL's: no KL and no entropy term, the mean over tokens. Held-out accuracy is one sampled
completion of each of 512 problems, from the same random streams: ours are sampled during training; the weights that
TRL's trainers save are loaded into the same engine afterwards. Neither the evaluations nor the saving count as training
time.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.peers.environment import TRL_VARIABLES, trl_python
from benchmarks.peers.evaluate import evaluate
from benchmarks.peers.job import Job, JsonFile, Report
from benchmarks.peers.our_job import STAGE1
from benchmarks.peers.our_run import OurJob
from benchmarks.processes import Finished, alone, assignments, cli, rotations, run
from benchmarks.tables import Column, comparison
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.runs import RunPaths, run_paths
from stage2_train.config import load_config

CONFIG = Path("configs/demo.toml")
OURS: dict[str, dict[str, object]] = {
    "our A*-PO": {},
    "our GRPO": {
        "train.objective": '{ name = "grpo", group_size = 2, kl = 0.0, entropy = 0.0, average = "token" }',
        "train.batch_size": 128,
        "train.mini_batch_size": 64,
    },
}
"""By the trainer's name, its settings besides the demo's: GRPO draws as many completions, two for each prompt."""
THEIRS = {"TRL A2PO": "a2po", "TRL GRPO": "grpo"}
TRAINERS = (*OURS, *THEIRS)
ACCURACIES = (0.7, 0.8, 0.9)
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
    """The seconds from the first process's start to the end of each iteration; first to the start of training."""
    curve: list[tuple[float, float]]
    """(seconds, held-out accuracy)."""
    stage1_seconds: float
    total_seconds: float
    """From the first process's start to the last one's end, including evaluations that run inside."""
    cpu_seconds: float
    peak_mib: float


def compare(repetitions: int, iterations: int, folder: Path, settings: Mapping[str, object]) -> str:
    """Run every trainer `repetitions` times, in a changing order; returns the table.

    `settings` are values of the config for all of them.
    """
    base = run_paths("demo").base_model.resolve()
    if not base.is_dir():
        run([sys.executable, "cli.py", "base-model"], folder / "base_model.log", THREADS)
    trl_python()
    runs: dict[str, list[Run]] = {trainer: [] for trainer in TRAINERS}
    for repetition, trainer in rotations(TRAINERS, repetitions):
        values = {
            "model.path": base,
            "seed": repetition,
            "train.iterations": iterations,
            "train.evaluate_every": EVALUATE_EVERY,
            "evaluate.training_prompts": 512,
            **settings,
        }
        place = folder / f"{trainer.replace(' ', '-').replace('*', '').lower()}-{repetition}"
        place.mkdir()
        is_ours = trainer in OURS
        done = ours({**values, **OURS[trainer]}, place) if is_ours else peer(THEIRS[trainer], values, place)
        runs[trainer].append(done)
        print(
            f"{trainer}, seed {repetition}: {done.total_seconds:.0f} s, stage 1 {done.stage1_seconds:.0f} s, "
            f"held-out {done.curve[-1][1]:.3f}, peak {done.peak_mib:,.0f} MiB",
            flush=True,
        )
    for repetition in range(repetitions):
        before = {found[repetition].curve[0][1] for found in runs.values()}
        assert len(before) == 1, f"one base model, evaluated in one way, has accuracies {before}"
    document = {trainer: [asdict(one) for one in found] for trainer, found in runs.items()}
    (folder / "runs.json").write_text(json.dumps(document))
    return report(runs)


def ours(values: dict[str, object], folder: Path) -> Run:
    """What the objective needs: both stages, or stage 2 alone."""
    environment = {**THREADS, "ASTAR_PO_ARTIFACTS": str(folder)}
    paths = RunPaths(folder / "peers")
    config = load_config(CONFIG, assignments(values), "peers")
    has_stage1 = config.train.reads_stage1
    job = OurJob(config=config.model_dump(mode="json"), vstar=str(paths.vstar) if has_stage1 else None)
    options = cli("vstar", CONFIG, "peers", values)[3:] if has_stage1 else []
    program = [sys.executable, "-m", "benchmarks.peers.our_job"]
    finished, told = run_job(job, program, folder, environment, options)
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    accuracies = {row["iteration"]: row["evaluate/pass_at_1"] for row in rows if "evaluate/pass_at_1" in row}
    evaluations = {row["iteration"]: row["time/evaluate"] for row in rows if "time/evaluate" in row}
    # The first evaluation also warms the engine up. The peers' warm-up counts, so only the next one's time is deducted.
    evaluations[0] = min(list(evaluations.values())[:2])
    off_the_clock = 0.0
    ends = []
    for number, end in enumerate([told.began, *told.updates]):
        ends.append(end - finished.began - off_the_clock)
        off_the_clock += evaluations.get(number, 0.0)
    stage1_ended = float((folder / STAGE1).read_text()) if has_stage1 else finished.began
    return Run(
        iterations=ends,
        curve=[(ends[number], accuracies[number]) for number in sorted(accuracies)],
        stage1_seconds=stage1_ended - finished.began,
        total_seconds=finished.seconds,
        cpu_seconds=finished.cpu_seconds,
        peak_mib=finished.peak_mib,
    )


def peer(trainer: str, values: dict[str, object], folder: Path) -> Run:
    """One of TRL's trainers, and its curve."""
    config = load_config(CONFIG, assignments(values), "peers")
    base = Path(config.model.path)
    renderer = PromptRenderer(base, config.data)
    prompts = load_prompts(config.data, config, renderer)
    updates = config.train.batch_size // config.train.mini_batch_size
    assert config.train.iterations is not None
    job = Job.like(
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
    )
    finished, told = run_trl(job, folder)
    ends = [end - finished.began for end in [told.began, *told.updates[updates - 1 :: updates]]]
    weights = {int(file.stem) // updates: file for file in folder.glob("*.safetensors")}
    accuracies = alone(evaluate, config, base, {0: base / "model.safetensors", **weights})
    return Run(
        iterations=ends,
        curve=[(ends[number], accuracies[number]) for number in sorted(accuracies)],
        stage1_seconds=told.began - told.imported if trainer == "a2po" else 0.0,
        total_seconds=finished.seconds,
        cpu_seconds=finished.cpu_seconds,
        peak_mib=finished.peak_mib,
    )


def run_trl(job: Job, folder: Path) -> tuple[Finished, Report]:
    """A job by TRL's interpreter."""
    program = [trl_python(), "-m", "benchmarks.peers.trl_run"]
    return run_job(job, program, folder, {**THREADS, **TRL_VARIABLES})


def run_job(
    job: JsonFile,
    program: Sequence[object],
    folder: Path,
    environment: dict[str, str],
    options: Sequence[object] = (),
) -> tuple[Finished, Report]:
    """A job by a program that reads it and writes a report; both stay in the folder, with the program's log."""
    job_file, report_file = folder / "job.json", folder / "report.json"
    job.write(job_file)
    finished = run([*program, job_file, report_file, *options], folder / "train.log", environment)
    return finished, Report.read(report_file)


def report(runs: dict[str, list[Run]]) -> str:
    """The table of the runs."""

    def column(name: str, digits: int, value: Callable[[Run], float | None]) -> Column:
        values = {trainer: [value(one) for one in found] for trainer, found in runs.items()}
        return Column(name=name, digits=digits, values=values)

    def reaching(goal: float) -> Column:
        return column(f"s to held-out {goal:g}", 0, lambda one: seconds_to(one.curve, goal))

    def iteration(one: Run) -> float:
        return statistics.median(after - before for before, after in pairwise(one.iterations))

    return comparison(
        "trainer",
        [
            *map(reaching, ACCURACIES),
            column("of which stage 1", 0, lambda one: one.stage1_seconds),
            column("s per iteration", 2, iteration),
            column("CPU s in all", 0, lambda one: one.cpu_seconds),
            column("held-out at the end", 3, lambda one: one.curve[-1][1]),
            column("peak MiB", 0, lambda one: one.peak_mib),
        ],
    )


def seconds_to(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """When a curve of (seconds, accuracy) first reaches an accuracy, on the line between two evaluations."""
    for (before, low), (after, high) in pairwise(curve):
        if low >= accuracy:
            return before
        if high >= accuracy:
            return before + (after - before) * (accuracy - low) / (high - low)
    return None
