"""Runs parts, each in a process of its own with its own time, and keeps what they found whatever happens to them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.findings import Device, Findings, Status
from benchmarks.gpu.machine import describe
from benchmarks.gpu.parts import LIMIT_SECONDS, Part
from common.runs import REPOSITORY

LAST_LINES = 40
"""Of the output of a part that did not finish."""
PATIENCE: dict[Device, int] = {"cuda": 1, "cpu": 10}
"""Times the limit: on a CPU that others use, too, libraries take long to load."""


def run(
    part: Part,
    device: Device,
    folder: Path,
    *,
    is_tiny: bool,
    program: Sequence[str] = ("-m", "benchmarks.gpu.child"),
    limit_seconds: float | None = None,
) -> Findings:
    """Run a part to its end or limit. Its findings are in folder/<part>.json, its output in folder/<part>.log."""
    file, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    findings = Findings(part=part.name, device=device, is_tiny=is_tiny, machine=describe(device))
    findings.file = file
    findings.write()
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *program, part.name, str(file.absolute()), str(shared.absolute())],
            cwd=REPOSITORY,
            env=environment(device),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # not a session, which would outlive the one that this runs in
        )
        try:
            status = process.wait(limit_seconds or LIMIT_SECONDS * PATIENCE[device])
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    findings = Findings.of(json.loads(file.read_text(encoding="utf-8")))
    findings.file = file
    findings.seconds = time.monotonic() - began
    ways: dict[int | None, Status] = {0: "finished", None: "too slow"}
    findings.status = ways.get(status, "failed")
    if findings.status != "finished":
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        findings.end_of_output = [f"exit status {status}", *(line[:300] for line in lines[-LAST_LINES:])]
    findings.write()
    return findings


def environment(device: str) -> dict[str, str]:
    """That of a part's process: without a network, without the GPU on a CPU, with vLLM's log in its output."""
    ours = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": device, "PYTHONUNBUFFERED": "1"}
    ours["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    if device == "cpu":
        ours["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **ours}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and everything that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
