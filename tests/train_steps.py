"""A few optimizer steps, on one rank of a job: what tests/training_jobs.py runs for tests/test_ranks.py.

The order holds a `config`, `cases` (name to changes of it) and the `output` to write to. Completions are scripted:
drawn from their seeds, not from a model, so that every process count trains on the very same ones.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.formula import WatchedUpdate
from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.grading import GraderPool
from common.rollout import Completion, SampleRequest
from stage2_train import learner, logprobs
from stage2_train.config import Config
from stage2_train.data import TrainingData, prepare
from stage2_train.ranks import Ranks, join_ranks
from stage2_train.sources.pipeline import RolloutPipeline, drawing
from stage2_train.sources.sampler import Sampler
from stage2_train.train import Trainer, held_out_draw

IN_CHUNKS = "ZeRO-3, logits in chunks"
FIGURES = ("loss/regression", "kl/sequence", "reward/mean", "train/gradient_norm", "policy/entropy")
JUNK_TOKENS = (0, 2, 9, 50)


class ScriptedEngine:
    """Answers each request as its seed says; keeps the last weights.

    The answer is one of `#### 1` to `#### 4`, after no junk or up to 50 tokens of it, or the end token alone.
    """

    def __init__(self, renderer: PromptRenderer) -> None:
        self._renderer = renderer
        self.weights: dict[str, torch.Tensor] = {}

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for request in requests:
            rng = random.Random(request.seed)
            junk = "".join(rng.choices([" apples", " Tom", " 7", " more"], k=rng.choice(JUNK_TOKENS)))
            text = "" if rng.random() < 0.2 else f"{junk} #### {rng.randint(1, 4)}"
            body = self._renderer.tokenizer.encode(text)
            token_ids = (*body[: sampling.max_completion_tokens - 1], self._renderer.eos_token_ids[0])
            yield Completion(
                key=request.key, token_ids=token_ids, text=self._renderer.decode(token_ids), truncated=False
            )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in named_tensors}

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def train(config: Config, data: TrainingData, ranks: Ranks, pool: GraderPool) -> dict[str, Any]:
    """The figures of each iteration, what this rank did in each optimizer step, and the weights after the last."""
    engine = ScriptedEngine(data.renderer)
    sampler = Sampler(lambda: engine, pool, config.sampling, ranks)
    trainer = Trainer(config, data, drawing(config, data, sampler, ranks), ranks)
    last = data.iterations(config)
    watched = WatchedUpdate(trainer)
    before = held_out_accuracy(trainer, 0)
    turns = [trainer.iteration(number, last) for number in range(1, last + 1)]
    held_out_accuracy(trainer, last)  # gives the engine the last weights
    figures = {name: [turn.metrics[name] for turn in turns] for name in FIGURES}
    steps_per_turn = len(watched.steps) // last
    return {
        "before": before,
        "figures": figures,
        "steps": [
            step.of(trainer, turns[number // steps_per_turn].rollouts)
            for number, step in enumerate(watched.steps)
        ],
        "weights": engine.weights,
    }


def held_out_accuracy(trainer: Trainer[RolloutPipeline], number: int) -> float:
    draw = held_out_draw(trainer.data.held_out, trainer.config, trainer.ranks)
    rollouts = trainer.source.now(draw, number)
    solved = trainer.ranks.gather([rollout.is_solved for rollout in rollouts])
    return sum(solved) / len(solved)


def changed(config: Config, change: dict[str, dict[str, Any]]) -> Config:
    """The config with other values in some of its sections."""
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in change.items()}
    return config.model_copy(update=sections)


@contextmanager
def as_with_a_large_vocabulary() -> Iterator[None]:
    """Several chunks of logits a slice, not as many on each rank; under ZeRO-3 no parameter is kept whole."""
    size, configure = logprobs.LOGITS_PER_CHUNK, learner._deepspeed_config

    def partition_everything(config: Config) -> dict[str, Any]:
        document: dict[str, Any] = configure(config)
        document["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return document

    logprobs.LOGITS_PER_CHUNK, learner._deepspeed_config = 3000, partition_everything
    try:
        yield
    finally:
        logprobs.LOGITS_PER_CHUNK, learner._deepspeed_config = size, configure


def main(order: dict[str, Any]) -> None:
    config = Config.model_validate(order["config"])
    ranks = join_ranks(seed=0)
    data = prepare(config, Path(order["vstar"]))
    found = {}
    with GraderPool(config.grader) as pool:
        for name, change in order["cases"].items():
            with as_with_a_large_vocabulary() if name == IN_CHUNKS else nullcontext():
                found[name] = train(changed(config, change), data, ranks, pool)
    torch.save(found, f"{order['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
