"""Stage 1 against plain vLLM on the same prompts: what grading and writing cost the engine.

    make base-model && .venv/bin/python -m benchmarks.stage1

One engine is loaded. Repetitions interleave three ways of drawing the same number of samples: `LLM.generate` with a
seed a request (the same samples as stage 1's, token for token, which is checked), `LLM.generate` with one unseeded
request of n samples a prompt, and stage 1 as `vstar` runs it: graded in other processes, written to a store.
"""

import argparse
import gc
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import cli  # noqa: F401  the thread settings of the command line
from common.data.prompts import PromptRenderer, load_prompts
from common.engines.vllm_engine import VllmEngine
from common.grading import GraderPool
from common.model_files import model_identity, reference_model
from common.provenance import Provenance
from common.sampling.generate import generate_samples
from common.sampling.missing import Missing
from common.store import SampleStore
from stage1_vstar.run import stage1_provenance
from stage2_train.config import Config, load_config

WAYS = ("vLLM, seeded", "vLLM, unseeded", "stage 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repetitions", type=int, default=30)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    folder = reference_model(config)
    renderer = PromptRenderer(folder, config.data)
    prompts = load_prompts(config.data, config, renderer)
    missing = Missing(prompts, np.ones((len(prompts), config.vstar.num_samples), dtype=np.bool_))
    provenance = stage1_provenance(config, renderer, model_identity(folder))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, set[int]] = {way: set() for way in WAYS}
    with GraderPool(config.grader) as pool:
        engine = VllmEngine(config, folder, renderer, beside_trainer=False)
        run = {
            WAYS[0]: lambda: _plain(engine, missing, config, seeded=True),
            WAYS[1]: lambda: _plain(engine, missing, config, seeded=False),
            WAYS[2]: lambda: _stage1(engine, missing, config, pool, provenance),
        }
        for repetition in range(arguments.repetitions + 1):
            first = repetition % len(WAYS)
            for way in WAYS[first:] + WAYS[:first]:
                _fresh(engine)
                taken, count = run[way]()
                tokens[way].add(count)
                if repetition:  # the first warms up
                    seconds[way].append(taken)
    assert tokens[WAYS[0]] == tokens[WAYS[2]], f"the samples differ: {tokens}"
    rate = {way: [max(tokens[way]) / taken for taken in seconds[way]] for way in WAYS}
    print(
        f"{len(prompts):,} prompts × {config.vstar.num_samples}, {arguments.repetitions} repetitions; "
        "quartiles"
    )
    for way in WAYS:
        print(f"  {way:15} {_spread(rate[way], ',.0f')} tokens a second")
    for way in WAYS[:2]:
        ratios = [ours / plain for ours, plain in zip(rate[WAYS[2]], rate[way], strict=True)]
        print(f"  stage 1 over {way}: {_spread(ratios, '.3f')}")


def _plain(engine: VllmEngine, missing: Missing, config: Config, *, seeded: bool) -> tuple[float, int]:
    """Seconds and tokens of `LLM.generate`, which gives text as stage 1 does."""
    import vllm

    llm: Any = engine.llm  # the same engine object

    def parameters(**own: Any) -> vllm.SamplingParams:
        return vllm.SamplingParams(
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            max_tokens=config.sampling.max_completion_tokens,
            **own,
        )

    began = time.perf_counter()
    if seeded:
        requests = list(missing.requests(config.seed))
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        chosen = [parameters(seed=request.seed) for request in requests]
    else:
        prompts = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in missing.prompts]
        chosen = [parameters(n=config.vstar.num_samples)] * len(prompts)
    outputs = llm.generate(prompts, chosen, use_tqdm=False)
    return time.perf_counter() - began, sum(
        len(sample.token_ids) for output in outputs for sample in output.outputs
    )


def _stage1(
    engine: VllmEngine, missing: Missing, config: Config, pool: GraderPool, provenance: Provenance
) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as folder:
        store = SampleStore(Path(folder) / "samples", provenance)
        console = Console(file=io.StringIO())
        began = time.perf_counter()
        generate_samples(missing, engine, pool, store, config.sampling, config.seed, console)
        seconds = time.perf_counter() - began
        return seconds, int(store.read()["completion_tokens"].sum())


def _fresh(engine: VllmEngine) -> None:
    assert engine.llm is not None
    engine.llm.reset_prefix_cache()
    gc.collect()


def _spread(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in statistics.quantiles(values, n=4))


if __name__ == "__main__":
    main()
