"""Reference log-probs and one optimizer step on random tokens, without an engine: rate, and memory beside the forecast.

The code is stage 2's own, as in benchmarks.scale: 64 sequences of 256 + 1,024 tokens, the second of two iterations. A
model whose weights cannot all be trained on this card is said to be so, and trained with an adapter.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from benchmarks.compiled import compiled_layers
from benchmarks.flops import BACKWARD, forward_flops
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.iteration import FORECAST_ERROR, LEAST_RATE, RATE
from benchmarks.gpu.models import random_model
from benchmarks.gpu.watch import GIB, device_bytes
from benchmarks.scale import Result, Workload, computed
from benchmarks.scale import measure as measure_step
from stage2_train.memory import memory_per_gpu, read_shape

ADAPTER = ("train.lora.rank=16",)


def measure(
    findings: Findings, folder: Path, *, shape: str, lora: bool = False, compiled: bool = False
) -> None:
    """One model; with `lora` an adapter of it, beside the forecast of training all of its weights.

    With `compiled` its layers are compiled by torch, which the product does not do.
    """
    model = random_model(folder, shape, "bfloat16", is_tiny=findings.is_tiny)
    if lora:
        forecast(findings, workload(findings), model, "all weights")
    chosen = workload(findings, overrides=ADAPTER if lora else ())
    if not forecast(findings, chosen, model, "an adapter" if lora else "all weights") and findings.is_judged:
        findings.remark("not run: it does not fit")
        return
    with compiled_layers() if compiled else nullcontext():
        result = measure_step("ours", chosen.config(model), model)
    add_result(findings, chosen, result, model, label="ours, compiled" if compiled else "ours")


def workload(
    findings: Findings, *, tokens_per_micro_batch: int = 16_384, overrides: tuple[str, ...] = ()
) -> Workload:
    """Everything but the model."""
    if findings.is_tiny:
        return Workload(
            dtype="bfloat16",
            sequences=4,
            tokens_per_micro_batch=64,
            prompt=8,
            completion=16,
            overrides=overrides,
        )
    return Workload(
        dtype="bfloat16",
        sequences=64,
        tokens_per_micro_batch=tokens_per_micro_batch,
        overrides=overrides,
    )


def forecast(findings: Findings, chosen: Workload, model: Path, what: str) -> bool:
    """Show what training would take in stage 2's own configuration, without an engine; whether it fits."""
    config = chosen.config(model)
    memory = memory_per_gpu(read_shape(model), config, gpus=1, gpu_bytes=device_bytes())
    needed = computed(read_shape(model), config, "ours", resident=False)
    findings.row(
        "Forecast",
        trained=what,
        GiB=needed / GIB,
        card_GiB=device_bytes() / GIB,
        with_optimizer_in_main_memory_GiB=sum(_offloaded(chosen, model).values()) / GIB,
        parameters=memory["parameters"],
    )
    return needed <= device_bytes()


def _offloaded(chosen: Workload, model: Path) -> dict[str, int]:
    """What main memory would hold if the optimizer were there."""
    settings = replace(chosen, overrides=(*chosen.overrides, "train.offload_optimizer=true"))
    found: dict[str, int] = memory_per_gpu(read_shape(model), settings.config(model), gpus=1, gpu_bytes=0)[
        "host"
    ]
    return found


def add_result(
    findings: Findings,
    chosen: Workload,
    result: Result,
    model: Path,
    *,
    way: str = "ours",
    label: str | None = None,
) -> None:
    """A row of one step, and its checks if it is ours."""
    config = chosen.config(model, way)
    expected = computed(result.shape, config, way, resident=findings.device == "cpu")
    row: dict[str, str | float | None] = {"way": label or way, "micro_batch": chosen.tokens_per_micro_batch}
    if result.update_seconds is None:
        findings.row("One step", **row, reference_s=None, update_s=None, forecast_GiB=expected / GIB)
        findings.remark(f"{way}: does not fit")
        return
    trained_backward = 1 if config.train.lora else BACKWARD
    operations = (1 + trained_backward) * forward_flops(result.shape, *chosen.lengths)
    share = operations / result.update_seconds / result.operations_a_second
    findings.row(
        "One step",
        **row,
        reference_s=result.reference_seconds,
        update_s=result.update_seconds,
        update_share_of_the_rate=share,
        large_product_TFLOP_s=result.operations_a_second / 1e12,
        peak_GiB=result.peak_bytes / GIB,
        forecast_GiB=expected / GIB,
        peak_over_forecast=result.peak_bytes / expected,
    )
    if way == "ours":
        findings.at_least(RATE, share, LEAST_RATE, of_the_hardware=True)
        findings.at_most(
            "peak over forecast, distance from 1",
            abs(result.peak_bytes / expected - 1),
            FORECAST_ERROR,
            of_the_hardware=True,
        )
