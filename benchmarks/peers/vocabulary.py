"""Training with the sizes of real models: a vocabulary of 151,936, mixed prompts, completions of up to 1,024 tokens.

The model has random weights, so its completions would not end on their own. Each prompt has a given length, a quantile
of a long-tailed distribution, at which every trainer's rollouts end. GRPO takes half of the prompts, one of each
length, with two completions each. No completion is right, V̂* is the same for all prompts, and no trainer runs stage
1. All train in float32.
"""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import count
from pathlib import Path
from statistics import NormalDist
from typing import Self

from benchmarks.peers.demo import THEIRS, THREADS, run_job, run_trl
from benchmarks.peers.environment import trl_python
from benchmarks.peers.job import Job, Report
from benchmarks.peers.our_run import OurJob
from benchmarks.processes import Finished, rotations
from benchmarks.tables import Column, comparison
from benchmarks.training import ScriptedEngine, save_random_model
from common.demo.word_problems import stream
from common.engines import LOCAL
from common.rollout import Completion, SampleRequest
from common.terminal.console import Terminal
from stage2_train.config import Config

OURS = "ours"
TRAINERS = (OURS, *THEIRS)
VOCABULARY = 151_936
BATCH_SIZE = 16
TRL_MICRO_BATCH_SIZE = 4
"""Sequences that TRL takes at a time: the logits of 4 × 1,024 positions are 2.5 GB, and it holds several such."""
MEDIAN_LENGTH, LENGTH_SIGMA, LONGEST = 164, 1.2, 1024
PROMPT_TOKENS = (20, 200)
MODEL = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
"""A Qwen3 of random weights; the demo's tokenizer knows the first few thousand of its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a trainer; seconds per iteration."""

    seconds: float
    rollout_seconds: float
    peak_mib: float
    imports_mib: float

    @classmethod
    def of(cls, finished: Finished, told: Report) -> Self:
        """A process's cost and report."""
        return cls(
            seconds=(told.updates[-1] - told.began) / len(told.updates),
            rollout_seconds=told.generate_seconds / len(told.updates),
            peak_mib=finished.peak_mib,
            imports_mib=told.imports_mib,
        )


def compare(repetitions: int, iterations: int, folder: Path) -> str:
    """Run every trainer `repetitions` times, in a changing order; returns the table."""
    trl_python()
    model = folder / "model"
    save_random_model(model, MODEL)
    prompts, lengths = build_prompts(iterations, model)
    config = settings(model, folder / "prompts.jsonl", iterations)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts)
    )
    vstar = write_vstar(config, folder)
    runs: dict[str, list[Run]] = {trainer: [] for trainer in TRAINERS}
    for repetition, trainer in rotations(TRAINERS, repetitions):
        place = folder / f"{trainer.replace(' ', '-').lower()}-{repetition}"
        place.mkdir()
        if trainer == OURS:
            done = ours(config, dict(zip(prompts, lengths, strict=True)), folder, place)
        else:
            done = peer(THEIRS[trainer], config, prompts, lengths, vstar, repetition, place)
        runs[trainer].append(done)
        print(
            f"{trainer}, repetition {repetition}: {done.seconds:.0f} s per iteration, rollouts "
            f"{done.rollout_seconds:.0f} s of it, peak {done.peak_mib:,.0f} MiB",
            flush=True,
        )
    document = {trainer: [asdict(one) for one in found] for trainer, found in runs.items()}
    (folder / "runs.json").write_text(json.dumps(document))
    return report(runs)


def completion_lengths(count: int) -> list[int]:
    """Quantiles of a log-normal distribution, cut at LONGEST."""
    shares = ((place + 0.5) / count for place in range(count))
    quantiles = (MEDIAN_LENGTH * math.exp(LENGTH_SIGMA * NormalDist().inv_cdf(share)) for share in shares)
    return [min(LONGEST, round(quantile)) for quantile in quantiles]


