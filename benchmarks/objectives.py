"""The cost of an iteration of each objective compared with A*-PO, each in a process of its own.

    make base-model vstar && .venv/bin/python -m benchmarks.objectives                    both workloads
    .venv/bin/python -m benchmarks.objectives --workload vocabulary --objective grpo      one objective beside A*-PO

"demo" is the demo with vLLM. "vocabulary" has a model of random weights with a vocabulary of 151,936, and completions
of long-tailed lengths that no engine draws, so it measures training alone. Every objective has its own defaults, such
as the size of its groups, and the same number of prompts per iteration; `--set train.objective.…` changes all of them.

Prints the median seconds of an iteration, and of its rollouts; the peak of memory, of the GPU if there is one, else of
the process with its libraries and its engine; completion tokens; completions that went through a model with a gradient
and without one; models that the trainer holds, without the engine's own, and how many of them are trained; the size of
AdamW's two moments of these; and in brackets the ratio to A*-PO.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.peers.vocabulary import MODEL, VOCABULARY, completion_lengths
from benchmarks.processes import alone, assignments
from benchmarks.tables import markdown
from benchmarks.training import (
    DEMO,
    ScriptedEngine,
    made_up_data,
    random_completion,
    save_random_model,
    training,
)
from common.engines import RolloutEngine, build_engine
from common.errors import UserError
from common.rollout import Completion, SampleRequest
from common.runs import run_paths
from stage2_train.batch import TokenBatch
from stage2_train.config import Config, load_config
from stage2_train.data import TrainingData, prepare
from stage2_train.metrics import peak_memory_bytes
from stage2_train.objectives import AStarPO, ObjectiveConfig
from stage2_train.scorers import Scorer, SeparateModel
from stage2_train.train import Trainer

WORKLOADS = ("demo", "vocabulary")
BASELINE: str = AStarPO().name
WARM_UP = 1
"""Iterations that are not counted: the first has AdamW's moments to allocate."""
MOMENTS_BYTES = 2 * 4
"""AdamW's two moments of a parameter, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The settings common to all objectives."""

    name: str
    run: str
    prompts: int
    """Prompts per iteration of the workload "vocabulary"; half of them form an optimizer step."""
    longest: int
    """Its longest completion."""
    iterations: int
    overrides: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of one objective's iteration; memory is that of the whole process."""

    seconds: float
    rollout_seconds: float
    peak_gib: float
    tokens: float
    with_gradient: float
    """Completions through a model, each time that they go through one."""
    without_gradient: float
    models: int
    trained: int
    moments_mib: float


def objectives() -> list[str]:
    """The names of all objectives; the first is the one that others are compared with."""
    union, *_ = get_args(ObjectiveConfig)
    names = [get_args(section.model_fields["name"].annotation)[0] for section in get_args(union)]
    return sorted(names, key=lambda name: (name != BASELINE, name))


