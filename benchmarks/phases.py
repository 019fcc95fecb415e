"""The time that each phase of an iteration takes, compared with the least that it could take on this machine.

    make base-model vstar && .venv/bin/python -m benchmarks.phases

Two workloads, each in a process of its own: "demo", the demo's model and V̂*, and "larger", a random Qwen2 whose
completions end at random, after some 180 tokens. Iterations are stage 2's own (`Trainer.iteration`). In each of them,
right before it samples, its floors are measured, and the time for this is left out: the same requests by `LLM.generate`
on the same weights, which on a CPU must give the same number of tokens; one large matrix product in the same dtype on
as many threads; and a copy in memory.

Prints medians over the iterations, with paired ratios; then the share of padding and of the products' sizes in the gap.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import bare_vllm
from benchmarks.compiled import compiled_layers
from benchmarks.flops import (
    ADAMW_BYTES,
    BACKWARD,
    copy_rate,
    forward_flops,
    matrix_rate,
    products_seconds,
    settled,
)
from benchmarks.processes import alone, assignments
from benchmarks.tables import markdown
from benchmarks.training import DEMO, made_up_data, save_random_model, training
from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.engines.vllm_engine import VllmEngine
from common.errors import UserError
from common.rollout import Completion, Rollout, SampleRequest
from common.runs import run_paths
from stage2_train.batch import Batch, TokenBatch
from stage2_train.config import Config, load_config
from stage2_train.data import TrainingData, prepare
from stage2_train.memory import Shape, read_shape
from stage2_train.objectives.protocol import Loss
from stage2_train.train import Trainer
from stage2_train.update import Trained, Update
from stage2_train.watchers import Turn

WORKLOADS = ("demo", "larger")
LARGER = {
    "sampling.max_completion_tokens": 256,
    "train.batch_size": 16,
    "train.mini_batch_size": 8,
    "train.tokens_per_micro_batch": 4096,
    "train.learning_rate": 1e-6,
}
LARGER_MODEL = {
    "model_type": "qwen2",
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LARGER_PROMPT = 40
ENDS = range(1000, 1099)
"""Number of end tokens among 32,000 equally likely tokens: completions end after 320 on average, cut off at 256."""
WARM_UP = 2
"""Iterations that are not counted: the first has AdamW's moments to allocate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """The speed of this machine at the time of an iteration."""

    rollout_seconds: float
    unseeded_seconds: float
    """Seconds for as many tokens without a seed per request."""
    operations_a_second: float
    bytes_a_second: float


class ProbedEngine:
    """vLLM, timed; it measures the floors right before it samples, with the weights that it has then."""

    def __init__(self, engine: VllmEngine, renderer: PromptRenderer, dtype: torch.dtype) -> None:
        self._engine = engine
        self._renderer = renderer
        self._dtype = dtype
        self.floors: list[Floors] = []
        self.seconds = 0.0
        """The last rollout's, until its last completion."""
        self.aside_seconds = self.aside_processor_seconds = 0.0
        """Taken by measuring the last floors."""

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Like VllmEngine.generate."""
        chosen = list(requests)
        began, processor_began = time.perf_counter(), time.process_time()
        bare_tokens = self._measure_floors(chosen, sampling)
        ready = time.perf_counter()
        self.aside_seconds = ready - began
        self.aside_processor_seconds = time.process_time() - processor_began
        tokens = 0
        for completion in self._engine.generate(chosen, sampling):
            tokens += len(completion.token_ids)
            yield completion
        self.seconds = time.perf_counter() - ready
        # On a GPU rounding depends on what else is in the batch.
        assert torch.cuda.is_available() or tokens == bare_tokens, (
            f"the samples differ: {tokens:,} tokens, bare vLLM drew {bare_tokens:,}"
        )

    def _measure_floors(self, requests: list[SampleRequest], sampling: SamplingParams) -> int:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        common = (self._engine, self._renderer, sampling, requests)
        seconds, tokens = bare_vllm.generate(*common, seeded=True)
        unseeded_seconds, unseeded_tokens = bare_vllm.generate(*common, seeded=False)
        self.floors.append(
            Floors(
                rollout_seconds=seconds,
                unseeded_seconds=unseeded_seconds * tokens / unseeded_tokens,
                operations_a_second=matrix_rate(self._dtype, device),
                bytes_a_second=copy_rate(device),
            )
        )
        bare_vllm.fresh(self._engine)
        return tokens

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Like VllmEngine.load_weights."""
        self._engine.load_weights(named_tensors)

    def sleep(self) -> None:
        """Like VllmEngine.sleep."""
        self._engine.sleep()

    def close(self) -> None:
        """Like VllmEngine.close."""
        self._engine.close()


