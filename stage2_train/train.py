"""Stage 2's algorithm: rollouts → score → credit → update → watchers (Algorithm 1, lines 8 to 11).

It has no branch for an objective: set-up builds what an objective needs (parts.py).
"""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from common.rollout import Prompt, Rollout
from common.seeds import derive_seed
from common.terminal.console import Terminal
from stage2_train import checkpoint
from stage2_train.batch import ABSENT, Batch
from stage2_train.card import made_with
from stage2_train.checkpoint import CRITIC, POLICY
from stage2_train.collate import Collated
from stage2_train.config import Config
from stage2_train.data import TrainingData
from stage2_train.metrics import Metrics, peak_memory_bytes, timed
from stage2_train.parts import build_parts
from stage2_train.ranks import Ranks
from stage2_train.records import Records, summarise
from stage2_train.resume import origin
from stage2_train.safeguards import StopRequest, refuse_unjudged
from stage2_train.sources.batches import BatchSource, flat, own_places
from stage2_train.sources.rollouts import as_json, from_json
from stage2_train.sources.sampler import Draw
from stage2_train.watchdog import in_phase
from stage2_train.watchers import Turn, Watcher

if TYPE_CHECKING:
    from stage2_train.sources.sampler import NamedWeights

Source = TypeVar("Source", bound=BatchSource)


def train(
    trainer: "Trainer[Source]", watchers: Sequence[Watcher], console: Terminal, *, first: int, last: int
) -> None:
    """Run iterations `first` to `last`, and the watchers, in order, after each of them and before the first (number 0).

    Raises KeyboardInterrupt if a StopRequest asked for it, after the watchers' turn.
    """

    def look(turn: Turn) -> None:
        with in_phase("watching"):
            for watcher in watchers:
                watcher.after(turn)

    with StopRequest(console, is_main=trainer.ranks.is_main) as stop:
        if first == 1:
            look(Turn(number=0, metrics={}, rollouts=[], is_last=False))
        for number in range(first, last + 1):
            turn = trainer.iteration(number, last)
            turn.is_stopping = bool(trainer.ranks.largest(stop.is_made)) and not turn.is_last
            look(turn)
            if turn.is_stopping:
                raise KeyboardInterrupt


