"""The same step with full logits under autograd and kept activations, and with ours, each in a process of its own."""

from pathlib import Path

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import random_model
from benchmarks.gpu.update import add_result, workload
from benchmarks.processes import alone
from benchmarks.scale import WAYS
from benchmarks.scale import measure as measure_step

MICRO_BATCH = 4096
"""At 16,384 tokens the naive way's logits alone would take 40 GiB."""


def measure(findings: Findings, folder: Path) -> None:
    """Both ways, ours first."""
    chosen = workload(findings, tokens_per_micro_batch=MICRO_BATCH)
    model = random_model(folder, "1.5b", "bfloat16", is_tiny=findings.is_tiny)
    for way in reversed(WAYS):
        result = alone(measure_step, way, chosen.config(model, way), model)
        add_result(findings, chosen, result, model, way=way)