class TimedSteps:
    """A network under training whose optimizer steps are timed."""

    def __init__(self, part: Trained) -> None:
        self._part = part
        self.learner: Any = SimpleNamespace(backward=part.learner.backward, step=self._step)
        self.seconds = 0.0

    def loss(self, tokens: TokenBatch, batch: Batch) -> Loss:
        """Like Trained.loss."""
        return self._part.loss(tokens, batch)

    def nothing(self, tokens: TokenBatch) -> Tensor:
        """Like Trained.nothing."""
        return self._part.nothing(tokens)

    def _step(self) -> float:
        began = settled()
        norm = self._part.learner.step()
        self.seconds += settled() - began
        return norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of one iteration: the seconds that it took, and the least that it could take."""

    seconds: float
    floor: float = 0.0


Phases = dict[str, Phase]
"""The phases of one iteration, by name."""


def measure(workload: str, run: str, overrides: Sequence[str], iterations: int, compiled: bool) -> str:
    """The tables of one workload."""
    with tempfile.TemporaryDirectory() as folder, compiled_layers() if compiled else nullcontext():
        if workload == "larger":
            config = load_config(DEMO, [*assignments({"model.path": folder, **LARGER}), *overrides])
            save_random_model(Path(folder), LARGER_MODEL, ends=ENDS)
            data = made_up_data(Path(folder), config, [LARGER_PROMPT] * config.train.batch_size)
        else:
            config = load_config(DEMO, overrides, run)
            data = prepare(config, run_paths(config.run).vstar)
        return measure_iterations(workload, config, data, iterations)


def measure_iterations(workload: str, config: Config, data: TrainingData, iterations: int) -> str:
    """The tables of some iterations."""
    if config.train.staleness:
        raise UserError("train.staleness: phases that overlap cannot be told apart; leave it at 0")
    shape, dtype = read_shape(data.folder), getattr(torch, config.model.dtype)
    probes: list[ProbedEngine] = []

    def build() -> ProbedEngine:
        engine = VllmEngine(config, data.folder, data.renderer, beside_trainer=True)
        probes.append(ProbedEngine(engine, data.renderer, dtype))
        return probes[-1]

    with training(config, data, build) as trainer:
        (engine,) = probes
        steps = {name: TimedSteps(part) for name, part in trainer.parts.update.parts.items()}
        trainer.parts = replace(trainer.parts, update=Update(steps, trainer.ranks))
        tables, busy = [], []
        for number in range(1, WARM_UP + iterations + 1):
            began, stepped = time.process_time(), sum(part.seconds for part in steps.values())
            turn = trainer.iteration(number, WARM_UP + iterations)
            processor_seconds = time.process_time() - began - engine.aside_processor_seconds
            stepped = sum(part.seconds for part in steps.values()) - stepped
            tables.append(phases(turn, engine, stepped, shape, config))
            busy.append(processor_seconds / tables[-1]["iteration"].seconds)
        tables = tables[WARM_UP:]
        rate = statistics.median(floors.operations_a_second for floors in engine.floors)
        return "\n".join(
            [
                f"{workload}: {shape.parameters:,} parameters, {shape.layers} layers of width {shape.hidden}, "
                f"vocabulary {shape.vocabulary:,}, {config.model.dtype}; {len(turn.rollouts)} completions of "
                f"{turn.metrics['completion/tokens_mean']:.0f} tokens, {config.train.steps_per_iteration} optimizer "
                f"steps, {torch.get_num_threads()} threads; one large matrix product: {rate / 1e9:.0f} GFLOP/s; "
                f"medians of {iterations} iterations\n",
                phase_table(tables),
                f"\n{statistics.median(busy[WARM_UP:]):.2f} of {torch.get_num_threads()} threads were busy on average "
                "(processor seconds of the process over wall seconds).\n",
                sizes(trainer, turn, tables[-1], shape, dtype),
            ]
        )


def phases(turn: Turn, engine: ProbedEngine, stepped: float, shape: Shape, config: Config) -> Phases:
    """The phases of one iteration."""
    metrics, floors = turn.metrics, engine.floors[-1]
    forward = forward_flops(shape, *lengths_of(turn.rollouts)) / floors.operations_a_second
    moved = shape.parameters / floors.bytes_a_second
    size = getattr(torch, config.model.dtype).itemsize
    found = {
        "rollout": Phase(seconds=engine.seconds, floor=floors.rollout_seconds),
        "waiting for grades": Phase(seconds=metrics["time/rollout"] - engine.aside_seconds - engine.seconds),
        "reference log-probs": Phase(seconds=metrics["time/reference"], floor=forward),
        "forward and backward": Phase(
            seconds=metrics["time/update"] - stepped, floor=(1 + BACKWARD) * forward
        ),
        "optimizer": Phase(seconds=stepped, floor=config.train.steps_per_iteration * ADAMW_BYTES * moved),
        "weight sync": Phase(seconds=metrics["time/weight_sync"], floor=2 * size * moved),
    }
    whole = metrics["time/iteration"] - engine.aside_seconds
    rest = whole - sum(phase.seconds for phase in found.values())
    return {
        **found,
        "the rest": Phase(seconds=rest),
        "iteration": Phase(seconds=whole, floor=sum(phase.floor for phase in found.values())),
        "rollout, against unseeded requests": Phase(seconds=engine.seconds, floor=floors.unseeded_seconds),
    }


def lengths_of(rollouts: Sequence[Rollout]) -> tuple[list[int], list[int]]:
    """The tokens of each sequence, and how many of them were sampled."""
    sampled = [len(rollout.completion.token_ids) for rollout in rollouts]
    return [
        len(rollout.prompt.token_ids) + many for rollout, many in zip(rollouts, sampled, strict=True)
    ], sampled


def phase_table(tables: Sequence[Phases]) -> str:
    """Medians over the iterations; shares and ratios are medians of each iteration's own."""
    rows = []
    for name, first in tables[0].items():
        own = [table[name] for table in tables]
        share = statistics.median(table[name].seconds / table["iteration"].seconds for table in tables)
        ratio = f"{statistics.median(p.seconds / p.floor for p in own):.2f}" if first.floor else ""
        seconds, floor = (statistics.median(getattr(p, field) for p in own) for field in ("seconds", "floor"))
        rows.append([name, f"{seconds:.3f}", f"{share:.1%}", f"{floor:.3f}", ratio])
    return markdown(["phase", "s", "share", "floor, s", "over the floor"], rows)


