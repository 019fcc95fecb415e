"""Iterations of each objective, on one rank of a job: tests/training_jobs.py runs it for tests/test_objective_runs.py.

The order holds a `config`, `cases` (name to changes of it) and the `output` to write to. Completions are scripted, as
in tests/train_steps.py, so that every process count trains on the very same ones.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.formula import WatchedUpdate
from common.errors import UserError
from common.grading import GraderPool
from stage2_train.config import Config
from stage2_train.data import TrainingData, prepare
from stage2_train.logprobs import LogprobModel
from stage2_train.ranks import Ranks, join_ranks
from stage2_train.scorers import SeparateModel
from stage2_train.sources.offline import OfflineSource
from stage2_train.sources.pipeline import drawing
from stage2_train.sources.sampler import Sampler
from stage2_train.train import Trainer
from tests.train_steps import ScriptedEngine

ITERATIONS = 3
RESUMED_AFTER = 2
RESUMED_BY_RANKS = ("astar_po", "ppo", "spo", "direct_advantage")
"""Objectives that several ranks resume too: the first, and those whose runs remember something of their own."""
Weights = dict[str, torch.Tensor]


def is_resumed(processes: int, objective: str) -> bool:
    """Whether a case ends with its last iteration once more, from a checkpoint."""
    return processes == 1 or objective in RESUMED_BY_RANKS


@dataclass
class Counts:
    """The cost of one iteration."""

    trained: int = 0
    """Sequences in forward passes with gradients, of the policy."""
    scored: int = 0
    """Sequences in forward passes without, of any language model."""
    critic_trained: int = 0
    critic_scored: int = 0
    drawn: int = 0
    models: list[str] = field(default_factory=list)
    """The models in memory: a policy, a reference, a critic."""
    optimizers: int = 0


def counting(trainer: Trainer[Any], engine: ScriptedEngine) -> Counts:
    """Counts from now on what goes through the trainer's networks."""
    counts = Counts()

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        kind = "" if isinstance(module, LogprobModel) else "critic_"
        name = f"{kind}{'trained' if torch.is_grad_enabled() else 'scored'}"
        setattr(counts, name, getattr(counts, name) + len(inputs[0]))

    for name, learner in trainer.parts.learners.items():
        learner.module.register_forward_hook(count)
        counts.models.append({"state": "policy"}.get(name, name))
        counts.optimizers += 1
    for scorer in trainer.parts.scorers.values():
        if isinstance(scorer, SeparateModel):
            scorer._module.register_forward_hook(count)
            counts.models.append("reference")
    generate = engine.generate

    def counted(requests: Any, sampling: Any) -> Any:
        requests = list(requests)
        counts.drawn += len(requests)
        return generate(requests, sampling)

    engine.generate = counted  # type: ignore[method-assign]
    return counts


class Run:
    """A trainer with its scripted engine."""

    def __init__(self, config: Config, data: TrainingData, ranks: Ranks, pool: GraderPool) -> None:
        self.engine = ScriptedEngine(data.renderer)
        sampler = Sampler(lambda: self.engine, pool, config.sampling, ranks)
        build_source: Any = drawing(config, data, sampler, ranks)
        if data.units is not None:
            source = OfflineSource(config, data.units, ranks)
            build_source = lambda weights: source  # noqa: E731
        self.trainer: Trainer[Any] = Trainer(config, data, build_source, ranks)
        self.metrics: list[dict[str, float]] = []

    def iterations(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            turn = self.trainer.iteration(number, ITERATIONS)
            self.metrics.append(turn.metrics)

    def weights(self) -> Weights:
        found = {name: weight.clone() for name, weight in self.trainer.parts.policy.named_weights()}
        for name, learner in self.trainer.parts.learners.items():
            if name != "state":
                for part, parameter in learner.module.named_parameters():
                    if parameter.requires_grad:
                        with learner.gathered([parameter]):
                            found[f"{name}.{part}"] = parameter.detach().clone()
        return found


def run(config: Config, data: TrainingData, ranks: Ranks, pool: GraderPool, folder: Path) -> dict[str, Any]:
    """Three iterations straight on, and in some cases the last of them again from a checkpoint of the second."""
    whole = Run(config, data, ranks, pool)
    start = whole.weights()
    watched = WatchedUpdate(whole.trainer)
    counts = counting(whole.trainer, whole.engine)
    whole.iterations(1, RESUMED_AFTER)
    whole.trainer.save(folder, RESUMED_AFTER, None)
    whole.iterations(RESUMED_AFTER + 1, ITERATIONS)
    whole.trainer.source.close()
    resumed: dict[str, Any] = {}
    if is_resumed(ranks.world_size, config.train.objective.name):
        again = Run(config, data, ranks, pool)
        assert again.trainer.resume(folder / f"iteration-{RESUMED_AFTER:06d}") == RESUMED_AFTER
        again.iterations(RESUMED_AFTER + 1, ITERATIONS)
        again.trainer.source.close()
        resumed = {"resumed": again.weights(), "resumed metrics": again.metrics}
    return {
        **resumed,
        "start": start,
        "weights": whole.weights(),
        "metrics": whole.metrics,
        "slices": [len(step.step.slices) for step in watched.steps],
        "counts": asdict(counts),
    }


def once_a_node(ranks: Ranks) -> dict[str, Any]:
    """What this rank gets of work that one rank does, whether it did it, and the error of work that fails."""
    did: list[int] = []

    def work() -> str:
        did.append(ranks.rank)
        return f"of rank {ranks.rank}"

    def fail() -> str:
        raise UserError(f"no model on rank {ranks.rank}")

    error = ""
    result = ranks.once_a_node(work)
    try:
        ranks.once_a_node(fail)
    except UserError as failed:
        error = str(failed)
    return {"result": result, "did": did, "error": error}


def main(order: dict[str, Any]) -> None:
    ranks = join_ranks(seed=0)
    found: dict[str, Any] = {"once a node": once_a_node(ranks)}
    with GraderPool(Config.model_validate(order["config"]).grader) as pool:
        for number, (name, change) in enumerate(order["cases"].items()):
            train = {**order["config"]["train"], **change}
            config = Config.model_validate({**order["config"], "train": train})
            file = Path(order["vstar"])
            if config.train.reads_advantages:
                file = file.with_name("advantages.parquet")
            data = prepare(config, file)
            found[name] = run(config, data, ranks, pool, Path(f"{order['output']}-{number}"))
    torch.save(found, f"{order['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
