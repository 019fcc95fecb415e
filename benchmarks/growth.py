"""Bookkeeping at 1,000 to 1,000,000 prompts: time, memory, files and bytes of everything but the models.

    .venv/bin/python -m benchmarks.growth                          (ten minutes, 1 GiB of disk)
    .venv/bin/python -m benchmarks.growth --prompts 1000 10000

Makes a run whose samples are all there, NUM_SAMPLES of some 500 characters for each prompt, and a table of one state
with two next steps for each. Then each command runs in a process of its own: `vstar`, which finds nothing to draw and
writes its table; `rescore`; `filter`; `inspect`; what `train` does before it loads a model; and `advantages`. Prints
Markdown tables. Memory is the peak of resident memory, libraries included.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from benchmarks.processes import alone, peak_mib
from benchmarks.tables import markdown
from benchmarks.training import save_random_model
from common.contract import polars_schema
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer, batched
from common.engines import LOCAL
from common.model.files import model_identity
from common.provenance import Provenance, context
from common.rollout import Prompt
from common.runs import RunPaths, run_paths
from common.segments.files import SEGMENTS, SEGMENTS_TABLE, standard_error, state_id
from common.store import SAMPLES, add_bytes
from common.terminal.console import Terminal
from stage1_vstar.advantages.run import run_advantages
from stage1_vstar.describe import describe
from stage1_vstar.filter import drop_rules, filter_prompts
from stage1_vstar.rescore import rescore
from stage1_vstar.run import run_stage1, stage1_provenance
from stage2_train.config import Config
from stage2_train.data import prepare

NUM_SAMPLES = 4
TEXT = "First we add the numbers, then we divide. " * 12
FRAGMENT = 4096
MODEL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 539,
}


STATE = pl.DataFrame(
    {
        "prefix": "",
        "prefix_token_ids": [[]],
        "step": 0,
        "solutions": [[0]],
        "is_terminal": False,
        "num_completions": 4,
        "rewards": [[1.0, 1.0, 0.0, 0.0]],
        "outcomes": [["correct", "correct", "wrong", "wrong"]],
        "completion_tokens": [[20] * 4],
        "value": 0.5,
        "value_se": standard_error(2, 4),
        "action_texts": [["one", "two"]],
        "action_token_ids": [[[1, 2], [3]]],
        "action_counts": [[2, 2]],
        "action_ends": [[False, False]],
        "action_values": [[0.75, 0.25]],
        "action_samples": [[2, 2]],
    },
    schema_overrides=polars_schema(SEGMENTS),
)
"""What all states have in common."""


def configured(folder: Path) -> Config:
    """The run in that folder."""
    return Config.model_validate(
        {
            "run": "growth",
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"format": "generic", "path": str(folder / "data.jsonl"), "template": "line"},
            "grader": {"name": "gsm8k"},
            "vstar": {"num_samples": NUM_SAMPLES},
        }
    )


def make(folder: Path, count: int) -> None:
    """The data, the samples and the states."""
    with (folder / "data.jsonl").open("w") as file:
        for number in range(count):
            print(json.dumps({"prompt": f"How many is {number}?", "answer": str(number % 4)}), file=file)
    save_random_model(folder / "model", MODEL)
    config = configured(folder)
    paths, renderer = run_paths(config.run), PromptRenderer(folder / "model", config.data)
    provenance = stage1_provenance(config, renderer, model_identity(folder / "model", paths.known_weights))
    prompts = load_prompts(config.data, config, renderer)
    paths.samples.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for some in batched(prompts, FRAGMENT // NUM_SAMPLES):
        rows = samples_of(some, rng).to_arrow().cast(SAMPLES.stamped(provenance))
        buffer = BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        add_bytes(paths.samples, "part", buffer.getvalue())
    steps = {**provenance.identity, "segments": {"prompts": str(count)}}
    with SEGMENTS_TABLE.writer(paths.segments, Provenance(identity=steps, context=context(config))) as write:
        for some in batched(prompts, 8192):
            write(states_of(some))


def samples_of(prompts: Sequence[Prompt], rng: np.random.Generator) -> pl.DataFrame:
    """The samples of some prompts; each is right with a probability of its prompt's own."""
    solved = rng.random((len(prompts), NUM_SAMPLES)) < rng.random((len(prompts), 1))
    indices = pl.DataFrame({"sample_index": range(NUM_SAMPLES)})
    rows = columns_of(prompts).join(indices, how="cross").with_columns(pl.Series("solved", solved.ravel()))
    samples = rows.select(
        pl.exclude("solved"),
        pl.concat_str(pl.lit(TEXT), "sample_index").alias("completion"),
        pl.lit(120).alias("completion_tokens"),
        pl.when("solved").then(pl.lit("correct")).otherwise(pl.lit("wrong")).alias("outcome"),
        pl.col("solved").cast(pl.Float64).alias("reward"),
    )
    schema = polars_schema(SAMPLES.schema)
    return pl.concat([pl.DataFrame(schema=schema), samples], how="diagonal_relaxed").cast(schema)


