"""An engine for the processes of tests/test_fleet.py: it samples a number, from its seed and its weights.

Files in its folder make it fail: `die-SEED`, `fail-SEED` and `hang-SEED` at that request, once, `always-SEED` each
time, and `refuse` while it is built.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch

from common.config import SamplingParams
from common.errors import EngineFailed, UserError
from common.rollout import Completion, SampleRequest

BATCH = 4


class NumberEngine:
    def __init__(self, folder: Path, seconds: float) -> None:
        if (folder / "refuse").exists():
            raise UserError("the model cannot be loaded; take another")
        self._folder = folder
        self._seconds = seconds
        self._weight = 0
        (folder / f"built-{os.getpid()}").touch()

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Like vLLM's, it takes requests before it has finished those that it has."""
        source = iter(requests)
        running = list(islice(source, BATCH))
        while running:
            time.sleep(self._seconds)
            request = running.pop(0)
            self._fail_at(request.seed)
            tokens = (request.seed, self._weight, sampling.max_completion_tokens)
            text = str(os.getpid())
            yield Completion(key=request.key, token_ids=tokens, text=text, truncated=False)
            running += islice(source, 1)

    def _fail_at(self, seed: int) -> None:
        if (self._folder / f"always-{seed}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        for name in ("die", "fail", "hang"):
            file = self._folder / f"{name}-{seed}"
            if file.exists():
                file.unlink()
                if name == "hang":
                    time.sleep(1000)
                if name == "fail":
                    raise EngineFailed(
                        "vLLM failed while it sampled (RuntimeError: out of luck); start again"
                    )
                os.kill(os.getpid(), signal.SIGKILL)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._weight = int(sum(float(tensor.sum()) for _, tensor in named_tensors))
        (self._folder / f"loaded-{self._weight}-{os.getpid()}").touch()

    def sleep(self) -> None:
        (self._folder / f"asleep-{os.getpid()}").touch()

    def close(self) -> None:
        """The process ends without it."""


def number_engine(folder: Path, seconds: float) -> NumberEngine:
    return NumberEngine(folder, seconds)


def large_engine(folder: Path, tokenizer: bytes) -> NumberEngine:
    return NumberEngine(folder, 0.0)


def engine_with_child(folder: Path) -> NumberEngine:
    """Dies while it is built, after it has started a process."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    (folder / f"child-{child.pid}").touch()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
