"""Where an iteration of stage 2 spends its time, beside the least that each phase could take on this machine.

    make base-model vstar && .venv/bin/python -m benchmarks.phases

Two workloads, each in a process of its own: "demo", the demo's model and V̂*, and "larger", a random Qwen2 whose
completions end at random, after some 180 tokens. Iterations are stage 2's own (`Trainer.iteration`). In the midst of
each, right before it samples, its floors are measured and the time that this takes is left out: the same requests by
`LLM.generate` on the same weights, which must give the same number of tokens; one large matrix product in the same
dtype on as many threads; and a copy in memory.

Printed: medians over the iterations, ratios paired. On a busy machine `--processor-time` gives seconds that the other
jobs disturb least; waiting takes none of them. After the table comes what explains
the gap: padding, the products at the sizes that they have, and profiles of one more rollout and optimizer step.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import cli  # noqa: F401  the thread settings of the command line
from benchmarks.flops import ADAMW_BYTES, BACKWARD, copy_rate, forward_flops, matrix_rate, products_seconds
from common.config import SamplingParams
from common.demo.base_model import build_tokenizer
from common.engines.vllm_engine import VllmEngine
from common.grading import GraderPool
from common.rollout import Completion, SampleRequest
from common.runs import REPOSITORY, run_paths
from stage2_train.batch import TokenBatch
from stage2_train.config import Config, load_config
from stage2_train.data import prepare
from stage2_train.memory import Shape, read_shape
from stage2_train.metrics import Metrics
from stage2_train.ranks import join_ranks
from stage2_train.sources.sampler import Sampler
from stage2_train.train import Trainer

WORKLOADS = ("demo", "larger")
DEMO = REPOSITORY / "configs" / "demo.toml"
LARGER = {
    "data.limit": 16,
    "sampling.max_completion_tokens": 256,
    "vstar.num_samples": 1,
    "train.batch_size": 16,
    "train.mini_batch_size": 8,
    "train.tokens_per_micro_batch": 4096,
    "train.learning_rate": 1e-6,
}
EOS_TOKENS = 100
"""Of 32,000 equally likely ones: completions end after 320 tokens on average, and are cut off at 256."""
WARM_UP = 2
"""Iterations that are not counted: the first has AdamW's moments to allocate."""
OPERATORS_SHOWN = 10


Operators = list[tuple[str, float, int]]
"""Name, seconds of its own, calls; most seconds first."""