def columns_of(prompts: Sequence[Prompt]) -> pl.DataFrame:
    """The columns that every table has of a prompt."""
    return pl.DataFrame(
        {
            "prompt_id": [prompt.id for prompt in prompts],
            "prompt": [prompt.text for prompt in prompts],
            "answer": [prompt.answer for prompt in prompts],
            "prompt_token_hash": [prompt.token_hash for prompt in prompts],
        }
    )


def states_of(prompts: Sequence[Prompt]) -> pl.DataFrame:
    """The prompt itself as a state, with two next steps."""
    names = [state_id(prompt.id, ()) for prompt in prompts]
    rows = columns_of(prompts).with_columns(pl.Series("state_id", names)).join(STATE, how="cross")
    return rows.select(SEGMENTS.names)


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    config, console = configured(folder), Terminal(quiet=True)
    steps = Config.model_validate({**config.model_dump(), "advantages": {"values": "monte_carlo"}})
    table = run_paths(config.run).vstar
    rules = drop_rules(unsolved=True, solved=True, min_pass_rate=0, max_pass_rate=1)

    def nothing_is_drawn(*_: object, **__: object) -> Any:
        raise AssertionError("all samples are there")

    return {
        "vstar": lambda: run_stage1(config, console, check=False, engines=LOCAL.built_by(nothing_is_drawn)),
        "rescore": lambda: rescore(table, table, 0.25),
        "filter": lambda: filter_prompts(table, None, rules),
        "inspect": lambda: describe(table),
        "train, before a model": lambda: prepare(config, table),
        "advantages": lambda: run_advantages(steps, console, nothing_is_drawn),
    }


def measured(folder: Path, command: str) -> tuple[float, float, float]:
    """A command's seconds, CPU seconds, and peak of memory in MiB; for a process of its own."""
    work = commands(folder)[command]
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu_began, peak_mib()


def sizes(paths: RunPaths) -> Iterator[str]:
    """Files and bytes of the samples, bytes of the tables."""
    samples = list(paths.samples.glob("*.parquet"))
    yield f"{len(samples):,}"
    for files in (samples, [paths.vstar], [paths.segments], [paths.advantages]):
        yield f"{sum(file.stat().st_size for file in files) / 2**20:,.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    chosen = parser.parse_args()
    figures = {"seconds": 1, "CPU seconds": 1, "peak memory, MiB": 0}
    tables: dict[str, list[list[str]]] = {title: [] for title in figures}
    disk = []
    for count in chosen.prompts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["ASTAR_PO_ARTIFACTS"] = str(folder / "artifacts")
            alone(make, folder, count)
            found = {command: alone(measured, folder, command) for command in commands(folder)}
            for place, (title, digits) in enumerate(figures.items()):
                row = (f"{each[place]:,.{digits}f}" for each in found.values())
                tables[title].append([f"{count:,}", *row])
            disk.append([f"{count:,}", *sizes(run_paths(configured(folder).run))])
    for title, rows in tables.items():
        print(f"\n{title}:\n\n{markdown(['prompts', *found], rows)}")
    heads = ["prompts", "files of samples", "samples, MiB", "vstar, MiB", "segments, MiB", "advantages, MiB"]
    print(f"\ndisk:\n\n{markdown(heads, disk)}")


if __name__ == "__main__":
    main()
