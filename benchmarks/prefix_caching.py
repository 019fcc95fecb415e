"""What vLLM's prefix caching saves when states of one solution are completed, as `segments` does.

    .venv/bin/python -m benchmarks.prefix_caching

A model of random weights completes SOLUTIONS × STEPS states: prompts of PROMPT tokens with 0 to STEPS − 1 steps of STEP
tokens, COMPLETIONS times each, up to STEPS steps. The ways are run in turn: in the order of `segments`, shuffled, and
without the cache.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import cli  # noqa: F401  the thread settings of the command line
from benchmarks import bare_vllm
from benchmarks.processes import rotations
from benchmarks.tables import markdown
from benchmarks.training import save_random_model
from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.engines.vllm_engine import VllmEngine
from common.rollout import SampleRequest
from stage2_train.config import Config

SOLUTIONS, STEPS, COMPLETIONS = 4, 6, 16
PROMPT, STEP = 150, 30
VOCABULARY = 1024
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
WAYS = ("with the cache", "shuffled, with the cache", "without the cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), SHAPE)
        seconds = _measure(Path(folder), arguments.repetitions)
    base = statistics.median(seconds[WAYS[2]])
    rows = [
        [way, f"{statistics.median(taken):.1f}", f"{statistics.median(taken) / base:.2f}"]
        for way, taken in seconds.items()
    ]
    states = SOLUTIONS * STEPS
    print(f"{states} states × {COMPLETIONS} completions; medians of {arguments.repetitions}\n")
    print(markdown(["way", "s", "/ without the cache"], rows))


def _measure(folder: Path, repetitions: int) -> dict[str, list[float]]:
    import vllm

    config = Config.model_validate(
        {
            "run": "prefix_caching",
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"format": "word_problems", "max_prompt_tokens": PROMPT},
            "sampling": {"max_completion_tokens": STEP * STEPS},
            "grader": {"name": "gsm8k"},
        }
    )
    renderer = PromptRenderer(folder, config.data)
    without = partial(vllm.LLM, enable_prefix_caching=False)
    cached = VllmEngine(config, folder, renderer, beside_trainer=False)
    with mock.patch("vllm.LLM", without):
        uncached = VllmEngine(config, folder, renderer, beside_trainer=False)
    requests = _requests()
    shuffled = random.Random(0).sample(requests, len(requests))
    work = {WAYS[0]: (cached, requests), WAYS[1]: (cached, shuffled), WAYS[2]: (uncached, requests)}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repetition, way in rotations(WAYS, repetitions + 1):
        engine, batch = work[way]
        taken = _timed(engine, batch, config.sampling)
        if repetition:  # the first warms up
            seconds[way].append(taken)
    return seconds


def _requests() -> list[SampleRequest]:
    """The completions of each state: random tokens, which end at the limit of a whole solution."""
    rng = random.Random(0)
    requests: list[SampleRequest] = []
    for solution in range(SOLUTIONS):
        prompt = tuple(rng.choices(range(1, VOCABULARY), k=PROMPT))
        steps = tuple(rng.choices(range(1, VOCABULARY), k=STEP * (STEPS - 1)))
        for step in range(STEPS):
            for index in range(COMPLETIONS):
                requests.append(
                    SampleRequest(
                        key=(solution, step, index),
                        prompt_token_ids=prompt,
                        seed=len(requests),
                        prefix=steps[: step * STEP],
                    )
                )
    return requests


def _timed(engine: VllmEngine, requests: Sequence[SampleRequest], sampling: SamplingParams) -> float:
    bare_vllm.fresh(engine)
    began = time.perf_counter()
    deque(engine.generate(requests, sampling), maxlen=0)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
