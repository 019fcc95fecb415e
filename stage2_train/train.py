"""Stage 2 whole: on-policy regression on the optimal advantages that stage 1's V̂* gives (Algorithm 1, lines 8 to 11).

`train` is the loop, `Trainer.iteration` is one turn of it. Everything from stage 1 comes out of vstar.parquet.

Shapes: _B sequence, _K completion token.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from common.artifacts import (
    RunPaths,
    differences,
    exclusive_run,
    model_identity,
    reference_model,
    run_paths,
    write_text,
)
from common.config import Config
from common.engine import RolloutEngine, SamplingParams, build_engine, request_seed
from common.errors import UserError
from common.grading import GraderPool, Outcome, fingerprint
from common.prompts import PromptRenderer, check_context, load_prompts, prompts_from_pairs, sampling_identity
from common.rollout import Prompt, Rollout
from common.schema import Provenance, read_vstar
from stage2_train.batch import MicroBatch, TokenBatch, TokenSequence, token_batches
from stage2_train.logprobs import LogprobModel, load_model, token_logprobs
from stage2_train.metrics import Metrics, MetricsLog, peak_memory_bytes, timed
from stage2_train.objectives import Objective, build_objective
from stage2_train.policy import Policy, Ranks, checkpoint_state, join_ranks
from stage2_train.rollouts import LOGPROB_CHECKS, collect_rollouts


def run_stage2(config: Config, console: Console, vstar_file: Path | None = None) -> None:
    """Train on a run's vstar.parquet and export the policy to artifacts/<run>/model; a re-run continues.

    Everything a user can get wrong is checked before a model loads. Raises UserError.
    """
    paths = run_paths(config.run)
    inputs = prepare(config, vstar_file or paths.vstar)
    total = inputs.iterations(config)
    origin = _origin(config, inputs)
    if _finished(paths, origin):
        console.print(
            f"nothing to do: {paths.model} has been trained for {total} iterations with this config"
        )
        return
    state = checkpoint_state(paths.checkpoints)
    _refuse_other_origin(paths, origin, state)
    ranks = join_ranks(config.seed)
    _refuse_uneven_split(config, ranks)
    _refuse_other_world(paths, ranks, state)
    first = state.get("iteration", 0) + 1
    if not ranks.is_main:
        _train(config, paths, inputs, ranks, first, total, Console(quiet=True))
        return
    with exclusive_run(paths, "train"):
        _train(config, paths, inputs, ranks, first, total, console)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What training starts from."""

    folder: Path
    renderer: PromptRenderer
    prompts: list[Prompt]
    vstar: dict[str, float]
    held_out: list[Prompt]

    def iterations(self, config: Config) -> int:
        """Batches until each prompt has been seen `epochs` times, or the configured number."""
        train = config.train
        return train.iterations or max(1, train.epochs * len(self.prompts) // train.batch_size)


def prepare(config: Config, vstar_file: Path) -> Inputs:
    """Read and check everything that needs no model. Raises UserError."""
    if config.sampling.temperature == 0:
        raise UserError("sampling.temperature is 0: training needs a policy that samples; set it above 0")
    rows, provenance = read_vstar(vstar_file)
    folder = reference_model(config)
    renderer = PromptRenderer(folder, config.data)
    ours = sampling_identity(config, renderer, model_identity(folder), fingerprint(config.grader))
    theirs = {key: value for key, value in provenance.identity.items() if key in ours}
    Provenance(identity=ours, context={}).refuse_unless_same(
        Provenance(identity=theirs, context={}),
        what=str(vstar_file),
        advice="V̂* holds for its own model, template, sampling and grader only: use those, or make it anew "
        "with another --run",
    )
    kept = rows.filter("keep")
    if kept.is_empty():
        raise UserError(
            f"{vstar_file}: no prompt is left to train on; run `python cli.py filter` with milder rules"
        )
    prompts = prompts_from_pairs(zip(kept["prompt"], kept["answer"], strict=True), config.data, renderer)
    held_out = []
    if config.evaluate.data is not None:
        held_out = load_prompts(config.evaluate.data, config, renderer)[: config.evaluate.training_prompts]
    check_context([*prompts, *held_out], config, folder)
    return Inputs(
        folder=folder,
        renderer=renderer,
        prompts=prompts,
        vstar=dict(zip(kept["prompt_id"], kept["vstar"], strict=True)),
        held_out=held_out,
    )


def _refuse_uneven_split(config: Config, ranks: Ranks) -> None:
    if config.train.mini_batch_size % ranks.world_size:
        raise UserError(
            f"train.mini_batch_size {config.train.mini_batch_size} cannot be split evenly over "
            f"{ranks.world_size} processes; choose a multiple"
        )


def _origin(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What two runs must share for one to continue the other: the config, and the V̂* that it trains on."""
    vstar = json.dumps(sorted(inputs.vstar.items())).encode()
    return {"config": config.model_dump(mode="json"), "vstar": hashlib.sha256(vstar).hexdigest()[:32]}


def _finished(paths: RunPaths, origin: dict[str, Any]) -> bool:
    marker = paths.model / TRAINED_WITH
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == origin


def _refuse_other_origin(paths: RunPaths, origin: dict[str, Any], state: dict[str, Any]) -> None:
    if state and (lines := differences(origin, state["origin"])):
        raise UserError(
            f"{paths.checkpoints} was made with another config or V̂*: {'; '.join(lines)}; "
            "choose another --run, or delete that folder"
        )


def _refuse_other_world(paths: RunPaths, ranks: Ranks, state: dict[str, Any]) -> None:
    if state and state["world_size"] != ranks.world_size:
        raise UserError(
            f"{paths.checkpoints} was made by {state['world_size']} processes and can only be continued by as many, "
            f"found {ranks.world_size}; start {state['world_size']}, or delete that folder"
        )


TRAINED_WITH = "astar_po.json"
"""In the exported model's folder: what it was trained with."""


def _train(
    config: Config, paths: RunPaths, inputs: Inputs, ranks: Ranks, first: int, total: int, console: Console
) -> None:
    engine = build_engine(config, inputs.folder, inputs.renderer, beside_trainer=True)
    with GraderPool(config.grader) as pool:
        trainer = Trainer(config, inputs, engine, pool, ranks)
        trainer.policy.load_checkpoint(paths.checkpoints)
        if first > 1:
            console.print(f"continuing after iteration {first - 1}")
            trainer.synchronise()
        if ranks.is_main:
            write_text(paths.config, config.to_json())
        console.print(
            f"{len(inputs.prompts):,} prompts, {total} iterations of {config.train.batch_size} completions, "
            f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}"
        )
        train(trainer, config, paths, console, first=first, last=total)
        trainer.policy.export(paths.model)
        if ranks.is_main:
            write_text(paths.model / TRAINED_WITH, json.dumps(trainer.origin, indent=2))
            console.print(f"{paths.model}: the trained policy in Hugging Face format")
    engine.close()


def train(
    trainer: "Trainer", config: Config, paths: RunPaths, console: Console, *, first: int, last: int
) -> None:
    """Run iterations `first` to `last`, with evaluations, logs and checkpoints."""
    log = None
    if trainer.ranks.is_main:
        log = MetricsLog(config, paths, console, first_iteration=0 if first == 1 else first, last=last)
    try:
        if first == 1 and trainer.held_out:
            before = trainer.evaluate()
            if log:
                log.write(0, before)
        for number in range(first, last + 1):
            metrics = trainer.iteration(number)
            if trainer.held_out and (number % config.train.evaluate_every == 0 or number == last):
                metrics |= trainer.evaluate()
            if log:
                log.write(number, metrics)
            if number % config.train.checkpoint_every == 0 or number == last:
                trainer.policy.save_checkpoint(
                    paths.checkpoints,
                    {"iteration": number, "origin": trainer.origin, "world_size": trainer.ranks.world_size},
                    keep=config.train.keep_checkpoints,
                )
    finally:
        if log:
            log.close()


@dataclass(slots=True, kw_only=True)
class SequenceRecord:
    """What is logged of one sequence of a step."""

    reward: float
    advantage: float
    completion_tokens: int
    truncated: bool
    solved: bool
    squared_residual: float = 0.0
    log_ratio: float = 0.0
    entropy: float = 0.0
    """Summed over the completion's tokens."""
    logprob_gap: float = 0.0
    """The largest difference between the engine's and the trainer's log-prob of a token, where it was compared."""


class Trainer:
    """The parts that an iteration needs, and the iteration itself."""

    def __init__(
        self, config: Config, inputs: Inputs, engine: RolloutEngine, pool: GraderPool, ranks: Ranks
    ) -> None:
        """Load the policy and the reference model."""
        self.config = config
        self.origin = _origin(config, inputs)
        self.ranks = ranks
        self.prompts = inputs.prompts
        self.vstar = inputs.vstar
        self.held_out = inputs.held_out
        self.engine = engine
        self.pool = pool
        self.objective: Objective = build_objective(config.train.objective)
        self.sampling = SamplingParams(**config.sampling.model_dump())
        self.policy = Policy(inputs.folder, config, ranks)
        self.reference: LogprobModel = (
            load_model(inputs.folder, config).to(ranks.device).eval().requires_grad_(False)
        )
        tokenizer = inputs.renderer.tokenizer
        self.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )

    def iteration(self, number: int) -> Metrics:
        """Algorithm 1, lines 9 and 10: a batch of rollouts from π_t, then SGD on the regression loss."""
        metrics: Metrics = {}
        with timed("iteration", metrics):
            places = range(self.ranks.rank, self.config.train.batch_size, self.ranks.world_size)
            with timed("rollout", metrics):
                rollouts = self.rollouts(number, places)
            records: dict[int, SequenceRecord] = {}
            gradient_norms = []
            for start in range(0, self.config.train.batch_size, self.config.train.mini_batch_size):
                step = range(start, start + self.config.train.mini_batch_size)
                mini_batch = {
                    place: rollout for place, rollout in zip(places, rollouts, strict=True) if place in step
                }
                metrics["train/learning_rate"] = self.policy.learning_rate
                step_records, norm = self.optimizer_step(mini_batch, metrics)
                records |= step_records
                gradient_norms.append(norm)
            with timed("weight_sync", metrics):
                self.synchronise()
        gathered = self.gather(list(records.values()))
        return (
            metrics
            | _summarise(gathered, metrics["time/iteration"])
            | {
                "train/gradient_norm": sum(gradient_norms) / len(gradient_norms),
                "memory/peak_gib": peak_memory_bytes() / 2**30,
            }
        )

    def rollouts(self, number: int, places: Sequence[int]) -> list[Rollout]:
        """Line 9: x from the training prompts, one y ~ π_t(·|x) each, r(x, y)."""
        batch = prompt_batch(len(self.prompts), self.config.train.batch_size, self.config.seed, number)
        return collect_rollouts(
            [self.prompts[batch[place]] for place in places],
            self.engine,
            self.pool,
            self.sampling,
            seed=request_seed(self.config.seed, "train", number),
            places=places,
            logprob_checks=min(LOGPROB_CHECKS, self.config.train.mini_batch_size),
        )

    def optimizer_step(
        self, mini_batch: dict[int, Rollout], metrics: Metrics
    ) -> tuple[dict[int, SequenceRecord], float]:
        """Line 10: one step of SGD on (β2 ln π/π_ref − (r − V̂*))², slice by slice."""
        rewards_B = torch.tensor([rollout.grade.reward for rollout in mini_batch.values()])
        vstar_B = torch.tensor([self.vstar[rollout.prompt.id] for rollout in mini_batch.values()])
        advantage = dict(zip(mini_batch, self.objective.advantages(rewards_B, vstar_B).tolist(), strict=True))
        records = {place: _record(rollout, advantage[place]) for place, rollout in mini_batch.items()}
        slices = self.token_batches(mini_batch)
        with timed("reference", metrics):
            reference = [self.reference_logprobs(tokens) for tokens in slices]
        with timed("update", metrics):
            rounds = self.most_slices(len(slices))
            for turn in range(rounds):
                tokens, reference_logprobs_K = slices[turn % len(slices)], reference[turn % len(slices)]
                policy = token_logprobs(self.policy.engine, tokens)
                batch = MicroBatch(
                    sequence_of_K=tokens.sequence_of_K,
                    reference_logprobs_K=reference_logprobs_K,
                    advantages_B=torch.tensor(
                        [advantage[place] for place in tokens.places], device=self.ranks.device
                    ),
                    step_sequences=self.config.train.mini_batch_size,
                )
                loss_share, squared_residual_B = self.objective.loss(policy.logprobs_K, batch)
                is_filler = turn >= len(slices)
                self.policy.backward(loss_share * (0.0 if is_filler else 1.0), last=turn == rounds - 1)
                if not is_filler:
                    columns = (
                        squared_residual_B.tolist(),
                        batch.sum_by_sequence(policy.logprobs_K.detach() - reference_logprobs_K).tolist(),
                        batch.sum_by_sequence(policy.entropy_K).tolist(),
                    )
                    for place, residual, log_ratio, entropy in zip(tokens.places, *columns, strict=True):
                        records[place].squared_residual = residual
                        records[place].log_ratio = log_ratio
                        records[place].entropy = entropy
                    _compare_logprobs(mini_batch, tokens, policy.logprobs_K.detach(), records)
            gradient_norm = self.policy.step()
        return records, gradient_norm

    def token_batches(self, mini_batch: dict[int, Rollout]) -> list[TokenBatch]:
        """The step's sequences on the device, cut into micro-batches."""
        sequences = [
            TokenSequence(
                place=place,
                prompt_token_ids=rollout.prompt.token_ids,
                completion_token_ids=rollout.completion.token_ids,
            )
            for place, rollout in mini_batch.items()
        ]
        batches = token_batches(sequences, self.config.train.tokens_per_micro_batch, self.pad_token_id)
        return [batch.to(self.ranks.device) for batch in batches]

    @torch.no_grad()
    def reference_logprobs(self, tokens: TokenBatch) -> torch.Tensor:
        """ln π_ref of each completion token, shape (K,)."""
        return token_logprobs(self.reference, tokens).logprobs_K

    def most_slices(self, count: int) -> int:
        """The largest number of slices on any rank: each has to join the others' collective operations."""
        if self.ranks.world_size == 1:
            return count
        most = torch.tensor(count, device=self.ranks.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def gather(self, records: list[SequenceRecord]) -> list[SequenceRecord]:
        """All ranks' records."""
        if self.ranks.world_size == 1:
            return records
        parts: list[list[SequenceRecord]] = [[] for _ in range(self.ranks.world_size)]
        dist.all_gather_object(parts, records)
        return [record for part in parts for record in part]

    def synchronise(self) -> None:
        """Give the engine the policy's weights."""
        self.engine.load_weights(self.policy.named_weights())

    def evaluate(self) -> Metrics:
        """Sampled accuracy on the held-out prompts, one completion each, from the same random streams every time."""
        metrics: Metrics = {}
        places = range(self.ranks.rank, len(self.held_out), self.ranks.world_size)
        with timed("evaluate", metrics):
            rollouts = collect_rollouts(
                [self.held_out[place] for place in places],
                self.engine,
                self.pool,
                self.sampling,
                seed=request_seed(self.config.seed, "evaluate"),
                places=places,
            )
        solved = self.gather([_record(rollout, 0.0) for rollout in rollouts])
        return metrics | {"evaluate/pass_at_1": sum(record.solved for record in solved) / len(solved)}


def prompt_batch(prompts: int, batch_size: int, seed: int, iteration: int) -> list[int]:
    """The prompts of an iteration (from 1 on): an endless row of shuffled epochs, cut into batches.

    A function of its arguments alone, so that a resumed run sees the data in the same order.
    """
    start = (iteration - 1) * batch_size
    batch: list[int] = []
    while len(batch) < batch_size:
        epoch, offset = divmod(start + len(batch), prompts)
        order = list(range(prompts))
        random.Random(request_seed(seed, "epoch", epoch)).shuffle(order)
        batch += order[offset : offset + batch_size - len(batch)]
    return batch


def _record(rollout: Rollout, advantage: float) -> SequenceRecord:
    return SequenceRecord(
        reward=rollout.grade.reward,
        advantage=advantage,
        completion_tokens=len(rollout.completion.token_ids),
        truncated=rollout.completion.truncated,
        solved=rollout.grade.outcome == Outcome.CORRECT,
    )


def _compare_logprobs(
    mini_batch: dict[int, Rollout],
    tokens: TokenBatch,
    logprobs_K: torch.Tensor,
    records: dict[int, SequenceRecord],
) -> None:
    """Note how far the engine's log-probs are from the trainer's; before the first step both have the same weights."""
    for row, place in enumerate(tokens.places):
        sampled = mini_batch[place].completion.sampled_logprobs
        if sampled is not None:
            ours = logprobs_K[tokens.sequence_of_K == row].cpu()
            records[place].logprob_gap = float((ours - torch.tensor(sampled)).abs().max())


def _summarise(records: Sequence[SequenceRecord], seconds: float) -> Metrics:
    count = len(records)
    tokens = sum(record.completion_tokens for record in records)

    def mean(name: str) -> float:
        return float(sum(getattr(record, name) for record in records) / count)

    return {
        "reward/mean": mean("reward"),
        "reward/solved": mean("solved"),
        "advantage/mean": mean("advantage"),
        "loss/regression": mean("squared_residual"),
        "kl/sequence": mean("log_ratio"),
        "kl/token": sum(record.log_ratio for record in records) / tokens,
        "completion/tokens_mean": tokens / count,
        "completion/tokens_max": max(record.completion_tokens for record in records),
        "completion/truncated": mean("truncated"),
        "policy/entropy": sum(record.entropy for record in records) / tokens,
        "engine/logprob_gap": max(record.logprob_gap for record in records),
        "throughput/completion_tokens_per_second": tokens / seconds,
    }
