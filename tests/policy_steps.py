"""Optimizer steps that go wrong, on one rank of a job: what tests/training_jobs.py runs for tests/test_safeguards.py.

The order holds a `config`, `cases` (name to changes of it) and the `output` to write to.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.grading import Grade, GraderPool, Outcome
from common.rollout import Rollout
from stage2_train.config import Config
from stage2_train.data import TrainingData, prepare
from stage2_train.learner import MAX_SKIPPED_STEPS
from stage2_train.policy import Policy
from stage2_train.ranks import Ranks, join_ranks
from stage2_train.records import Records
from stage2_train.sources.pipeline import drawing
from stage2_train.sources.sampler import Draw, Sampler
from stage2_train.train import Trainer
from tests.train_steps import ScriptedEngine, changed

GOOD, BAD = 1.0, float("nan")
Weights = dict[str, torch.Tensor]


def weights_of(policy: Policy) -> Weights:
    return {name: weight.clone() for name, weight in policy.named_weights()}


def steps(config: Config, data: TrainingData, ranks: Ranks, scales: list[float]) -> dict[str, Any]:
    """Steps whose loss is multiplied by these, on the last rank alone."""
    policy = Policy(data.folder, config, ranks)
    learner = policy.learner
    norms: list[float] = []
    rates: list[float] = []
    error = None
    for number, scale in enumerate(scales):
        tokens = torch.arange(1, 13).reshape(2, 6) + ranks.rank
        logprobs_K, _ = learner(tokens, tokens > 3)
        learner.backward(logprobs_K.sum() * (scale if ranks.rank == ranks.world_size - 1 else 1.0), last=True)
        try:
            norms.append(learner.step())
        except UserError as stop:
            error = (number, str(stop))
            break
        rates.append(learner.learning_rate)
    return {"weights": weights_of(policy), "norms": norms, "rates": rates, "error": error}


def regressed(
    config: Config, data: TrainingData, ranks: Ranks, pool: GraderPool, *, leave_out: bool
) -> Weights:
    """Weights after two steps; places 1, 3, 5 and 7, all of a second rank's, could not be judged, or are not there."""
    engine = ScriptedEngine(data.renderer)
    sampler = Sampler(lambda: engine, pool, config.sampling, ranks)
    config = changed(config, {"train": {"batch_size": 8}})
    trainer = Trainer(config, data, drawing(config, data, sampler, ranks), ranks)
    for number in (1, 2):
        draw = Draw(
            prompts=[data.prompts[place] for place in trainer.places], places=trainer.places, seed=number
        )
        groups = sampler.attempt(draw)
        assert groups is not None
        drawn = [
            (place, unjudged(rollout) if place % 2 else rollout)
            for place, (rollout,) in zip(trainer.places, groups, strict=True)
            if not (leave_out and place % 2)
        ]
        places, rollouts = [place for place, _ in drawn], [rollout for _, rollout in drawn]
        collated = trainer.parts.collate([[rollout] for rollout in rollouts], places)
        records = Records(rollouts, collated.rows)
        batch = trainer.objective.credit(trainer.score(collated, {}))
        for step in collated.steps:
            trainer.parts.update(step, batch, records)
        assert [record.trained for record in records.all] == [place % 2 == 0 for place in places]
    return weights_of(trainer.parts.policy)


def unjudged(rollout: Rollout) -> Rollout:
    return replace(rollout, grade=Grade(outcome=Outcome.VERIFIER_CRASH, reward=0.0))


def main(order: dict[str, Any]) -> None:
    config = Config.model_validate(order["config"])
    ranks = join_ranks(seed=0)
    data = prepare(config, Path(order["vstar"]))
    found: dict[str, Any] = {}
    for name, change in order["cases"].items():
        case = changed(config, change)
        found[name] = {
            "disturbed": steps(case, data, ranks, [GOOD, BAD, BAD, GOOD, GOOD]),
            "undisturbed": steps(case, data, ranks, [GOOD, GOOD, GOOD]),
        }
    found["hopeless"] = steps(config, data, ranks, [GOOD] + [BAD] * (MAX_SKIPPED_STEPS + 1))
    with GraderPool(config.grader) as pool:
        for stage in (2, 3):
            case = changed(config, {"train": {"zero_stage": stage}})
            found[f"unjudged, ZeRO-{stage}"] = regressed(case, data, ranks, pool, leave_out=False)
        if ranks.world_size == 1:
            found["judged only"] = regressed(config, data, ranks, pool, leave_out=True)
    torch.save(found, f"{order['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
