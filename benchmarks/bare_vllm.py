"""`LLM.generate` on one of our engines, the baseline for stage 1 and rollouts. It returns text, as they do."""

import gc
import time
from collections.abc import Sequence
from typing import Any

from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.engines.vllm_engine import VllmEngine
from common.rollout import SampleRequest


def fresh(engine: VllmEngine) -> None:
    """Drop cached prefixes, and collect garbage outside the timing."""
    assert engine.llm is not None
    engine.llm.reset_prefix_cache()
    gc.collect()


def generate(
    engine: VllmEngine,
    renderer: PromptRenderer,
    sampling: SamplingParams,
    requests: Sequence[SampleRequest],
    *,
    seeded: bool,
    samples: int = 1,
) -> tuple[float, int]:
    """Seconds, and completion tokens; with their seeds the samples are those of our engine, token for token."""
    import vllm

    llm: Any = engine.llm
    chosen = [
        vllm.SamplingParams(
            n=samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_completion_tokens,
            stop_token_ids=list(renderer.eos_token_ids),
            seed=request.seed if seeded else None,
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
    fresh(engine)
    began = time.perf_counter()
    outputs = llm.generate(prompts, chosen, use_tqdm=False)
    seconds = time.perf_counter() - began
    return seconds, sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