def measure(workload: Workload, objective: str) -> Cost:
    """Some iterations of one objective."""
    overrides = [f"train.objective.name={objective}", *workload.overrides]
    if workload.name == "demo":
        config = load_config(DEMO, overrides, workload.run)
        data = prepare(config, run_paths(config.run).vstar)
        engine = partial(build_engine, config, data.folder, data.renderer, beside_trainer=True)
        return measure_iterations(config, data, engine, workload.iterations)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_random_model(folder, MODEL)
        lengths = [min(length, workload.longest) for length in completion_lengths(workload.prompts)]
        values = {
            "model.path": folder,
            "sampling.max_completion_tokens": workload.longest,
            "train.batch_size": workload.prompts,
            "train.mini_batch_size": max(1, workload.prompts // 2),
            "train.tokens_per_micro_batch": 4096,
        }
        config = load_config(DEMO, [*assignments(values), *overrides])
        data = made_up_data(folder, config, [64] * len(lengths))
        tokens_of = {
            tuple(prompt.token_ids): length for prompt, length in zip(data.prompts, lengths, strict=True)
        }

        def write(request: SampleRequest) -> Completion:
            return random_completion(request, tokens_of[request.prompt_token_ids], VOCABULARY)

        return measure_iterations(config, data, lambda: ScriptedEngine(write), workload.iterations)


def measure_iterations(
    config: Config, data: TrainingData, build: Callable[[], RolloutEngine], iterations: int
) -> Cost:
    """An iteration's costs: seconds are the median over some of them after the first, counts the mean over all."""
    last = WARM_UP + iterations
    with training(config, data, build) as trainer:
        learners = list(trainer.parts.learners.values())
        trained = [weight for learner in learners for weight in learner.module.parameters()]
        frozen = sum(isinstance(scorer, SeparateModel) for scorer in trainer.parts.scorers.values())
        passes = count_passes(trainer)
        turns = [trainer.iteration(number, last) for number in range(1, last + 1)]
        tokens = sum(len(rollout.completion.token_ids) for turn in turns for rollout in turn.rollouts)

        def median(name: str) -> float:
            return statistics.median(turn.metrics[name] for turn in turns[WARM_UP:])

        return Cost(
            seconds=median("time/iteration"),
            rollout_seconds=median("time/rollout"),
            peak_gib=peak_memory_bytes() / 2**30,
            tokens=tokens / last,
            with_gradient=passes.with_gradient / last,
            without_gradient=passes.without_gradient / last,
            models=len(learners) + frozen,
            trained=len(learners),
            moments_mib=MOMENTS_BYTES
            * sum(weight.numel() for weight in trained if weight.requires_grad)
            / 2**20,
        )


@dataclass(slots=True)
class Passes:
    """Completions that went through a model."""

    with_gradient: int = 0
    without_gradient: int = 0

    def note(self, completions: int) -> None:
        """Count a forward pass, by whether it keeps its activations for a backward pass."""
        if torch.is_grad_enabled():
            self.with_gradient += completions
        else:
            self.without_gradient += completions


class CountedScorer:
    """A scorer with a model of its own, whose passes are counted."""

    def __init__(self, scorer: Scorer, passes: Passes) -> None:
        self._scorer = scorer
        self._passes = passes

    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Like Scorer.score."""
        with torch.no_grad():
            self._passes.note(sum(len(tokens.rows) for tokens in batches))
        return self._scorer.score(batches)


def count_passes(trainer: Trainer[Any]) -> Passes:
    """Count a trainer's passes from now on: those of the networks under training, from any caller, and of others."""
    passes = Passes()
    for learner in trainer.parts.learners.values():
        learner.module.register_forward_pre_hook(lambda _, inputs: passes.note(len(inputs[0])))
    scorers = {
        name: CountedScorer(scorer, passes) if isinstance(scorer, SeparateModel) else scorer
        for name, scorer in trainer.parts.scorers.items()
    }
    trainer.parts = replace(trainer.parts, scorers=scorers)
    return passes


def table(costs: dict[str, Cost]) -> str:
    """One row per objective."""
    base = costs[BASELINE]
    rows = []
    for name, cost in costs.items():

        def cell(figure: str, digits: int, cost: Cost = cost) -> str:
            own, theirs = getattr(cost, figure), getattr(base, figure)
            ratio = f" ({own / theirs:.2f} ×)" if cost is not base and theirs else ""
            return f"{own:,.{digits}f}{ratio}"

        figures = [cell("seconds", 2), cell("rollout_seconds", 2), cell("peak_gib", 2), cell("tokens", 0)]
        figures += [cell("with_gradient", 0), cell("without_gradient", 0)]
        rows.append([name, *figures, f"{cost.models} ({cost.trained} trained)", cell("moments_mib", 1)])
    header = ["objective", "s per iteration", "rollouts, s", "peak, GiB", "tokens", "with gradient"]
    return markdown([*header, "without", "models", "AdamW's moments, MiB"], rows)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--objective", choices=objectives(), action="append", help="default: all")
    parser.add_argument("--iterations", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--run", default="demo", help="the demo's artifacts, which are only read")
    parser.add_argument(
        "--prompts", type=int, default=64 if on_gpu else 4, help="per iteration of vocabulary"
    )
    parser.add_argument("--longest", type=int, default=1024 if on_gpu else 256, help="of its completions")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    chosen = parser.parse_args()
    names = [name for name in objectives() if name in (BASELINE, *(chosen.objective or objectives()))]
    for workload in chosen.workload or WORKLOADS:
        common = Workload(
            name=workload,
            run=chosen.run,
            prompts=chosen.prompts,
            longest=chosen.longest,
            iterations=chosen.iterations,
            overrides=chosen.set,
        )
        costs, refused = {}, []
        for name in names:
            try:
                costs[name] = alone(measure, common, name)
            except UserError as error:
                if name == BASELINE:
                    parser.error(str(error))
                refused.append(f"\n{name} is left out: {error}")
        print(
            f"{workload}, {chosen.iterations} iterations each\n\n{table(costs)}",
            *refused,
            "",
            sep="\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
