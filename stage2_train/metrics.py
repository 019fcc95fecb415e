"""Write a training run's numbers to metrics.jsonl, TensorBoard, optionally W&B, and one console line per iteration.

In a terminal a progress bar with the remaining time is shown below these lines.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import torch

from common.documents import read_metrics
from common.files import write_text, writing_to
from common.remote.places import url_of
from common.runs import RunPaths
from common.terminal.console import Terminal
from common.terminal.progress import progress_bar
from stage2_train.config import Config
from stage2_train.wandb_log import WandbLog
from stage2_train.watchdog import in_phase

STORE_SECONDS = 60.0
"""The lines of a run at a URL are put there at least so often, and before each checkpoint."""

Metrics = dict[str, float]
"""Values under group/name keys, such as reward/mean or time/rollout (seconds)."""


@contextmanager
def timed(name: str, metrics: Metrics) -> Iterator[None]:
    """Add the seconds spent inside to metrics["time/<name>"]."""
    _wait_for_device()
    started = time.perf_counter()
    try:
        with in_phase(name):
            yield
    finally:
        _wait_for_device()
        metrics[f"time/{name}"] = metrics.get(f"time/{name}", 0.0) + time.perf_counter() - started


def _wait_for_device() -> None:
    """Let a GPU finish its work, so that the time is attributed to the right phase."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """The most memory held so far: of the GPU if there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsLog:
    """Writes each iteration's metrics to all destinations. Only for the main rank."""

    def __init__(
        self, config: Config, paths: RunPaths, console: Terminal, *, first_iteration: int, last: int
    ) -> None:
        """Continue after `first_iteration` − 1: lines of later iterations belong to lost work and are removed."""
        from stage2_train.tensorboard_file import TensorBoardFile

        self._paths = paths
        self._console = console
        self._last = last
        self._bar = progress_bar(console)
        self._task = self._bar.add_task("", total=last, completed=max(0, first_iteration - 1))
        kept = [line for line, values in read_metrics(paths.metrics) if values["iteration"] < first_iteration]
        write_text(paths.metrics, "".join(kept))
        self._file = self._opened()
        self._stored = time.monotonic()
        with writing_to(paths.tensorboard):
            self._board = TensorBoardFile(paths.tensorboard, first_step=first_iteration)
        self._wandb = WandbLog(config, console) if config.train.wandb_project is not None else None
        self._bar.start()

    def _opened(self) -> TextIO:
        return self._paths.metrics.open("a+", encoding="utf-8")

    def close(self) -> None:
        """Flush everything; failures to write have been reported before."""
        self._bar.stop()
        for file in (self._file, self._board):
            with suppress(OSError):
                file.close()
        if self._wandb is not None:
            self._wandb.close()

    def write(self, iteration: int, metrics: Metrics) -> None:
        """Log one iteration; its line is on disk when this returns, before any checkpoint that continues after it.

        Raises UserError if the disk is full.
        """
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing_to(self._paths.metrics):
            self._file.write(json.dumps({"iteration": iteration, **finite}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if time.monotonic() - self._stored > STORE_SECONDS:
            self.store()
        with writing_to(self._paths.tensorboard):
            self._board.write(iteration, metrics)
        if self._wandb is not None:
            self._wandb.write(iteration, metrics)
        self._console.print(self._line(iteration, metrics))
        self._bar.update(self._task, completed=iteration, description=f"iteration {iteration}/{self._last}")

    def store(self) -> None:
        """Put the lines so far where the run is, if that is a URL. Raises UserError if it cannot be reached."""
        self._stored = time.monotonic()
        if url_of(self._paths.metrics) is None:
            return
        # Another command of this machine may have put what the store has in the file's place.
        self._file.seek(0)
        write_text(self._paths.metrics, self._file.read())
        self._file.close()
        self._file = self._opened()

    def _line(self, iteration: int, metrics: Metrics) -> str:
        parts = [f"{iteration:>5}/{self._last}"]
        if "time/iteration" in metrics:
            losses = [value for name, value in metrics.items() if name.startswith("loss/")]
            parts += [
                *[f"reward {reward:.3f}" for reward in [metrics.get("reward/mean")] if reward is not None],
                *[f"loss {loss:.4f}" for loss in losses[:1]],
                *[f"KL {kl:.3f}" for kl in [metrics.get("kl/sequence")] if kl is not None],
                *[
                    f"ln π/π_ref {ratio:.3f}"
                    for ratio in [metrics.get("policy/log_ratio")]
                    if ratio is not None
                ],
                f"tokens {metrics['completion/tokens_mean']:.1f}",
                f"{metrics['time/iteration']:.2f} s",
            ]
            parts += [f"{share:.1%} unjudged" for share in [metrics.get("reward/unjudged")] if share]
            parts += [f"{steps:.0f} steps skipped" for steps in [metrics.get("train/skipped_steps")] if steps]
        if "evaluate/pass_at_1" in metrics:
            parts.append(f"held-out {metrics['evaluate/pass_at_1']:.3f}")
        return "  ".join(parts)
