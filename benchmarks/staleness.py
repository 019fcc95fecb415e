"""What drawing ahead costs and gains: stage 2 with staleness 0, 1, 2 … on the same V̂*.

    make base-model vstar && .venv/bin/python -m benchmarks.staleness

Each training is a process of its own, as `make train` starts it; repetitions have seeds of their own and interleave
the values. Times are the iterations' own, without start-up; accuracy is measured on the held-out prompts afterwards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common.runs import RunPaths, run_paths
from stage2_train.config import load_config

WARM_UP = 5
"""Iterations that are not timed."""
PHASES = ("iteration", "rollout", "weight_sync", "reference", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    source = run_paths(load_config(arguments.config, arguments.set).run)
    found: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in arguments.staleness}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.repetitions):
            for staleness in arguments.staleness:
                overrides = {
                    "model.path": source.base_model.absolute(),
                    **dict(override.split("=", 1) for override in arguments.set),
                    "seed": seed,
                    "train.staleness": staleness,
                }
                options = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
                options += ["--config", str(arguments.config), "--run", f"staleness-{staleness}-{seed}"]
                environment = {**os.environ, "ASTAR_PO_ARTIFACTS": folder}
                for command in (
                    ["train", *options, "--vstar", str(source.vstar.absolute())],
                    ["evaluate", *options],
                ):
                    subprocess.run(
                        [sys.executable, "cli.py", *command],
                        env=environment,
                        check=True,
                        stdout=subprocess.DEVNULL,
                    )
                found[staleness].append(figures(Path(folder) / f"staleness-{staleness}-{seed}"))
    show(found)


def figures(run: Path) -> dict[str, float]:
    """Medians over the iterations of a run, and what its evaluation found."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = [line for line in lines if line["iteration"] > WARM_UP]
    seconds = {phase: statistics.median(line[f"time/{phase}"] for line in timed) for phase in PHASES}
    trained = json.loads((RunPaths(run).evaluation("trained")).read_text(encoding="utf-8"))
    return {**seconds, "pass@1": trained["pass_at_1"], "kl": trained["kl_sequence"]}


def show(found: dict[int, list[dict[str, float]]]) -> None:
    """A Markdown table: medians over the repetitions; time also as a ratio to staleness 0 of the same seed."""
    baseline = found[min(found)]
    print("| staleness | iteration, s | ratio | waiting for rollouts | held-out pass@1 | KL |")
    print("|---|---|---|---|---|---|")
    for staleness, runs in found.items():
        ratios = [run["iteration"] / base["iteration"] for run, base in zip(runs, baseline, strict=True)]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        accuracy = " ".join(f"{run['pass@1']:.3f}" for run in runs)
        print(
            f"| {staleness} | {middle['iteration']:.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {middle['rollout']:.2f} | {accuracy} | {middle['kl']:.2f} |"
        )


if __name__ == "__main__":
    main()
