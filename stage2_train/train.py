"""Stage 2's algorithm: on-policy regression on the optimal advantages that V̂* gives (Algorithm 1, lines 8 to 11).

`train` is the loop, `Trainer.iteration` one turn of it, `Trainer.optimizer_step` one step of SGD.

Shapes: _B sequence, _K completion token of the micro-batch.
"""

import math
from operator import itemgetter
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from common.grading import UNJUDGED
from common.rollout import Rollout
from common.runs import RunPaths
from common.seeds import derive_seed
from stage2_train.batch import MicroBatch, TokenBatch, TokenSequence, token_batches
from stage2_train.checkpoint import read_rollouts, read_state
from stage2_train.completions import forget_completions, write_completions
from stage2_train.config import Config
from stage2_train.inputs import Inputs, origin, prompt_batch
from stage2_train.logprobs import token_logprobs
from stage2_train.metrics import Metrics, MetricsLog, peak_memory_bytes, timed
from stage2_train.objectives import Objective, build_objective
from stage2_train.pipeline import RolloutPipeline
from stage2_train.policy import Policy, Ranks
from stage2_train.records import SequenceRecord, compare_logprobs, note_slice, record_of, summarise
from stage2_train.reference import build_reference
from stage2_train.rollouts import LOGPROB_CHECKS, as_json, from_json
from stage2_train.safeguards import StopRequest, refuse_divergence, refuse_unjudged
from stage2_train.sampler import Draw, Sampler


