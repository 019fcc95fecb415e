"""Stage 1 against plain vLLM on the same prompts: the cost of grading and writing.

    make base-model && .venv/bin/python -m benchmarks.stage1

One engine is loaded. Repetitions interleave three ways of drawing the same number of samples: `LLM.generate` with one
seed per request (the same samples as stage 1's, token for token, which is checked on a CPU), `LLM.generate` with one
unseeded request of n samples per prompt, and stage 1 as `vstar` runs it: graded in other processes, written to a store.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import cli  # noqa: F401  the thread settings of the command line
from benchmarks import bare_vllm
from benchmarks.processes import rotations
from benchmarks.tables import markdown
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.engines.vllm_engine import VllmEngine
from common.grading import GraderPool
from common.model.files import model_identity, reference_model
from common.provenance import Provenance
from common.rollout import Prompt
from common.sampling.generate import generate_samples
from common.sampling.missing import Missing
from common.store import SampleStore
from common.terminal.console import Terminal
from stage1_vstar.run import stage1_provenance
from stage2_train.config import Config, load_config

WAYS = ("vLLM, seeded", "vLLM, unseeded", "stage 1")


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of each way, one number per repetition; those of one repetition were measured in turn."""

    prompts: int
    rates: dict[str, list[float]]

    def over(self, way: str) -> list[float]:
        """Stage 1's over another way's, repetition by repetition."""
        return [ours / other for ours, other in zip(self.rates[WAYS[2]], self.rates[way], strict=True)]


def measure(config: Config, prompts: Sequence[Prompt], repetitions: int) -> Rates:
    """Load one engine and draw from it in turn; a first repetition warms up."""
    folder = reference_model(config)
    renderer = PromptRenderer(folder, config.data)
    missing = Missing(prompts, np.ones((len(prompts), config.vstar.num_samples), dtype=np.bool_))
    provenance = stage1_provenance(config, renderer, model_identity(folder))
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, set[int]] = {way: set() for way in WAYS}
    with GraderPool(config.grader) as pool:
        engine = VllmEngine(config, folder, renderer, beside_trainer=False)
        requests = list(missing.requests(config.seed))
        samples = config.vstar.num_samples
        plain = partial(bare_vllm.generate, engine, renderer, config.sampling)
        run = {
            WAYS[0]: lambda: plain(requests, seeded=True),
            WAYS[1]: lambda: plain(requests[::samples], seeded=False, samples=samples),
            WAYS[2]: lambda: _stage1(engine, missing, config, pool, provenance),
        }
        for repetition, way in rotations(WAYS, repetitions + 1):
            bare_vllm.fresh(engine)
            taken, count = run[way]()
            tokens[way].add(count)
            if repetition:
                rates[way].append(count / taken)
    # On a GPU rounding depends on what else is in the batch.
    assert torch.cuda.is_available() or tokens[WAYS[0]] == tokens[WAYS[2]], f"the samples differ: {tokens}"
    return Rates(len(prompts), rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    renderer = PromptRenderer(reference_model(config), config.data)
    found = measure(config, load_prompts(config.data, config, renderer), arguments.repetitions)
    rows = [
        [way, _quartiles(rates, ",.0f"), _quartiles(found.over(way), ".3f")]
        for way, rates in found.rates.items()
    ]
    print(
        f"{found.prompts:,} prompts × {config.vstar.num_samples}, {arguments.repetitions} repetitions; quartiles\n"
    )
    print(markdown(["way", "tokens per second", "stage 1 over it"], rows))


def _stage1(
    engine: VllmEngine, missing: Missing, config: Config, pool: GraderPool, provenance: Provenance
) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as folder:
        store = SampleStore(Path(folder) / "samples", provenance)
        console = Terminal(file=io.StringIO())
        began = time.perf_counter()
        generate_samples(missing, engine, pool, store, config.sampling, config.seed, console)
        seconds = time.perf_counter() - began
        return seconds, int(store.read()["completion_tokens"].sum())


def _quartiles(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in statistics.quantiles(values, n=4))


if __name__ == "__main__":
    main()
