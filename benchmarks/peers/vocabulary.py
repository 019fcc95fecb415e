"""Training as it looks on real models: a vocabulary of 151,936, mixed prompts, completions of up to 1,024 tokens.

The model has random weights, so its completions would have no end of their own: each prompt has a given length, the
quantiles of a long-tailed distribution, and every trainer's rollouts end there. GRPO takes half of the prompts, one
of each length, and two completions of each. No completion is right, V̂* is the same for all prompts, and
nobody runs a stage 1. All train in float32.
"""

import json
import math
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rich.console import Console

from benchmarks.peers.demo import THREADS, TRAINERS, run_trl
from benchmarks.peers.environment import trl_python
from benchmarks.peers.job import Job, Report
from benchmarks.peers.processes import Finished, run
from benchmarks.peers.table import OURS, Values, markdown
from common.config import SamplingParams
from common.demo.word_problems import stream
from common.rollout import Completion, SampleRequest
from stage2_train.config import Config

VOCABULARY = 151_936
BATCH_SIZE = 16
TRL_MICRO_BATCH_SIZE = 4
"""Sequences that TRL takes at a time: the logits of 4 × 1,024 positions are 2.5 GB, and it holds several such."""
MEDIAN_LENGTH, LENGTH_SIGMA, LONGEST = 164, 1.2, 1024
PROMPT_TOKENS = (20, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trainer once; seconds an iteration."""

    seconds: float
    rollout_seconds: float
    peak_mib: float
    imports_mib: float


def compare(repetitions: int, iterations: int, folder: Path) -> str:
    """Run every trainer `repetitions` times, in a changing order; returns the table."""
    trl_python()
    model = folder / "model"
    build_model(model)
    prompts, lengths = build_prompts(iterations, model)
    config = settings(model, folder / "prompts.jsonl", iterations)
    (folder / "config.json").write_text(config.to_json())
    (folder / "lengths.json").write_text(json.dumps(dict(zip(prompts, lengths, strict=True))))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts)
    )
    vstar = write_vstar(config, folder)
    runs: dict[str, list[Run]] = {trainer: [] for trainer in TRAINERS}
    for repetition in range(repetitions):
        first = repetition % len(TRAINERS)
        names = list(TRAINERS)
        for trainer in names[first:] + names[:first]:
            place = folder / f"{trainer.replace(' ', '-').lower()}-{repetition}"
            place.mkdir()
            if trainer == OURS:
                done = ours(config, folder, place)
            else:
                done = peer(TRAINERS[trainer], config, prompts, lengths, vstar, repetition, place)
            runs[trainer].append(done)
            print(
                f"{trainer}, repetition {repetition}: {done.seconds:.0f} s an iteration, rollouts "
                f"{done.rollout_seconds:.0f} s of it, peak {done.peak_mib:,.0f} MiB",
                flush=True,
            )
    document = {trainer: [asdict(one) for one in found] for trainer, found in runs.items()}
    (folder / "runs.json").write_text(json.dumps(document))
    return report(runs)


def build_model(folder: Path) -> None:
    """A Qwen3 of random weights; the demo's tokenizer, which knows the first few thousand of its tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from common.demo.base_model import build_tokenizer

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
    """Defaults, but for the size of a batch, no ZeRO on a single process and a cache that is enough for a batch."""
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


class ScriptedEngine:
    """In place of stage 1's engine: a right completion and a wrong one of each prompt."""

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for number, request in enumerate(requests):
            yield Completion(key=request.key, token_ids=(1,), text=f"#### {number % 2}", truncated=False)

    def load_weights(self, _: object) -> None:
        raise AssertionError("stage 1 never changes the weights")

    def sleep(self) -> None:
        raise AssertionError("stage 1 has nothing to make room for")

    def close(self) -> None:
        pass


def write_vstar(config: Config, folder: Path) -> float:
    """Stage 1 with a scripted engine; returns V̂*, the same for every prompt."""
    from common.runs import run_paths
    from common.vstar_file import read_vstar
    from stage1_vstar.run import run_stage1

    os.environ["ASTAR_PO_ARTIFACTS"] = str(folder)
    run_stage1(config, Console(file=StringIO()), build_engine=lambda *_, **__: ScriptedEngine())
    (vstar,) = set(read_vstar(run_paths(config.run).vstar)[0]["vstar"])
    return float(vstar)


def ours(config: Config, folder: Path, place: Path) -> Run:
    """Stage 2, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peers.forced_run", folder, place / "imports.json"]
    environment = {**THREADS, "ASTAR_PO_ARTIFACTS": str(place)}
    finished = run([str(part) for part in command], place / "train.log", environment)
    lines = (place / config.run / "metrics.jsonl").read_text().splitlines()
    iterations: list[dict[str, float]] = [json.loads(line) for line in lines]
    lengths = completion_lengths(BATCH_SIZE // 2)
    expected = sum(lengths) / len(lengths)
    found = [metrics["completion/tokens_mean"] for metrics in iterations]
    assert math.isclose(sum(found) / len(found), expected), f"completions of {found} tokens, not {expected}"
    return Run(
        seconds=sum(metrics["time/iteration"] for metrics in iterations) / len(iterations),
        rollout_seconds=sum(metrics["time/rollout"] for metrics in iterations) / len(iterations),
        peak_mib=finished.peak_mib,
        imports_mib=json.loads((place / "imports.json").read_text()),
    )


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
    Job.like(
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
    ).write(place / "job.json")
    finished, told = run_trl(place)
    return _summary(finished, told)


def _summary(finished: Finished, told: Report) -> Run:
    return Run(
        seconds=(told.updates[-1] - told.began) / len(told.updates),
        rollout_seconds=told.generate_seconds / len(told.updates),
        peak_mib=finished.peak_mib,
        imports_mib=told.imports_mib,
    )


def report(runs: dict[str, list[Run]]) -> str:
    """The table of the runs."""

    def column(value: Any) -> Values:
        return {trainer: [value(one) for one in found] for trainer, found in runs.items()}

    columns = {
        "s an iteration": column(lambda one: one.seconds),
        "rollouts": column(lambda one: one.rollout_seconds),
        "training": column(lambda one: one.seconds - one.rollout_seconds),
        "peak MiB": column(lambda one: one.peak_mib),
        "peak MiB above imports": column(lambda one: one.peak_mib - one.imports_mib),
    }
    return markdown(
        columns, list(runs), dict.fromkeys(columns, 1) | {"peak MiB": 0, "peak MiB above imports": 0}
    )
