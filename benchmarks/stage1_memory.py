"""The memory of stage 1 while samples stream through it, with a scripted engine and real grading and writing.

    python -m benchmarks.stage1_memory --samples 1000000

Prints the resident memory of the job (without its grader, which has a limit of its own) at every tenth of the samples,
and its peak, including the table of V̂*. Run it with fewer samples of as many prompts to see the cost of a sample.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from benchmarks.processes import peak_mib, resident_mib
from benchmarks.training import ScriptedEngine
from common.engines import LOCAL
from common.rollout import Completion, SampleRequest
from common.runs import run_paths
from common.terminal.console import Terminal
from common.vstar_file import read_vstar
from stage1_vstar.run import run_stage1
from stage2_train.config import Config

COMPLETION_TOKENS = 120
TEXT = "First we add the numbers, then we divide. " * 12


def writer(total: int) -> Callable[[SampleRequest], Completion]:
    """Writes completions of some 500 characters; prints this process's memory at every tenth of them."""
    began = time.monotonic()
    numbers = count(1)

    def write(request: SampleRequest) -> Completion:
        if (number := next(numbers)) % max(1, total // 10) == 0:
            rate = number / (time.monotonic() - began)
            print(f"  {number:>9,} samples  {resident_mib():6,.0f} MiB  {rate:7,.0f} per second", flush=True)
        return Completion(
            key=request.key,
            token_ids=tuple(range(COMPLETION_TOKENS)),
            text=f"{TEXT}{request.seed} #### {request.seed % 4}",
            truncated=False,
        )

    return write


def stream(model: Path, samples: int, num_samples: int, folder: Path) -> float:
    """Stage 1 with that many samples; returns the peak of resident memory, in MiB."""
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for number in range(samples // num_samples):
            print(
                json.dumps({"prompt": f"How many is {number}? {TEXT[:200]}", "answer": str(number % 4)}),
                file=file,
            )
    config = Config.model_validate(
        {
            "run": "memory",
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"format": "generic", "path": str(data), "template": "line", "max_prompt_tokens": 512},
            "sampling": {"max_completion_tokens": COMPLETION_TOKENS},
            "grader": {"name": "gsm8k"},
            "vstar": {"num_samples": num_samples},
        }
    )
    os.environ["ASTAR_PO_ARTIFACTS"] = str(folder)
    console = Terminal(file=io.StringIO())
    run_stage1(
        config, console, check=False, engines=LOCAL.built_by(lambda *_, **__: ScriptedEngine(writer(samples)))
    )
    rows = read_vstar(run_paths("memory").vstar)[0]
    assert rows["num_samples"].sum() == samples // num_samples * num_samples
    return peak_mib()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("artifacts/demo/base_model"))
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--num-samples", type=int, default=8, help="a prompt")
    arguments = parser.parse_args()
    if not arguments.model.is_dir():
        print(f"there is no {arguments.model}: run `make base-model` first", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        peak = stream(arguments.model, arguments.samples, arguments.num_samples, Path(folder))
    print(f"  peak {peak:,.0f} MiB for {arguments.samples:,} samples, {arguments.num_samples} per prompt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
