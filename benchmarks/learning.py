"""Compare objectives on the demo under equal conditions: the same base model, prompts, trainer and iterations.

    .venv/bin/python -m benchmarks.learning --objective astar_po grpo rebel ppo --seed 0 1 2

Each seed has its own base model and V̂*. Every training and its evaluation run in processes of their own, as
`make train` and `make evaluate` start them; `--set` changes settings for all of them. Results are kept in --folder, so
that a stopped run can continue. Prints the median over the seeds, with their range.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.objectives import objectives
from benchmarks.processes import cli, run
from benchmarks.tables import markdown, spread
from common.config import HELD_OUT
from common.evaluations import read_results
from common.runs import RunPaths
from stage2_train.config import load_config

CONFIG = Path("configs/demo.toml")
GOAL = 0.8
"""Held-out accuracy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--objective", nargs="+", default=["astar_po", "grpo", "rebel", "ppo"], choices=objectives()
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/learning"))
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {objective: [] for objective in chosen.objective}
    for seed in chosen.seed:
        for objective in chosen.objective:
            paths = trained(chosen.folder.absolute(), objective, seed, chosen.set)
            found[objective].append(figures(paths))
            print(f"{objective}, seed {seed}: pass@1 {found[objective][-1]['pass_at_1']:.3f}", flush=True)

    columns = {
        "held-out pass@1": ("pass_at_1", 3),
        "greedy": ("greedy_accuracy", 3),
        "KL, nats per completion": ("kl_sequence", 2),
        "tokens per completion": ("completion_tokens_mean", 1),
        f"first evaluation above {GOAL:g}, iteration": ("iteration", 0),
        "iteration, s": ("seconds", 2),
    }
    rows = [
        [objective, *(spread([one[figure] for one in runs], digits) for figure, digits in columns.values())]
        for objective, runs in found.items()
    ]
    print(markdown(["objective", *columns], rows))


def trained(folder: Path, objective: str, seed: int, overrides: Sequence[str]) -> RunPaths:
    """Train and evaluate a run; steps whose results exist are not repeated."""
    environment = {"ASTAR_PO_ARTIFACTS": str(folder)}
    source = RunPaths(folder / f"seed-{seed}")
    changes = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8] if overrides else "as-is"
    name = f"{objective}-{seed}-{changes}"
    log = folder / f"{name}.log"
    if not source.vstar.exists():
        for command in ("base-model", "vstar"):
            run(cli(command, CONFIG, source.root.name, {"seed": seed}), log, environment)
    paths = RunPaths(folder / name)
    if not paths.results("json").exists():
        values = {
            "model.path": source.base_model,
            **dict(override.split("=", 1) for override in overrides),
            "train.objective.name": objective,
            "seed": seed,
        }
        section = load_config(CONFIG, [f"train.objective.name={objective}"]).train
        file = ("--vstar", source.vstar) if section.reads_stage1 else ()
        for command, more in (("train", file), ("evaluate", ())):
            run(cli(command, CONFIG, name, values, *more), log, environment)
    return paths


def figures(paths: RunPaths) -> dict[str, Any]:
    """The results of an evaluation, and from training the first iteration above the goal and the iterations' time."""
    lines = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    reached = [line["iteration"] for line in lines if line.get("evaluate/pass_at_1", 0.0) >= GOAL]
    seconds = sorted(line["time/iteration"] for line in lines if "time/iteration" in line)
    results = read_results(paths)
    assert results is not None, "the run has been evaluated"
    (evaluation,) = (
        each.model_dump() for each in results.results if (each.model, each.benchmark) == ("trained", HELD_OUT)
    )
    return {
        **evaluation,
        "iteration": reached[0] if reached else None,
        "seconds": seconds[len(seconds) // 2],
    }


if __name__ == "__main__":
    main()
