"""The costs and gains of drawing ahead: stage 2 with staleness 0, 1, 2 … on the same V̂*, and with engines elsewhere.

    make base-model vstar && .venv/bin/python -m benchmarks.staleness
    .venv/bin/python -m benchmarks.staleness --placement inside "own processes" --staleness 0 1

Each training is a process of its own, as `make train` starts it; repetitions have seeds of their own and change the
order. Times are the iterations' own, without start-up; accuracy is measured on the held-out prompts afterwards.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import cli, rotations, run
from benchmarks.tables import Column, comparison
from common.config import HELD_OUT
from common.evaluations import read_results
from common.runs import RunPaths, run_paths
from stage2_train.config import load_config

WARM_UP = 5
"""Iterations that are not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--placement", nargs="+", default=["inside"], help="values of engine.placement")
    parser.add_argument("--repetitions", type=int, default=3)
    chosen = parser.parse_args()
    source = run_paths(load_config(chosen.config, chosen.set).run)
    ways = {
        f"{staleness}, {placement}": {"train.staleness": staleness, "engine.placement": placement}
        for placement in chosen.placement
        for staleness in chosen.staleness
    }
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for seed, way in rotations(list(found), chosen.repetitions):
            name = f"way-{list(ways).index(way)}-{seed}"
            values = {
                "model.path": source.base_model.absolute(),
                **dict(override.split("=", 1) for override in chosen.set),
                "seed": seed,
                **ways[way],
            }
            train = cli("train", chosen.config, name, values, "--vstar", source.vstar.absolute())
            for command in (train, cli("evaluate", chosen.config, name, values)):
                run(command, Path(folder, "log"), {"ASTAR_PO_ARTIFACTS": folder})
            found[way].append(figures(RunPaths(Path(folder, name))))

    def column(name: str, figure: str, digits: int) -> Column:
        values = {way: [one[figure] for one in runs] for way, runs in found.items()}
        return Column(name=name, digits=digits, values=values)

    columns = [
        column("iteration, s", "time/iteration", 2),
        column("waiting for rollouts, s", "time/rollout", 2),
        column("held-out pass@1", "pass_at_1", 3),
        column("KL", "kl_sequence", 2),
    ]
    print(comparison("staleness, engine", columns))


def figures(paths: RunPaths) -> dict[str, Any]:
    """Median seconds of a run's iterations, and the results of its evaluation."""
    lines = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    timed = [line for line in lines if line["iteration"] > WARM_UP]
    results = read_results(paths)
    assert results is not None, "the run has been evaluated"
    (evaluation,) = (
        each.model_dump() for each in results.results if (each.model, each.benchmark) == ("trained", HELD_OUT)
    )
    seconds = {
        name: statistics.median(line[name] for line in timed) for name in ("time/iteration", "time/rollout")
    }
    return {**evaluation, **seconds}


if __name__ == "__main__":
    main()
