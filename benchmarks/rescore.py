"""`rescore` and `filter` of many prompts against DuckDB, a plain pandas script, and only reading and writing the file;
the time of `inspect`, `sweep` and `report`.

    .venv/bin/python -m benchmarks.rescore

Writes a vstar.parquet of PROMPTS prompts × 8 rewards. Then runs in turn, each in a process of its own: our command;
DuckDB with the same columns in SQL; the floor, in which pyarrow reads each row group and writes it unchanged; and ten
lines of pandas and numpy, which hold the table in memory and so get a file of PANDAS_PROMPTS. All write Parquet with
zstd at level 1. Only ours checks the invariants of every row. The commands that only read get READ_PROMPTS, with
rewards of 0 and 1, and for `sweep` of 0 and 2 too, whose subsets it draws at random. Prints Markdown tables. If other
jobs share the machine, CPU seconds are more reliable than wall-clock seconds.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.processes import Finished, rotations, run
from benchmarks.tables import markdown
from common.contract import BATCH_ROWS, polars_schema
from common.provenance import Provenance
from common.runs import REPOSITORY
from common.vstar_file import VSTAR, vstar_writer
from stage1_vstar.table import UNSOLVED, with_dropped, with_vstar

NUM_SAMPLES = 8
BETA1 = 0.25
COMMANDS = {
    "rescore": ["rescore", "--beta1", str(BETA1)],
    "filter": ["filter", "--drop-solved", "--max-truncated", "0.3"],
}
DUCKDB = {
    "rescore": f"""select * exclude (best, weights) replace (
        {BETA1}::double as beta1,
        best + {BETA1} * ln(list_avg(weights)) as vstar,
        {BETA1} * list_stddev_samp(weights) / (list_avg(weights) * sqrt(num_samples)) as vstar_se)
        from (select *, list_transform(rewards, lambda r: exp((r - best) / {BETA1})) as weights
        from (select *, list_max(rewards) as best from source))""",
    "filter": f"""select * replace (dropped_by is null as keep) from (
        select * replace (case when not pass_at_n then '{UNSOLVED}' when pass_rate = 1 then 'all correct'
        when len(list_filter(outcomes, lambda o: o = 'truncated')) / num_samples > 0.3 then 'truncated'
        end as dropped_by) from source)""",
}
WAYS = ("ours", "DuckDB", "floor", "pandas")
READING = {
    "inspect": (1.0, ["inspect", "--json"]),
    "report": (1.0, ["report"]),
    "sweep": (1.0, ["sweep"]),
    "sweep, rewards of 0 and 2": (2.0, ["sweep"]),
}
"""The reward of a correct sample, and the command."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--pandas-prompts", type=int, default=1_000_000)
    parser.add_argument("--read-prompts", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument(
        "--way", nargs=4, metavar=("WAY", "COMMAND", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS
    )
    parser.add_argument("--folder", type=Path, help="Keep the files there, and use those that are.")
    arguments = parser.parse_args()
    if arguments.way:
        way, command, source, output = arguments.way
        {"DuckDB": by_duckdb, "floor": by_copying, "pandas": by_pandas}[way](command, source, output)
        return
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "artifacts", prefix=".benchmark-") as name:
        folder = arguments.folder or Path(name)
        prompts = dict.fromkeys(WAYS, arguments.prompts) | {"pandas": arguments.pandas_prompts}
        sources = {count: folder / f"{count}.parquet" for count in set(prompts.values())}
        for count, path in sources.items():
            if not path.exists():
                write_source(path, count)
        size = sources[arguments.prompts].stat().st_size >> 20
        print(f"{arguments.prompts:,} prompts × {NUM_SAMPLES}: {size:,} MiB")
        for command in COMMANDS:
            costs: dict[str, list[Finished]] = {way: [] for way in WAYS}
            for _, way in rotations(WAYS, arguments.repetitions):
                costs[way].append(measure(way, command, sources[prompts[way]], folder / f"{way}.parquet"))
            if command == "rescore":
                refuse_other_values(folder / "ours.parquet", folder / "DuckDB.parquet")
            show(command, costs, prompts)
        show_reading(folder, arguments.read_prompts, arguments.repetitions)


def show_reading(folder: Path, prompts: int, repetitions: int) -> None:
    """The cost of each command of READING: medians of the repetitions."""
    for reward in {reward for reward, _ in READING.values()}:
        table = folder / f"correct-{reward:g}" / "vstar.parquet"
        table.parent.mkdir(exist_ok=True)
        write_source(table, prompts, reward)
    costs: dict[str, list[Finished]] = {name: [] for name in READING}
    for _, name in rotations(list(READING), repetitions):
        reward, command = READING[name]
        arguments = [sys.executable, "cli.py", *command, "--run", f"correct-{reward:g}"]
        costs[name].append(
            run(arguments, folder / "reading.log", {"ASTAR_PO_ARTIFACTS": str(folder.absolute())})
        )
    rows = [
        [name, *(f"{figure:,.1f}" for figure in medians(many)[:2]), f"{medians(many)[2]:,.0f}"]
        for name, many in costs.items()
    ]
    print(f"\n{markdown([f'{prompts:,} prompts', 'wall s', 'CPU s', 'peak MiB'], rows)}")


def write_source(path: Path, prompts: int, reward: float = 1.0) -> None:
    """A table of prompts of some 100 characters whose pass rates are distributed as Beta(0.6, 0.6).

    `reward` is that of a correct sample.
    """
    rng = np.random.default_rng(prompts)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(3000)])
    outcomes = np.array(["correct", "wrong", "unparsed", "truncated"])
    provenance = Provenance(identity={}, context={})
    with vstar_writer(path, provenance, changed=VSTAR.names) as write:
        for first in range(0, prompts, BATCH_ROWS):
            count = min(BATCH_ROWS, prompts - first)
            shape = (count, NUM_SAMPLES)
            correct_PN = rng.random(shape) < rng.beta(0.6, 0.6, count)[:, None]
            digits = rng.bytes(24 * count).hex()
            rows = pl.DataFrame(
                {
                    "prompt_id": [digits[48 * i : 48 * i + 32] for i in range(count)],
                    "prompt": [
                        " ".join(row) for row in words[rng.integers(0, len(words), (count, 17))].tolist()
                    ],
                    "answer": rng.integers(0, 10_000, count).astype(str),
                    "prompt_token_hash": [digits[48 * i + 32 : 48 * i + 48] for i in range(count)],
                    "num_samples": np.full(count, NUM_SAMPLES, np.int32),
                    "rewards": correct_PN * reward,
                    "outcomes": outcomes[
                        np.where(correct_PN, 0, rng.choice([1, 1, 1, 2, 3], shape))
                    ].tolist(),
                    "completion_tokens": rng.integers(20, 1000, shape, dtype=np.int32),
                    "pass_rate": correct_PN.mean(axis=1),
                    "pass_at_n": correct_PN.any(axis=1),
                }
            ).with_columns(pl.col("rewards", "completion_tokens").arr.to_list())
            rows = with_vstar(with_dropped(rows, pl.lit(None, pl.String)), beta1=0.5)
            write(rows.cast(polars_schema(VSTAR)))


