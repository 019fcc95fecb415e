"""One step of the transformers engine's sampler: its share of a step, at Qwen2.5's vocabulary and a full batch.

Its random numbers, one a token, are drawn on the CPU for the whole batch before the first step. Beside it, one draw
from the softmax by torch, which has one random stream for the whole batch.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.flops import settled
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.watch import GIB
from common.config import SamplingParams
from common.engines.transformers_engine import _SeededSampler

BATCH, VOCABULARY, LONGEST = 256, 151_936, 1024
STEPS = 20


def measure(findings: Findings, folder: Path) -> None:
    """The time before the first step, and of a step."""
    batch, vocabulary = (4, 4608) if findings.is_tiny else (BATCH, VOCABULARY)
    device = torch.device(findings.device)
    scores_BV = torch.randn(batch, vocabulary, device=device)
    ids_BT = torch.zeros(batch, 1, dtype=torch.long, device=device)
    sampling = SamplingParams(temperature=1.0, max_completion_tokens=LONGEST)
    began = settled()
    sampler = _SeededSampler(list(range(batch)), sampling, device)
    findings.row("Before the first step", s=settled() - began)

    def drawn() -> torch.Tensor:
        return scores_BV.softmax(-1).multinomial(1)

    def ours() -> torch.Tensor:
        return sampler(ids_BT, scores_BV)  # type: ignore[arg-type]

    ways: dict[str, Callable[[], torch.Tensor]] = {"ours": ours, "softmax and multinomial": drawn}
    for way, step in ways.items():
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        began = settled()
        for _ in range(STEPS):
            step()
        seconds = (settled() - began) / STEPS
        peak = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0
        findings.row("A step", way=way, batch=batch, vocabulary=vocabulary, ms=1000 * seconds, GiB=peak / GIB)
