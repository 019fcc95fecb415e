"""A few optimizer steps as a program, to be started alone or under torchrun: `python -m tests.train_steps JOB.json`.

The job file holds `cases` (name to config) and the file to write to. Completions are scripted: drawn from their
seeds, not from a model, so that every process count trains on the very same ones.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from common.config import Config, SamplingParams
from common.grading import GraderPool
from common.prompts import PromptRenderer
from common.rollout import Completion, Rollout, SampleRequest
from stage2_train import logprobs, policy
from stage2_train.batch import TokenBatch
from stage2_train.inputs import prepare
from stage2_train.metrics import Metrics
from stage2_train.policy import Ranks, join_ranks
from stage2_train.records import SequenceRecord
from stage2_train.sampler import Sampler
from stage2_train.train import Trainer

IN_CHUNKS = "ZeRO-3, logits in chunks"
FIGURES = ("loss/regression", "kl/sequence", "reward/mean", "train/gradient_norm", "policy/entropy")


class ScriptedEngine:
    """Answers each request with `#### 1` to `#### 4` after some junk, as its seed says; keeps the last weights."""

    def __init__(self, renderer: PromptRenderer) -> None:
        self._renderer = renderer
        self.weights: dict[str, torch.Tensor] = {}

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        for request in requests:
            rng = random.Random(request.seed)
            junk = "".join(rng.choices([" apples", " Tom", " 7", " more"], k=rng.choice([0, 1, 2, 9])))
            body = self._renderer.tokenizer.encode(f"{junk} #### {rng.randint(1, 4)}")
            token_ids = (*body[: sampling.max_completion_tokens - 1], self._renderer.eos_token_ids[0])
            yield Completion(
                key=request.key, token_ids=token_ids, text=self._renderer.decode(token_ids), truncated=False
            )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in named_tensors}

    def close(self) -> None:
        pass


def train(
    config: Config, vstar: Path, ranks: Ranks, pool: GraderPool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The figures of each iteration, and the weights after the last."""
    inputs = prepare(config, vstar)
    engine = ScriptedEngine(inputs.renderer)
    trainer = Trainer(config, inputs, Sampler(lambda: engine, pool, config.sampling, ranks), ranks)
    assert config.train.iterations is not None
    figures: dict[str, Any] = {"pass_at_1": trainer.evaluate()[0]["evaluate/pass_at_1"]}
    watch(trainer, figures)
    metrics = [trainer.iteration(number)[0] for number in range(1, config.train.iterations + 1)]
    figures |= {name: [row[name] for row in metrics] for name in FIGURES}
    return figures, engine.weights


def watch(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Note each step's number of slices on every rank, and the log-ratio of its sequences."""
    token_batches, optimizer_step = trainer.token_batches, trainer.optimizer_step
    figures |= {"slices": [], "log_ratios": []}

    def watched_token_batches(mini_batch: dict[int, Rollout]) -> list[TokenBatch]:
        slices = token_batches(mini_batch)
        figures["slices"].append(len(slices))
        return slices

    def watched_optimizer_step(
        mini_batch: dict[int, Rollout], metrics: Metrics
    ) -> tuple[dict[int, SequenceRecord], float]:
        records, norm = optimizer_step(mini_batch, metrics)
        figures["log_ratios"].append([record.log_ratio for record in records.values()])
        return records, norm

    trainer.token_batches = watched_token_batches  # type: ignore[method-assign]
    trainer.optimizer_step = watched_optimizer_step  # type: ignore[method-assign]


@contextmanager
def as_with_a_large_vocabulary() -> Iterator[None]:
    """Several chunks of logits a slice, not as many on each rank; under ZeRO-3 no parameter is kept whole."""
    size, configure = logprobs.LOGITS_PER_CHUNK, policy._deepspeed_config

    def partition_everything(config: Config) -> dict[str, Any]:
        document = configure(config)
        document["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return document

    logprobs.LOGITS_PER_CHUNK, policy._deepspeed_config = 3000, partition_everything
    try:
        yield
    finally:
        logprobs.LOGITS_PER_CHUNK, policy._deepspeed_config = size, configure


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    ranks = join_ranks(seed=0)
    figures, weights = {}, {}
    with GraderPool(Config.model_validate(next(iter(job["cases"].values()))).grader) as pool:
        for name, document in job["cases"].items():
            config = Config.model_validate(document)
            with as_with_a_large_vocabulary() if name == IN_CHUNKS else nullcontext():
                figures[name], weights[name] = train(config, Path(job["vstar"]), ranks, pool)
    torch.save((figures, weights), f"{job['output']}.{ranks.rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