def measure(way: str, command: str, source: Path, output: Path) -> Finished:
    """Run a command by one of the ways, in a process of its own."""
    arguments: list[object] = ["-m", "benchmarks.rescore", "--way", way, command, source, output]
    if way == "ours" and command == "rescore":
        arguments = ["cli.py", *COMMANDS[command], "--vstar", source, "--output", output]
    elif way == "ours":  # flags, like the others: a filter with --output writes the kept prompts only
        output.unlink(missing_ok=True)
        os.link(source, output)
        arguments = ["cli.py", *COMMANDS[command], "--vstar", output]
    return run([sys.executable, *arguments], output.with_suffix(".log"))


def by_duckdb(command: str, source: str, output: str) -> None:
    import duckdb

    with duckdb.connect() as database:
        database.execute(f"create view source as select * from read_parquet('{source}')")
        database.execute(
            f"copy ({DUCKDB[command]}) to '{output}' (format parquet, compression zstd, compression_level 1)"
        )


def by_copying(_: str, source: str, output: str) -> None:
    import pyarrow.parquet as pq

    with (
        pq.ParquetFile(source) as file,
        pq.ParquetWriter(output, file.schema_arrow, compression="zstd") as writer,
    ):
        for group in range(file.num_row_groups):
            writer.write_table(file.read_row_group(group))


def by_pandas(command: str, source: str, output: str) -> None:
    import pandas as pd

    table = pd.read_parquet(source)
    if command == "rescore":
        rewards_PN = np.stack(table["rewards"].to_numpy())
        best_P = rewards_PN.max(axis=1)
        weights_PN = np.exp((rewards_PN - best_P[:, None]) / BETA1)
        mean_P = weights_PN.mean(axis=1)
        table["beta1"] = BETA1
        table["vstar"] = best_P + BETA1 * np.log(mean_P)
        table["vstar_se"] = BETA1 * weights_PN.std(axis=1, ddof=1) / (mean_P * np.sqrt(rewards_PN.shape[1]))
    else:
        truncated = np.stack(table["outcomes"].to_numpy()) == "truncated"
        rules = [~table["pass_at_n"], table["pass_rate"] == 1, truncated.mean(axis=1) > 0.3]
        names = [UNSOLVED, "all correct", "truncated"]
        table["dropped_by"] = np.select(rules, names, default="")
        table["keep"] = table["dropped_by"] == ""
    table.to_parquet(output, compression="zstd", compression_level=1)


def refuse_other_values(ours: Path, theirs: Path) -> None:
    """Stop unless both files hold the same V̂* and standard errors, to rounding."""
    both = pl.concat(
        [
            pl.scan_parquet(path).select(pl.col("vstar", "vstar_se").name.prefix(name))
            for name, path in (("ours_", ours), ("their_", theirs))
        ],
        how="horizontal",
    )
    gaps = [(pl.col(f"ours_{name}") - pl.col(f"their_{name}")).abs().max() for name in ("vstar", "vstar_se")]
    largest = both.select(gaps).collect().row(0)
    assert max(largest) < 1e-9, f"V̂* or its standard error differs from DuckDB's by {largest}"


def medians(many: list[Finished]) -> list[float]:
    """Wall-clock seconds, CPU seconds and peak memory in MiB."""
    return [
        statistics.median(getattr(cost, name) for cost in many)
        for name in ("seconds", "cpu_seconds", "peak_mib")
    ]


def show(command: str, costs: dict[str, list[Finished]], prompts: dict[str, int]) -> None:
    """One row per way: medians of the repetitions, and the ratio to ours; pandas is scaled up to our file."""
    rows = []
    ours: list[float] = []
    for way, many in costs.items():
        scale = prompts["ours"] / prompts[way]
        figures = [scale * figure for figure in medians(many)]
        ours = ours or figures
        label = way if scale == 1 else f"{way}, {prompts[way]:,} prompts × {scale:g}"
        wall, cpu, peak = figures
        ratios = [f"{figure / base:.2f}" for figure, base in zip(figures, ours, strict=True)]
        rows.append([label, f"{wall:,.1f}", f"{cpu:,.1f}", f"{peak:,.0f}", *ratios])
    header = [command, "wall s", "CPU s", "peak MiB", "wall / ours", "CPU / ours", "peak / ours"]
    print(f"\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
