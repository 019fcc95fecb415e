"""Runs one part of `benchmarks.gpu` in this process: `python -m benchmarks.gpu.child PART FILE FOLDER`.

The findings so far are in FILE, which says how and on what they are measured. FOLDER is for models, which parts share.
"""

import json
import os
import sys
from pathlib import Path

import cli  # noqa: F401  the thread settings of the command line
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.parts import PARTS
from common.lifetime import die_with


def main(name: str, file: Path, folder: Path) -> None:
    """Add to the findings; whoever started the process learns from its exit status whether all went well."""
    import torch

    findings = Findings.of(json.loads(file.read_text(encoding="utf-8")))
    findings.file = file
    found = "cuda" if torch.cuda.is_available() else "cpu"
    assert found == findings.device, f"torch finds {found}, asked for was {findings.device}"
    if found == "cuda":
        findings.machine["card"] = torch.cuda.get_device_name()
        torch.cuda.init()
        findings.machine["card GiB"] = torch.cuda.mem_get_info()[1] / 2**30
    PARTS[name].measure(findings, folder)
    findings.write()


if __name__ == "__main__":
    die_with(os.getppid())  # and free the GPU
    part, into, place = sys.argv[1:]
    main(part, Path(into), Path(place))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM and torch may take long to say goodbye, or crash in it; `cli.py` shows whether they do