def build_prompts(iterations: int, model: Path) -> tuple[list[str], list[int]]:
    """Texts of 20 to 200 tokens and their completions' lengths, each length for two prompts in a row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [length for length in completion_lengths(BATCH_SIZE // 2) for _ in range(2)] * iterations
    rng = random.Random(0)
    problems = stream("train", rng)
    low, high = PROMPT_TOKENS
    prompts: list[str] = []
    while len(prompts) < len(lengths):
        prompt = " ".join(next(problems).question for _ in range(rng.randint(1, 5)))
        if low <= len(tokenizer(prompt).input_ids) <= high and prompt not in prompts:
            prompts.append(prompt)
    return prompts, lengths


def settings(model: Path, data: Path, iterations: int) -> Config:
    """Defaults, except for the size of a batch, no ZeRO on a single process, and a cache that holds one batch."""
    return Config.model_validate(
        {
            "run": "vocabulary",
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"format": "generic", "path": str(data)},
            "sampling": {"max_completion_tokens": LONGEST},
            "grader": {"name": "gsm8k"},
            "engine": {"cpu_kv_cache_gib": 0.25},
            "vstar": {"num_samples": 2},
            "train": {
                "batch_size": BATCH_SIZE,
                "mini_batch_size": BATCH_SIZE,
                "iterations": iterations,
                "zero_stage": 0,
            },
        }
    )


def write_vstar(config: Config, folder: Path) -> float:
    """Stage 1 with a right completion and a wrong one of each prompt; returns V̂*, the same for every prompt."""
    from common.runs import run_paths
    from common.vstar_file import read_vstar
    from stage1_vstar.run import run_stage1

    numbers = count()

    def write(request: SampleRequest) -> Completion:
        text = f"#### {next(numbers) % 2}"
        return Completion(key=request.key, token_ids=(1,), text=text, truncated=False)

    os.environ["ASTAR_PO_ARTIFACTS"] = str(folder)
    run_stage1(
        config,
        Terminal(file=StringIO()),
        check=False,
        engines=LOCAL.built_by(lambda *_, **__: ScriptedEngine(write)),
    )
    (vstar,) = set(read_vstar(run_paths(config.run).vstar)[0]["vstar"])
    return float(vstar)


def ours(config: Config, lengths: dict[str, int], folder: Path, place: Path) -> Run:
    """Stage 2, in a process of its own."""
    vstar = folder / config.run / "vstar.parquet"
    job = OurJob(config=config.model_dump(mode="json"), vstar=str(vstar), completion_lengths=lengths)
    environment = {**THREADS, "ASTAR_PO_ARTIFACTS": str(place)}
    return Run.of(*run_job(job, [sys.executable, "-m", "benchmarks.peers.our_run"], place, environment))


def peer(
    trainer: str,
    config: Config,
    prompts: list[str],
    lengths: list[int],
    vstar: float,
    seed: int,
    place: Path,
) -> Run:
    """One of TRL's trainers."""
    step = 2 if trainer == "grpo" else 1
    assert config.train.iterations is not None
    job = Job.like(
        config,
        trainer=trainer,
        model=config.model.path,
        prompts=[{"prompt": prompt, "answer": "1"} for prompt in prompts[::step]],
        weights=str(place),
        save_every=0,
        seed=seed,
        updates=config.train.iterations,
        micro_batch_size=TRL_MICRO_BATCH_SIZE,
        vstar=vstar,
        completion_lengths=lengths[::step],
    )
    return Run.of(*run_trl(job, place))


def report(runs: dict[str, list[Run]]) -> str:
    """The table of the runs."""

    def column(name: str, digits: int, value: Callable[[Run], float]) -> Column:
        values: dict[str, list[float | None]] = {
            trainer: [value(one) for one in found] for trainer, found in runs.items()
        }
        return Column(name=name, digits=digits, values=values)

    return comparison(
        "trainer",
        [
            column("s per iteration", 1, lambda one: one.seconds),
            column("rollouts", 1, lambda one: one.rollout_seconds),
            column("training", 1, lambda one: one.seconds - one.rollout_seconds),
            column("peak MiB", 0, lambda one: one.peak_mib),
            column("peak MiB above imports", 0, lambda one: one.peak_mib - one.imports_mib),
        ],
    )
