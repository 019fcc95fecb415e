"""Samples stream through stage 1: its memory does not depend on their number."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAMPLES = 160_000
HELD_MIB = 80  # a job that kept its samples would grow by some 1.2 KiB each: 130 MiB over the last 7/10


def test_memory_does_not_grow_with_the_samples(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.stage1_memory", "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, "--samples", str(SAMPLES), "--num-samples", "160"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    resident = [float(mib.replace(",", "")) for mib in re.findall(r"samples +([\d,]+) MiB", done.stdout)]
    assert len(resident) == 10
    assert resident[9] - resident[2] < HELD_MIB
