"""What a machine's figures depend on: its card, the driver, versions of libraries, and this checkout."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.findings import Cell
from common.files import hash_files
from common.runs import REPOSITORY

LIBRARIES = ("torch", "triton", "transformers", "deepspeed", "vllm", "peft", "polars", "numpy")
SOURCES = ("benchmarks/**/*.py", "common/**/*.py", "stage1_vstar/**/*.py", "stage2_train/**/*.py")


def describe(device: str) -> dict[str, Cell]:
    """By name; None for what cannot be found out. Imports no torch."""
    card, driver = (None, None)
    if device == "cuda":
        found = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        card, _, driver = (found or "").splitlines()[0].partition(", ") if found else ("a GPU", "", None)
    return {
        "card": card,
        "driver": driver,
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "commit": _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        "sources": hash_files(REPOSITORY, SOURCES)[:16],
    }


def has_gpu() -> bool:
    """Whether the machine has one, found out without torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or _output("nvidia-smi", "-L") is not None


def _version(name: str) -> str | None:
    for known in (name, f"{name}-cpu"):
        try:
            return metadata.version(known)
        except metadata.PackageNotFoundError:
            continue
    return None


def _output(*command: str) -> str | None:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip() or None
