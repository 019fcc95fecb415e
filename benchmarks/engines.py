"""Stage 1 with one engine, and with several in processes of their own, on the demo: seconds, tokens a second, memory.

    make base-model && .venv/bin/python -m benchmarks.engines

Each `vstar` is a process of its own, as `make vstar` starts it. "drawing" begins when the first engine is loaded,
"whole" is the process from start to end. The samples have to be equal, and are compared.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.processes import Finished, cli, rotations, run
from benchmarks.tables import Column, Values, comparison
from common.runs import RunPaths, run_paths
from common.store import SampleStore, stored_tokens
from common.vstar_file import read_vstar
from stage2_train.config import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=3)
    chosen = parser.parse_args()
    base = run_paths(load_config(chosen.config, chosen.set).run).base_model.absolute()
    names = [str(engines) for engines in chosen.engines]
    columns: dict[str, Values] = {
        name: {engines: [] for engines in names}
        for name in ("drawing, s", "tokens/s", "whole, s", "processor time, s", "peak memory, MiB")
    }
    with tempfile.TemporaryDirectory() as folder:
        for repetition, engines in rotations(names, chosen.repetitions):
            name = f"engines-{engines}-{repetition}"
            values = {
                "model.path": base,
                **dict(override.split("=", 1) for override in chosen.set),
                "engine.engines": engines,
            }
            finished = run(
                cli("vstar", chosen.config, name, values), Path(folder, "log"), {"ASTAR_PO_ARTIFACTS": folder}
            )
            for column, figure in figures(RunPaths(Path(folder, name)), finished).items():
                columns[column][engines].append(figure)
        _refuse_other_samples(
            [
                RunPaths(Path(folder, f"engines-{engines}-{repetition}"))
                for engines in names
                for repetition in range(chosen.repetitions)
            ]
        )
    found = [
        Column(name=name, digits=1 if name.endswith(", s") else 0, values=values)
        for name, values in columns.items()
    ]
    print(comparison("engines", found))


def figures(paths: RunPaths, finished: Finished) -> dict[str, float]:
    """What one `vstar` took."""
    cost = read_vstar(paths.vstar)[1].context["cost"]
    drawing = cost["seconds"] - cost["loading_seconds"]
    return {
        "drawing, s": drawing,
        "tokens/s": stored_tokens(paths.samples) / drawing,
        "whole, s": finished.seconds,
        "processor time, s": finished.cpu_seconds,
        "peak memory, MiB": finished.peak_mib,
    }


def _refuse_other_samples(runs: list[RunPaths]) -> None:
    first, *others = (
        SampleStore(paths.samples, read_vstar(paths.vstar)[1]).read().sort("prompt_id", "sample_index")
        for paths in runs
    )
    assert all(other.equals(first) for other in others), "engines have drawn different samples"


if __name__ == "__main__":
    main()
