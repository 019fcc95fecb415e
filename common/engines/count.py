"""How many engines a job starts on this machine."""

import math
import os
from pathlib import Path
from typing import TypeVar

from common.config import EngineConfig, RunConfig
from common.errors import UserError
from common.model.reading import read_model
from common.provenance import versions

Config = TypeVar("Config", bound=RunConfig)

SMALL = 50_000_000
"""The most parameters of a small model."""


def with_engines(config: Config, folder: Path, samples: int) -> Config:
    """The config with the number of engines for so many samples of the model in `folder`.

    That is the configured number, or what pays: all GPUs; on a CPU one engine per core if the model is small.
    """
    if config.engine.engines != "auto":
        return config
    if devices := visible_devices():
        return fitting(config, len(devices) // config.engine.tensor_parallel_size, samples)
    return fitting(config, cores() if small(folder) else 1, samples)


def fitting(config: Config, most: int, samples: int) -> Config:
    """The config with at most so many engines, of which each fills at least one batch with its part of the samples."""
    engine = config.engine
    count = max(1, min(most, math.ceil(samples / engine.max_num_seqs)))
    return config.model_copy(update={"engine": engine.model_copy(update={"engines": count})})


def small(folder: Path) -> bool:
    """Whether an engine on a CPU is busier with Python than with the model in `folder`, so that one a core pays."""
    return read_model(folder, may_be_quantised=True).parameters <= SMALL


def of_each_rank(engines: int, ranks: int) -> int:
    """The part of a rank of training. Raises UserError if the engines cannot be divided."""
    if engines % ranks:
        raise UserError(
            f"engine.engines {engines} cannot be divided among the {ranks} processes of training; choose a multiple"
        )
    return engines // ranks


def devices_of(engine: EngineConfig) -> int:
    """The devices that the configured engines use together: GPUs, or shares of a machine without."""
    assert engine.engines != "auto", "a number has been chosen"
    return engine.engines * engine.tensor_parallel_size


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as values of CUDA_VISIBLE_DEVICES. Does not initialise them."""
    import torch

    if not torch.cuda.is_available():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(torch.cuda.device_count())]
    return names if chosen is None else [name.strip() for name in chosen.split(",")][: len(names)]


def idle_gpu(devices: Path = Path("/dev")) -> str | None:
    """A warning if this process may use an NVIDIA GPU that the installed torch is not built for. Imports no torch."""
    installed = versions(["torch"])["torch"] or ""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if is_hidden or not installed.endswith("+cpu") or not any(devices.glob("nvidia[0-9]*")):
        return None
    return (
        f"warning: this machine has an NVIDIA GPU, but torch {installed} uses the CPU; `make setup ACCELERATOR=cuda` "
        "installs the other build"
    )