class Trainer(Generic[Source]):
    """One iteration of training, and the parts that it needs."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        build_source: "Callable[[Callable[[], NamedWeights]], Source]",
        ranks: Ranks,
    ) -> None:
        """Load what the objective needs; a source of batches is built from the function that gives π's weights."""
        self.config = config
        self.data = data
        self.ranks = ranks
        self.objective = config.train.objective
        self.made_with = made_with(config, data, ranks.world_size)
        self.parts = build_parts(config, data, ranks)
        self.source = build_source(self.parts.policy.weights_for_engine)

    def iteration(self, number: int, last: int) -> Turn:
        """Algorithm 1, lines 9 and 10: a batch of rollouts from π_t, then SGD on the objective's loss.

        The figures are those of the whole batch, the rollouts this rank's.
        """
        metrics: Metrics = {}
        norms = []
        with timed("iteration", metrics):
            groups = self.source.groups(number, last, metrics)
            rollouts = flat(groups)
            self.refuse_unjudged(number, rollouts)
            # Randomness in the network, such as dropout, is the same after a restart.
            torch.manual_seed(derive_seed(self.config.seed, "update", number, self.ranks.rank))
            collated = self.parts.collate(groups, self.places)
            batch = self.objective.credit(self.score(collated, metrics))
            records = Records(rollouts, collated.rows)
            records.note_credit(batch)
            for _ in range(self.objective.passes):
                for step in collated.steps:
                    metrics["train/learning_rate"] = self.parts.policy.learner.learning_rate
                    with timed("update", metrics):
                        norms.append(self.parts.update(step, batch, records))
                    # From now on the engine's weights differ from the policy's.
                    batch = batch.with_columns(sampled_K=ABSENT)
            if self.parts.history:
                with timed("history", metrics):
                    self.parts.history.visit(rollouts)
        metrics |= summarise(
            self.ranks.gather(records.all), metrics["time/iteration"], drawn=self.config.train.draws
        )
        metrics |= step_figures(norms)
        metrics["train/processes"] = float(self.ranks.world_size)
        metrics["memory/peak_gib"] = peak_memory_bytes() / 2**30
        return Turn(number=number, metrics=metrics, rollouts=rollouts, is_last=number == last)

    @property
    def places(self) -> range:
        """The places of this rank's groups in a batch."""
        return own_places(self.config.train, self.ranks)

    def refuse_unjudged(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """Raise UserError if the grader could judge too few of the batch's rollouts."""
        judged = self.ranks.total(sum(rollout.is_judged for rollout in rollouts))
        refuse_unjudged(number, judged, self.ranks.total(len(rollouts)), rollouts)

    def score(self, collated: Collated, metrics: Metrics) -> Batch:
        """The batch with the columns that models fill; each scores all of the iteration's micro-batches in one call.

        The policy will train on the same micro-batches, so that rounding cancels in ratios of probabilities.
        """
        batch = collated.batch
        slices = [tokens for step in collated.steps for tokens in step.slices]
        for name, scorer in self.parts.scorers.items():
            with timed(name, metrics):
                found = scorer.score(slices or [collated.steps[0].filler])
                column_K = torch.zeros(int(batch.lengths_B.sum()), device=self.ranks.device)
                for tokens, values_K in zip(slices, found, strict=False):
                    rows_B = torch.tensor(tokens.rows, device=self.ranks.device)
                    column_K[batch.places_of(rows_B)] = values_K
            batch = batch.with_columns(**{f"{name}_K": column_K})
        return batch

    def save(self, folder: Path, number: int, held_out_accuracy: float | None) -> None:
        """Write a checkpoint from which iteration number + 1 continues."""
        state = {
            "iteration": number,
            "origin": origin(self.config, self.data),
            "world_size": self.ranks.world_size,
            "zero_stage": self.config.train.zero_stage,
            "held_out_accuracy": held_out_accuracy,
            "made_with": self.made_with,
        }
        checkpoint.write(
            folder,
            state,
            self.parts.learners,
            self.ranks,
            keep=self.config.train.keep_checkpoints,
            rollouts=self._waiting(number),
            history=self.parts.history.table() if self.parts.history and self.ranks.is_main else None,
        )

    def _waiting(self, number: int) -> list[list[list[dict[str, Any]]]]:
        """The batches that were drawn ahead: the groups of all ranks in order of their places."""
        batches = []
        for groups in self.source.waiting(number):
            ours = [
                (place, list(map(as_json, group))) for place, group in zip(self.places, groups, strict=True)
            ]
            everyone = sorted(self.ranks.gather(ours), key=itemgetter(0))
            batches.append([group for _, group in everyone])
        return batches

    def resume(self, folder: Path) -> int:
        """Continue from a checkpoint, of any split; returns the number of its iteration."""
        checkpoint.load(folder, self.parts.learners, self.ranks)
        if self.parts.history:
            self.parts.history.resume(checkpoint.read_history(folder))
        number: int = checkpoint.read_state(folder)["iteration"]
        prompts = {prompt.id: prompt for prompt in self.data.prompts}
        batches = [
            [[from_json(rollout, prompts) for rollout in groups[place]] for place in self.places]
            for groups in checkpoint.read_rollouts(folder, self.objective.group_size)
        ]
        self.source.resume(number, batches)
        return number


def step_figures(norms: Sequence[dict[str, float]]) -> Metrics:
    """Each part's mean gradient norm over an iteration's steps, and how many of its steps were skipped."""
    figures: Metrics = {}
    for part, prefix in ((POLICY, ""), (CRITIC, "critic_")):
        if part in norms[0]:
            taken = [norm[part] for norm in norms if math.isfinite(norm[part])]
            figures[f"train/{prefix}gradient_norm"] = sum(taken) / len(taken) if taken else math.nan
            figures[f"train/{prefix}skipped_steps"] = float(len(norms) - len(taken))
    return figures


def held_out_draw(prompts: Sequence[Prompt], config: Config, ranks: Ranks) -> Draw:
    """One completion of each held-out prompt, from the same random streams every time; this rank's share."""
    places = range(ranks.rank, len(prompts), ranks.world_size)
    return Draw(
        prompts=[prompts[place] for place in places],
        places=places,
        seed=derive_seed(config.seed, "evaluate"),
    )
