"""Stage 1 as `vstar` runs it against bare vLLM on the same prompts and engine: tokens a second, in turn."""

import statistics
from pathlib import Path

from benchmarks.gpu.demo import base_model
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import random_model, settings
from benchmarks.stage1 import WAYS
from benchmarks.stage1 import measure as measure_rates
from benchmarks.training import made_up_data
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer

LEAST_RATE = 0.97
"""The aim for stage 1's tokens a second, over those of bare vLLM with the same seeds."""
PROMPT = 128
REPETITIONS = {"1.5b": 3, "demo": 6}
"""After one that is not counted."""


def measure(findings: Findings, folder: Path, *, shape: str) -> None:
    """The demo's model and prompts, or a large model of random weights on made-up ones."""
    tiny = findings.is_tiny
    small: dict[str, object] = {"engine.cpu_kv_cache_gib": 0.1, "engine.max_num_seqs": 16} if tiny else {}
    if shape == "demo":
        model = base_model(folder, is_tiny=tiny)
        config = settings(
            model,
            {"model.dtype": "bfloat16", "data.limit": 8 if tiny else 256, "vstar.num_samples": 4, **small},
        )
        prompts = load_prompts(config.data, config, PromptRenderer(model, config.data))
    else:
        model = random_model(folder, shape, "bfloat16", is_tiny=tiny)
        config = settings(
            model,
            {
                "model.dtype": "bfloat16",
                "data.max_prompt_tokens": PROMPT,
                "sampling.max_completion_tokens": 8 if tiny else 128,
                "vstar.num_samples": 4,
                **small,
            },
        )
        prompts = made_up_data(model, config, [PROMPT] * (4 if tiny else 64)).prompts
    found = measure_rates(config, prompts, repetitions=2 if tiny else REPETITIONS[shape])
    for way in WAYS:
        findings.row(
            f"{found.prompts} prompts × {config.vstar.num_samples}, medians",
            way=way,
            tokens_a_second=statistics.median(found.rates[way]),
            stage_1_over_it=statistics.median(found.over(way)),
            lowest=min(found.over(way)),
            highest=max(found.over(way)),
        )
    seeded = statistics.median(found.over(WAYS[0]))
    findings.at_least("stage 1 over bare vLLM, same seeds", seeded, LEAST_RATE, of_the_hardware=True)