class Trainer:
    """The parts that an iteration needs, and the iteration itself."""

    def __init__(self, config: Config, inputs: Inputs, sampler: Sampler, ranks: Ranks) -> None:
        """Load the policy and the reference model."""
        self.config = config
        self.origin = origin(config, inputs)
        self.ranks = ranks
        self.prompts = inputs.prompts
        self.vstar = inputs.vstar
        self.pass_rate = inputs.pass_rate
        self.first_batch = inputs.first_batch
        self.held_out = inputs.held_out
        self.last = inputs.iterations(config)
        self.objective: Objective = build_objective(config.train.objective)
        self.policy = Policy(inputs.folder, config, ranks)
        self.reference = build_reference(inputs.folder, config, self.policy, ranks)
        tokenizer = inputs.renderer.tokenizer
        self.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        self.pipeline = RolloutPipeline(
            sampler, config.train.staleness, self.draw_of, self.policy.named_weights
        )

    def iteration(self, number: int) -> tuple[Metrics, list[Rollout]]:
        """Algorithm 1, lines 9 and 10: a batch of rollouts from π_t, then SGD on the regression loss.

        Returns the figures of the whole batch and this rank's rollouts.
        """
        metrics: Metrics = {}
        with timed("iteration", metrics):
            rollouts = self.rollouts(number, metrics)
            # What is random in the network, such as dropout, is the same after a restart.
            torch.manual_seed(derive_seed(self.config.seed, "update", number, self.ranks.rank))
            mini_batches = self.mini_batches(rollouts)
            with timed("reference", metrics):
                steps = self.with_reference(mini_batches)
            records: dict[int, SequenceRecord] = {}
            gradient_norms = []
            for mini_batch, slices in zip(mini_batches, steps, strict=True):
                metrics["train/learning_rate"] = self.policy.learning_rate
                with timed("update", metrics):
                    step_records, norm = self.optimizer_step(mini_batch, slices)
                records |= step_records
                gradient_norms.append(norm)
        gathered = self.ranks.gather(list(records.values()))
        taken = [norm for norm in gradient_norms if math.isfinite(norm)]
        metrics |= summarise(gathered, metrics["time/iteration"])
        metrics |= {
            "train/gradient_norm": sum(taken) / len(taken) if taken else math.nan,
            "train/skipped_steps": float(len(gradient_norms) - len(taken)),
            "train/processes": float(self.ranks.world_size),
            "memory/peak_gib": peak_memory_bytes() / 2**30,
        }
        return metrics, rollouts

    @property
    def places(self) -> range:
        """Which of a batch's completions are this rank's."""
        return range(self.ranks.rank, self.config.train.batch_size, self.ranks.world_size)

    def rollouts(self, number: int, metrics: Metrics) -> list[Rollout]:
        """Line 9: x from the training prompts, one y ~ π_t(·|x) each, r(x, y); this rank's share of them."""
        rollouts = self.pipeline.rollouts(number, self.last, metrics)
        judged = self.ranks.total(sum(rollout.grade.outcome not in UNJUDGED for rollout in rollouts))
        refuse_unjudged(number, judged, self.config.train.batch_size, rollouts)
        return rollouts

    def draw_of(self, number: int) -> Draw:
        """What this rank draws for an iteration."""
        train = self.config.train
        batch = prompt_batch(len(self.prompts), train.batch_size, self.config.seed, number)
        return Draw(
            prompts=[self.prompts[batch[place]] for place in self.places],
            places=self.places,
            seed=derive_seed(self.config.seed, "train", number),
            # The trainer's log-probs are those of the same weights where none lag behind, and only there.
            logprob_checks=min(LOGPROB_CHECKS, train.mini_batch_size) if train.staleness == 0 else 0,
        )

    def mini_batches(self, rollouts: list[Rollout]) -> list[dict[int, Rollout]]:
        """This rank's rollouts of each optimizer step, by their place in the batch."""
        size = self.config.train.mini_batch_size
        placed = list(zip(self.places, rollouts, strict=True))
        return [
            {place: rollout for place, rollout in placed if place // size == step}
            for step in range(self.config.train.batch_size // size)
        ]

    def with_reference(self, mini_batches: list[dict[int, Rollout]]) -> list[list[tuple[TokenBatch, Tensor]]]:
        """Each step's micro-batches with ln π_ref of their completion tokens, all at one visit to the reference.

        The policy will see the same micro-batches, so that rounding cancels in ln π/π_ref.
        """
        steps = [self.token_batches(mini_batch) for mini_batch in mini_batches]
        found = iter(self.reference.logprobs([tokens for slices in steps for tokens in slices]))
        return [[(tokens, next(found)) for tokens in slices] for slices in steps]

    def optimizer_step(
        self, mini_batch: dict[int, Rollout], slices: list[tuple[TokenBatch, Tensor]]
    ) -> tuple[dict[int, SequenceRecord], float]:
        """Line 10: one step of SGD on (β2 ln π/π_ref − (r − V̂*))², slice by slice; NaN for a step that was skipped.

        A rollout that the grader could not judge has no reward to regress on and is left out.
        """
        rewards_B = torch.tensor([rollout.grade.reward for rollout in mini_batch.values()])
        vstar_B = torch.tensor([self.vstar[rollout.prompt.id] for rollout in mini_batch.values()])
        advantage = dict(zip(mini_batch, self.objective.advantages(rewards_B, vstar_B).tolist(), strict=True))
        records = {place: record_of(rollout, advantage[place]) for place, rollout in mini_batch.items()}
        judged = _judged(mini_batch)
        step_sequences = self.ranks.total(len(judged))
        if step_sequences == 0:
            return records, math.nan
        own_turns = len(slices) if judged else 0
        rounds = self.ranks.largest(own_turns)
        for turn in range(rounds):
            is_filler = turn >= own_turns  # other ranks have more: join their collective operations
            tokens, reference_logprobs_K = slices[turn % len(slices)]
            batch = MicroBatch(
                sequence_of_K=tokens.sequence_of_K,
                reference_logprobs_K=reference_logprobs_K,
                advantages_B=torch.tensor(
                    [advantage[place] for place in tokens.places], device=self.ranks.device
                ),
                step_sequences=step_sequences,
            )
            policy = token_logprobs(self.policy.engine, tokens)
            loss_share, loss_B = self.objective.loss(policy.logprobs_K, batch)
            self.policy.backward(loss_share * (0.0 if is_filler else 1.0), last=turn == rounds - 1)
            if not is_filler:
                note_slice(records, tokens, batch, policy, loss_B)
                compare_logprobs(records, tokens, policy, mini_batch)
        gradient_norm = self.policy.step()
        for place in judged:
            records[place].regressed = math.isfinite(gradient_norm)
        return records, gradient_norm

    def token_batches(self, mini_batch: dict[int, Rollout]) -> list[TokenBatch]:
        """The step's judged sequences on the device, cut into micro-batches; all of them if none was judged."""
        taken = _judged(mini_batch) or mini_batch
        sequences = [TokenSequence.of(place, rollout) for place, rollout in taken.items()]
        batches = token_batches(sequences, self.config.train.tokens_per_micro_batch, self.pad_token_id)
        return [batch.to(self.ranks.device) for batch in batches]

    def evaluate(self, number: int) -> tuple[Metrics, list[Rollout]]:
        """Sampled accuracy after iteration `number` on the held-out prompts, from the same random streams every time.

        One completion each.
        """
        metrics: Metrics = {}
        places = range(self.ranks.rank, len(self.held_out), self.ranks.world_size)
        draw = Draw(
            prompts=[self.held_out[place] for place in places],
            places=places,
            seed=derive_seed(self.config.seed, "evaluate"),
        )
        with timed("evaluate", metrics):
            rollouts = self.pipeline.now(draw, number)
        solved = self.ranks.gather([record_of(rollout, 0.0) for rollout in rollouts])
        metrics["evaluate/pass_at_1"] = sum(record.solved for record in solved) / len(solved)
        return metrics, rollouts

    def save(self, paths: RunPaths, number: int, held_out_accuracy: float | None) -> None:
        """Write a checkpoint from which iteration number + 1 continues."""
        state = {
            "iteration": number,
            "origin": self.origin,
            "world_size": self.ranks.world_size,
            "held_out_accuracy": held_out_accuracy,
        }
        rollouts = []
        for batch in self.pipeline.waiting(number):
            ours = list(zip(self.places, map(as_json, batch), strict=True))
            rollouts.append([rollout for _, rollout in sorted(self.ranks.gather(ours), key=itemgetter(0))])
        keep = self.config.train.keep_checkpoints
        self.policy.save_checkpoint(paths.checkpoints, state, keep=keep, rollouts=rollouts)

    def resume(self, checkpoint: Path) -> int:
        """Continue from a checkpoint; returns the number of its iteration."""
        self.policy.load_checkpoint(checkpoint)
        number: int = read_state(checkpoint)["iteration"]
        prompts = {prompt.id: prompt for prompt in self.prompts}
        batches = [
            [from_json(batch[place], prompts) for place in self.places] for batch in read_rollouts(checkpoint)
        ]
        self.pipeline.resume(number, batches)
        return number


def _judged(mini_batch: dict[int, Rollout]) -> dict[int, Rollout]:
    return {place: rollout for place, rollout in mini_batch.items() if rollout.grade.outcome not in UNJUDGED}


def train(
    trainer: Trainer, config: Config, paths: RunPaths, console: Console, *, first: int, last: int
) -> None:
    """Run iterations `first` to `last`, with evaluations, logs and checkpoints.

    Raises KeyboardInterrupt where SIGTERM or Ctrl-C asked for it, after writing a checkpoint.
    """
    log = None
    if trainer.ranks.is_main:
        begin = 0 if first == 1 else first
        forget_completions(paths.completions, begin)
        log = MetricsLog(config, paths, console, first_iteration=begin, last=last)

    def evaluate(number: int, training: list[Rollout]) -> Metrics:
        metrics, held_out = trainer.evaluate(number)
        if log:
            stage1 = {"pass_rate": trainer.pass_rate, "vstar": trainer.vstar}
            write_completions(paths.completions, number, training=training, held_out=held_out, **stage1)
        return metrics

    try:
        with StopRequest() as stop:
            if first == 1 and trainer.held_out:
                before = evaluate(0, [])
                if log:
                    log.write(0, before)
            for number in range(first, last + 1):
                metrics, rollouts = trainer.iteration(number)
                if trainer.held_out and (number % config.train.evaluate_every == 0 or number == last):
                    metrics |= evaluate(number, rollouts)
                expected = trainer.first_batch if number == 1 else None
                if expected:
                    metrics |= expected.bounds()
                if log:
                    log.write(number, metrics)
                if expected and (
                    warning := expected.warning(metrics["loss/regression"], metrics["reward/mean"])
                ):
                    console.print(warning, soft_wrap=True)
                refuse_divergence(number, metrics)
                stopping = trainer.ranks.largest(stop.is_made) and number < last
                if number % config.train.checkpoint_every == 0 or number == last or stopping:
                    trainer.save(paths, number, metrics.get("evaluate/pass_at_1"))
                if stopping:
                    raise KeyboardInterrupt
    finally:
        if log:
            log.close()
