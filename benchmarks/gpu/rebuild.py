"""An engine that is closed, awake and asleep, and built again in the same process, as after it has died.

Its memory should be free each time: vLLM's sleep mode refuses a second engine while the first has any. Models are
compiled and graphs captured, which is what may keep them.
"""

from pathlib import Path

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import engine_values, settings
from benchmarks.gpu.reload import COMPLETION, PROMPT, PROMPTS, Greedy, spread_model
from benchmarks.gpu.watch import GIB, TimedEngine, free_bytes
from benchmarks.training import made_up_data
from common.engines.vllm_engine import VllmEngine
from stage2_train.ranks import join_ranks

LEAST_FREED = 0.9
"""Of what an engine took, once it is closed; the libraries of its kernels stay."""


def measure(findings: Findings, folder: Path) -> None:
    """Three engines, one after the other."""
    model = spread_model(folder, is_tiny=findings.is_tiny, tied=False, odd=True)
    config = settings(
        model,
        {
            "model.dtype": "bfloat16",
            "data.max_prompt_tokens": PROMPT,
            "sampling.max_completion_tokens": COMPLETION,
            **engine_values(is_tiny=findings.is_tiny, share=0.3),
            "engine.max_num_seqs": PROMPTS,
        },
    )
    join_ranks(config.seed)  # as in training: vLLM is the guest
    data = made_up_data(model, config, [PROMPT] * PROMPTS)
    first: Greedy | None = None
    for closed in ("awake", "asleep", "awake again"):
        before = free_bytes()
        timed = TimedEngine(lambda: VllmEngine(config, model, data.renderer, beside_trainer=True))
        taken = before - free_bytes()
        found = Greedy(timed, data.prompts)
        if first is None:
            first = found
        else:
            findings.holds(f"closed {closed}: its tokens were those of the first engine", found == first)
        if closed == "asleep":
            timed.sleep()
        timed.close()
        left = before - free_bytes()
        findings.row(
            "Engines",
            closed=closed,
            start_s=timed.seconds["build"],
            took_GiB=taken / GIB,
            left_GiB=left / GIB,
        )
        findings.at_least(
            f"closed {closed}: share of its memory given back",
            1 - left / taken if taken else 1.0,
            LEAST_FREED,
            of_the_hardware=True,
        )
