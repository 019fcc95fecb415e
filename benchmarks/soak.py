"""The bookkeeping of a very long training: does anything grow that should not?

    .venv/bin/python -m benchmarks.soak --iterations 100000

Everything around the networks is real: an engine in a process of its own that gets weights at every iteration, drawing
ahead, the grader's processes, the watchdog, metrics.jsonl and TensorBoard, completions to read, checkpoints. The engine
and the networks are scripted. Prints, at every tenth of the iterations, the table so far: the memory of this process
and of the engine's, and how many files, threads and open files there are. metrics.jsonl and TensorBoard's file have to
grow.
"""

import argparse
import io
import os
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import psutil  # type: ignore[import-untyped]
import torch

from benchmarks.processes import resident_mib
from benchmarks.tables import markdown
from common.config import EngineConfig, SamplingParams
from common.engines.fleet import EngineFleet
from common.engines.local_workers import LocalWorker, Share
from common.engines.weight_files import SHARED_MEMORY, WeightFiles
from common.grading import GraderPool
from common.rollout import Completion, Prompt, SampleRequest
from common.runs import RunPaths
from common.terminal.console import Terminal
from stage2_train import checkpoint
from stage2_train.completions import write_completions
from stage2_train.config import Config
from stage2_train.learner import Learner
from stage2_train.metrics import Metrics, MetricsLog, timed
from stage2_train.ranks import ALONE
from stage2_train.sources.batches import flat
from stage2_train.sources.pipeline import RolloutPipeline
from stage2_train.sources.sampler import Draw, Sampler
from stage2_train.watchdog import Watchdog

PROMPTS, GROUP, EVALUATE_EVERY, CHECKPOINT_EVERY = 4, 2, 10, 50
"""Per iteration; and iterations between evaluations and checkpoints, as by default."""
TOKENS = 20


class TextEngine:
    """Answers each request with some tokens and a text."""

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Like RolloutEngine.generate."""
        for request in requests:
            text = f"so it is #### {request.seed % 4}"
            yield Completion(key=request.key, token_ids=(1,) * TOKENS, text=text, truncated=False)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Read the weights, as a real engine does."""
        assert sum(tensor.numel() for _, tensor in named_tensors)

    def sleep(self) -> None:
        """There is nothing to free."""

    def close(self) -> None:
        """There is nothing to free."""


class SmallLearner:
    """Stands where a Learner does, in checkpoints."""

    def save(self, folder: Path, name: str) -> None:
        """Write a kilobyte."""
        (folder / name).mkdir()
        (folder / name / "weights").write_bytes(os.urandom(1024))


def prompts() -> list[Prompt]:
    """Made up."""
    return [
        Prompt(
            id=f"p{number}",
            text=f"How many is {number}?",
            answer=str(number % 4),
            token_ids=array("i", [1, 2]),
            token_hash="",
        )
        for number in range(PROMPTS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=100_000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as job:
        rows = []
        for number, counted in soak(Path(folder), chosen.iterations, job):
            rows.append([f"{number:,}", *counted.values()])
            print(markdown(["iteration", *counted], rows), flush=True)


def soak(folder: Path, iterations: int, job: ExitStack) -> Iterator[tuple[int, dict[str, str]]]:
    """Run that many iterations; yields what is counted at each tenth of them."""
    config = Config.model_validate(
        {
            "run": "soak",
            "model": {"path": "none"},
            "data": {"format": "word_problems"},
            "grader": {"name": "gsm8k", "workers": 1},
            "train": {"staleness": 1},
        }
    )
    paths = RunPaths(folder / "soak")
    from benchmarks.soak import TextEngine as Engine  # by a name that another process finds

    engine = LocalWorker(Engine, Share(threads=1), folder / "libraries.log")
    workers = [engine]
    fleet = EngineFleet(
        lambda _: workers[-1], 1, engine=EngineConfig(max_num_seqs=16), share=WeightFiles.write
    )
    job.callback(fleet.close)
    pool = job.enter_context(GraderPool(config.grader))
    sampler = Sampler(lambda: fleet, pool, config.sampling, ALONE)
    drawn = prompts()
    weights = [("weight", torch.zeros(1000))]

    def draw_of(number: int) -> Draw:
        return Draw(prompts=drawn, places=range(PROMPTS), seed=number, group_size=GROUP)

    source = job.enter_context(closing(RolloutPipeline(sampler, 1, draw_of, lambda: weights)))
    console = Terminal(file=io.StringIO(), quiet=True)
    log = job.enter_context(closing(MetricsLog(config, paths, console, first_iteration=0, last=iterations)))
    job.enter_context(Watchdog(ALONE, timedelta(minutes=10)))
    began = time.monotonic()
    for number in range(1, iterations + 1):
        metrics: Metrics = {}
        with timed("iteration", metrics):
            rollouts = flat(source.groups(number, iterations, metrics))
        metrics |= {
            "reward/mean": sum(each.reward for each in rollouts) / len(rollouts),
            "completion/tokens_mean": TOKENS,
        }
        if number % EVALUATE_EVERY == 0:
            metrics["evaluate/pass_at_1"] = 0.5
            write_completions(
                paths.completions, number, training=rollouts, held_out=[], pass_rate={}, vstar={}
            )
        log.write(number, metrics)
        if number % CHECKPOINT_EVERY == 0:
            state: dict[str, Any] = {"iteration": number, "held_out_accuracy": 0.5}
            parts = {"state": cast(Learner, SmallLearner())}
            checkpoint.write(paths.checkpoints, state, parts, ALONE, keep=2)
        if number % max(1, iterations // 10) == 0 or number == min(1000, iterations):
            yield number, figures(paths, engine, number / (time.monotonic() - began))


def figures(paths: RunPaths, engine: LocalWorker, rate: float) -> dict[str, str]:
    """What may grow."""
    own, engines = psutil.Process(), psutil.Process(engine.pid)
    return {
        "per second": f"{rate:,.0f}",
        "memory, MiB": f"{resident_mib():,.0f}",
        "engine, MiB": f"{engines.memory_info().rss / 2**20:,.0f}",
        "threads": str(threading.active_count()),
        "open files": str(own.num_fds()),
        "files of the run": str(sum(path.is_file() for path in paths.root.rglob("*"))),
        "in shared memory": str(len(list(SHARED_MEMORY.glob("astar-po-*")))),
        "metrics.jsonl, MiB": f"{paths.metrics.stat().st_size / 2**20:,.1f}",
    }


if __name__ == "__main__":
    main()