@dataclass
class Watched:
    """What is noted of an iteration from outside."""

    dtype: torch.dtype
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the methods that are timed, summed over calls."""
    batches: list[TokenBatch] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    aside_seconds: float = 0.0
    """Taken by measuring the floors, in the midst of the iteration."""
    aside_processor_seconds: float = 0.0
    profiles: dict[str, tuple[float, Operators]] | None = None
    """Of an iteration that is to be profiled: seconds and operators of its parts."""

    def forget(self) -> None:
        """Start a new iteration."""
        self.seconds, self.batches, self.floors = {}, [], {}
        self.aside_seconds = self.aside_processor_seconds = 0.0

    def time(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, its seconds noted under a name."""

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return timed

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is no part of the iteration."""
        began, processor_began = time.perf_counter(), time.process_time()
        yield
        self.aside_seconds += time.perf_counter() - began
        self.aside_processor_seconds += time.process_time() - processor_began

    @contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """Note operators where an iteration is to be profiled."""
        if self.profiles is None or name in self.profiles:
            yield
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            began = time.monotonic()  # the profiler's seconds are the wall clock's, too
            yield
            seconds = time.monotonic() - began
        operators = [
            (item.key, item.self_cpu_time_total / 1e6, item.count) for item in profiler.key_averages()
        ]
        self.profiles[name] = seconds, sorted(operators, key=itemgetter(1), reverse=True)


class WatchedEngine(VllmEngine):
    """The engine of the job, which measures the floors right before it samples, with the weights that it has then."""

    watched: Watched

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """As vLLM's."""
        chosen = list(requests)
        with self.watched.aside():
            self._measure_floors(chosen, sampling)
        tokens = 0
        with self.watched.profile("rollout"):
            for completion in super().generate(chosen, sampling):
                tokens += len(completion.token_ids)
                yield completion
        bare = self.watched.floors["tokens"]
        assert tokens == bare, f"the samples differ: {tokens:,} tokens, bare vLLM drew {bare:,.0f}"

    def _measure_floors(self, requests: list[SampleRequest], sampling: SamplingParams) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds, tokens = self._bare(requests, sampling, seeded=True)
        unseeded_seconds, unseeded_tokens = self._bare(requests, sampling, seeded=False)
        self.watched.floors = {
            "tokens": tokens,
            "bare": seconds,
            "bare, unseeded": unseeded_seconds * tokens / unseeded_tokens,
            "operations a second": matrix_rate(self.watched.dtype, device),
            "bytes a second": copy_rate(device),
        }

    def _bare(
        self, requests: list[SampleRequest], sampling: SamplingParams, *, seeded: bool
    ) -> tuple[float, int]:
        """Seconds and tokens of `LLM.generate`, which gives text as ours does."""
        import vllm

        llm: Any = self.llm
        chosen = [
            vllm.SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_completion_tokens,
                stop_token_ids=list(self._eos_token_ids),
                seed=request.seed if seeded else None,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        llm.reset_prefix_cache()
        gc.collect()
        began = time.perf_counter()
        outputs = llm.generate(prompts, chosen, use_tqdm=False)
        seconds = time.perf_counter() - began
        llm.reset_prefix_cache()
        return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of one iteration: the seconds that it took, and the least that it could have."""

    seconds: float
    floor: float | None = None


Table = dict[str, Phase]
"""The phases of one iteration by name."""


def save_larger_model(folder: Path) -> None:
    """A random Qwen2 of 55 million parameters. A hundred tokens end a completion, wherever they come."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(1000, 999 + EOS_TOKENS)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def larger_run(root: Path, changes: Sequence[str]) -> Config:
    """Model and stage 1 of the larger workload, in a folder of its own."""
    os.environ["ASTAR_PO_ARTIFACTS"] = str(root)
    overrides = [*(f"{key}={value}" for key, value in LARGER.items()), *changes]
    config = load_config(DEMO, overrides, "larger")
    save_larger_model(run_paths("larger").base_model)
    options = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, str(REPOSITORY / "cli.py"), "vstar", "--config", str(DEMO), "--run", "larger"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return config


def measure(config: Config, iterations: int) -> None:
    """Print the table of one workload."""
    assert config.train.staleness == 0, "phases that overlap cannot be told apart"
    ranks = join_ranks(config.seed)
    inputs = prepare(config, run_paths(config.run).vstar)
    shape = read_shape(inputs.folder)
    watched = Watched(getattr(torch, config.model.dtype))
    WatchedEngine.watched = watched
    tables: list[Table] = []
    busy: list[float] = []
    rates: list[float] = []
    with GraderPool(config.grader) as pool:
        engine = partial(WatchedEngine, config, inputs.folder, inputs.renderer, beside_trainer=True)
        sampler = Sampler(engine, pool, config.sampling, ranks)
        trainer = Trainer(config, inputs, sampler, ranks)
        watch(trainer, pool, watched)
        for number in range(1, WARM_UP + iterations + 1):
            watched.forget()
            began = time.process_time()
            metrics, _ = trainer.iteration(number)
            processor_seconds = time.process_time() - began - watched.aside_processor_seconds
            if number > WARM_UP:
                tables.append(phases(metrics, watched, shape, config))
                busy.append(processor_seconds / tables[-1]["iteration"].seconds)
                rates.append(watched.floors["operations a second"])
        print(as_markdown(tables, title(config, shape, metrics, rates)))
        print(
            f"\n{statistics.median(busy):.2f} of {torch.get_num_threads()} threads were busy on average (processor "
            "seconds of the process over wall seconds).\n"
        )
        print(sizes(tables, watched, shape))
        watched.profiles = {}
        trainer.iteration(WARM_UP + iterations + 1)
        for name, (seconds, operators) in watched.profiles.items():
            print(profile_as_markdown(name, seconds, operators))
        sampler.close()


def watch(trainer: Any, pool: Any, watched: Watched) -> None:
    """Time what the trainer's own figures do not tell apart, and keep the micro-batches."""
    step, cut = trainer.optimizer_step, trainer.token_batches

    def optimizer_step(*arguments: Any) -> Any:
        with watched.profile("optimizer step"):
            return step(*arguments)

    def token_batches(*arguments: Any) -> list[TokenBatch]:
        batches: list[TokenBatch] = cut(*arguments)
        watched.batches += batches
        return batches

    pool.drain = watched.time("grading", pool.drain)
    trainer.policy.step = watched.time("step", trainer.policy.step)
    trainer.optimizer_step = optimizer_step
    trainer.token_batches = token_batches


def phases(metrics: Metrics, watched: Watched, shape: Shape, config: Config) -> Table:
    """The table of one iteration."""
    lengths = [length for batch in watched.batches for length in real_lengths(batch)]
    forward = forward_flops(shape, [total for total, _ in lengths], [sampled for _, sampled in lengths])
    rate, speed = watched.floors["operations a second"], watched.floors["bytes a second"]
    steps = config.train.batch_size // config.train.mini_batch_size
    grading, step = watched.seconds["grading"], watched.seconds["step"]
    table = {
        "rollout": Phase(
            seconds=metrics["time/rollout"] - watched.aside_seconds - grading, floor=watched.floors["bare"]
        ),
        "waiting for grades": Phase(seconds=grading, floor=0.0),
        "reference log-probs": Phase(seconds=metrics["time/reference"], floor=forward / rate),
        "forward and backward": Phase(
            seconds=metrics["time/update"] - step, floor=(1 + BACKWARD) * forward / rate
        ),
        "optimizer": Phase(seconds=step, floor=steps * ADAMW_BYTES * shape.parameters / speed),
        "weight sync": Phase(
            seconds=metrics["time/weight_sync"], floor=2 * watched.dtype.itemsize * shape.parameters / speed
        ),
    }
    iteration = metrics["time/iteration"] - watched.aside_seconds
    rest = iteration - sum(phase.seconds for phase in table.values())
    floors = sum(phase.floor or 0.0 for phase in table.values())
    return {
        **table,
        "the rest": Phase(seconds=rest, floor=0.0),
        "iteration": Phase(seconds=iteration, floor=floors),
        "rollout, against unseeded requests": Phase(
            seconds=table["rollout"].seconds, floor=watched.floors["bare, unseeded"]
        ),
    }


def real_lengths(batch: TokenBatch) -> list[tuple[int, int]]:
    """The tokens of each sequence without padding, and how many of them were sampled."""
    ends = [int(row.nonzero().max()) + 1 for row in batch.is_completion_BT]
    return list(zip(ends, batch.is_completion_BT.sum(1).tolist(), strict=True))


def title(config: Config, shape: Shape, metrics: Metrics, rates: Sequence[float]) -> str:
    """The workload in words."""
    return (
        f"{config.run}: {shape.parameters:,} parameters, {shape.layers} layers of width {shape.hidden}, vocabulary "
        f"{shape.vocabulary:,}, {config.model.dtype}; {config.train.batch_size} completions of "
        f"{metrics['completion/tokens_mean']:.0f} tokens, {config.train.batch_size // config.train.mini_batch_size} "
        f"optimizer steps, {torch.get_num_threads()} threads; one large matrix product: "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s"
    )


def as_markdown(tables: Sequence[Table], caption: str) -> str:
    """Medians over the iterations; shares and ratios are medians of each iteration's own."""
    lines = [
        f"{caption}; medians of {len(tables)} iterations",
        "",
        "| phase | s | share | floor, s | over the floor |",
        "|---|---|---|---|---|",
    ]
    for name in tables[0]:
        own = [table[name] for table in tables]
        share = statistics.median(table[name].seconds / table["iteration"].seconds for table in tables)
        floors = [phase.floor for phase in own if phase.floor]
        ratios = [phase.seconds / phase.floor for phase in own if phase.floor]
        floor = f"{statistics.median(floors):.3f} | {statistics.median(ratios):.2f}" if floors else "0 | "
        seconds = statistics.median(phase.seconds for phase in own)
        lines.append(f"| {name} | {seconds:.3f} | {share:.1%} | {floor} |")
    return "\n".join(lines)


def sizes(tables: Sequence[Table], watched: Watched, shape: Shape) -> str:
    """How much of the gap are padding and the sizes of the matrices: the last iteration's micro-batches."""
    real = sum(total for batch in watched.batches for total, _ in real_lengths(batch))
    padded = sum(batch.input_ids_BT.numel() for batch in watched.batches)
    predicted = sum(int(batch.is_completion_BT.sum()) for batch in watched.batches)
    count = len(watched.batches)
    forward, backward = products_seconds(shape, padded // count, predicted // count, watched.dtype)
    reference, update = tables[-1]["reference log-probs"], tables[-1]["forward and backward"]
    assert reference.floor is not None
    assert update.floor is not None
    return (
        f"Padding: {padded:,} tokens in {count} micro-batches, {padded / real - 1:.1%} more than the {real:,} real "
        "ones. Matrix products at their own sizes, padding included, attention left out, alone: "
        f"{count * forward:.3f} s for the reference ({count * forward / reference.floor:.2f} × floor; measured "
        f"{reference.seconds:.3f}), {count * (forward + backward):.3f} s for forward and backward "
        f"({count * (forward + backward) / update.floor:.2f} × floor; measured {update.seconds:.3f}).\n"
    )


def profile_as_markdown(name: str, seconds: float, operators: Operators) -> str:
    """The operators that take most, and what is left for Python and the frameworks."""
    inside = sum(own for _, own, _ in operators)
    lines = [
        f"{name}, profiled, which slows it down: {seconds:.3f} s, of which {1 - inside / seconds:.0%} outside of "
        "torch's operators",
        "",
        "| operator | s | share | calls |",
        "|---|---|---|---|",
        *(
            f"| {operator} | {own:.3f} | {own / seconds:.1%} | {calls:,} |"
            for operator, own, calls in operators[:OPERATORS_SHOWN]
        ),
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--run", default="demo", help="the demo's artifacts, which are only read")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread and its processor's seconds, for a busy machine",
    )
    parser.add_argument("--measure", choices=WORKLOADS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not chosen.measure:
        threads = {"OMP_NUM_THREADS": "1"} if chosen.processor_time else {}
        for workload in chosen.workload or WORKLOADS:
            command = [sys.executable, "-m", "benchmarks.phases", *arguments, "--measure", workload]
            subprocess.run(command, check=True, env={**os.environ, **threads})
        return 0
    if chosen.processor_time:
        vars(time)["perf_counter"] = time.process_time  # stage 2's own figures are taken by it, too
    with tempfile.TemporaryDirectory() as root:
        if chosen.measure == "demo":
            config = load_config(DEMO, chosen.set, chosen.run)
        else:
            config = larger_run(Path(root), chosen.set)
        measure(config, chosen.iterations)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
