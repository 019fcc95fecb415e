"""TRL's own environment, made on first use in artifacts/peers/venv."""

import subprocess
import sys
from functools import cache
from pathlib import Path

from common.runs import run_paths

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
TORCH = "torch==2.13.0"
TRL_VARIABLES = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ".", "PYTHONWARNINGS": "ignore"}
"""The environment variables of its programs."""


@cache
def trl_python() -> Path:
    """The interpreter of TRL's environment."""
    folder = run_paths("peers").root / "venv"
    python, installed = folder / "bin" / "python", folder / "requirements.txt"
    if not installed.is_file() or installed.read_bytes() != REQUIREMENTS.read_bytes():
        print(f"installing TRL into {folder} (1.5 GB)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        # As in the Makefile: PyPI has no CPU build of torch, uv knows PyTorch's own index.
        if subprocess.run([*pip, f"{TORCH}+cpu"], capture_output=True).returncode:
            subprocess.run([*pip, "uv"], check=True)
            uv = [str(folder / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(python)]
            subprocess.run([*uv, "--torch-backend", "cpu", "--no-deps", TORCH], check=True)
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)
        installed.write_bytes(REQUIREMENTS.read_bytes())
    return python