def sizes(trainer: Trainer[Any], turn: Turn, table: Phases, shape: Shape, dtype: torch.dtype) -> str:
    """The part of the gap due to padding and the sizes of the matrices, in the last iteration's micro-batches."""
    steps = trainer.parts.collate([[rollout] for rollout in turn.rollouts], trainer.places).steps
    batches = [tokens for step in steps for tokens in step.slices]
    lengths, sampled = lengths_of(turn.rollouts)
    count, padded = len(batches), sum(batch.input_ids_BT.numel() for batch in batches)
    forward, backward = products_seconds(shape, padded // count, sum(sampled) // count, dtype)
    products = {
        "reference log-probs": count * forward,
        "forward and backward": count * (forward + backward),
    }
    return (
        f"Padding: {padded:,} tokens in {count} micro-batches, {padded / sum(lengths) - 1:.1%} more than the "
        f"{sum(lengths):,} real ones. Matrix products at their own sizes, padding included, attention left out, alone: "
        + "; ".join(
            f"{name} {seconds:.3f} s ({seconds / table[name].floor:.2f} × floor; measured {table[name].seconds:.3f})"
            for name, seconds in products.items()
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--run", default="demo", help="the demo's artifacts, which are only read")
    parser.add_argument("--compiled", action="store_true", help="with each layer compiled by torch")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args()
    for workload in chosen.workload or WORKLOADS:
        print(
            alone(measure, workload, chosen.run, chosen.set, chosen.iterations, chosen.compiled), flush=True
        )


if __name__ == "__main__":
    main()
