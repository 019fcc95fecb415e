"""Each prompt's history, which starts with stage 1's samples: a baseline for objectives without groups.

A prompt's tally changes after the iteration that visits it, by its reward and by the policy's drift since the last
visit. The drift is measured on the last visit's completion, which is kept with its log-probs: 8 bytes per token of each
prompt's last completion, on every rank.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from common.errors import UserError
from common.rollout import Rollout
from stage2_train.batch import TokenBatch, TokenSequence
from stage2_train.objectives.protocol import KeepsHistory, Tally
from stage2_train.ranks import Ranks
from stage2_train.scorers import Scorer

SCHEMA = {
    "prompt_id": pl.String(),
    "solved": pl.Float64(),
    "failed": pl.Float64(),
    "token_ids": pl.List(pl.Int32),
    "logprobs": pl.List(pl.Float32),
}
"""The format in checkpoints: one row per prompt; the last two are null before its first visit."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A completion of a prompt, with its log-probs after the update of its iteration."""

    token_ids: "array[int]"
    logprobs: "array[float]"


class PromptHistory:
    """The tallies of all prompts, the same on every rank."""

    def __init__(
        self,
        objective: KeepsHistory,
        rewards: Mapping[str, Sequence[float]],
        policy: Scorer,
        cut: Callable[[Sequence[Sequence[TokenSequence]]], list[TokenBatch]],
        ranks: Ranks,
    ) -> None:
        """`rewards` are those of stage 1, by prompt id; `cut` gives micro-batches."""
        self._objective = objective
        self._policy = policy
        self._cut = cut
        self._ranks = ranks
        self._tallies = {prompt: objective.first_tally(values) for prompt, values in rewards.items()}
        self._visits: dict[str, Visit] = {}

    def expected(self, prompt_id: str) -> float:
        """The reward that is expected from a prompt's history."""
        return self._tallies[prompt_id].expected

    def visit(self, rollouts: Sequence[Rollout]) -> None:
        """Add this rank's rollouts of an iteration, after its update; a collective operation.

        Raises UserError for a reward outside 0 to 1.
        """
        judged = [rollout for rollout in rollouts if rollout.is_judged]
        again = [rollout for rollout in judged if rollout.prompt.id in self._visits]
        last = [self._visits[rollout.prompt.id] for rollout in again]
        current = [array("i", rollout.completion.token_ids) for rollout in judged]
        logprobs = self._logprobs(judged, current, rollouts[0])
        moved = self._logprobs(again, [visit.token_ids for visit in last], rollouts[0])
        drift = {
            rollout.prompt.id: _mean_distance(visit.logprobs, now)
            for rollout, visit, now in zip(again, last, moved, strict=True)
        }
        visits = [
            (
                rollout.prompt.id,
                rollout.reward,
                drift.get(rollout.prompt.id, 0.0),
                Visit(tokens, values),
            )
            for rollout, tokens, values in zip(judged, current, logprobs, strict=True)
        ]
        for prompt, reward, moved_by, visit in self._ranks.gather(visits):
            if not 0 <= reward <= 1:
                raise UserError(
                    f"a completion of prompt {prompt} earned {reward:g}, but the objective expects rewards from 0 to "
                    "1; scale them, or train with another objective"
                )
            self._tallies[prompt] = self._objective.next_tally(self._tallies[prompt], reward, moved_by)
            self._visits[prompt] = visit

    def _logprobs(
        self, rollouts: Sequence[Rollout], completions: Sequence["array[int]"], filler: Rollout
    ) -> list["array[float]"]:
        """The policy's log-probs of completions of these rollouts' prompts."""
        sequences = [
            TokenSequence(
                row=row,
                prompt_token_ids=tuple(rollout.prompt.token_ids),
                completion_token_ids=tuple(tokens),
            )
            for row, (rollout, tokens) in enumerate(zip(rollouts, completions, strict=True))
        ]
        if not self._ranks.largest(len(sequences)):
            return []
        batches = self._cut([[sequence] for sequence in sequences])
        scored = self._policy.score(batches or self._cut([[TokenSequence.of(0, filler)]]))
        found: dict[int, array[float]] = {}
        for batch, values_K in zip(batches, scored, strict=False):
            lengths = [len(completions[row]) for row in batch.rows]
            for row, part in zip(batch.rows, values_K.cpu().split(lengths), strict=True):
                found[row] = array("f", part.tolist())
        return [found[row] for row in range(len(sequences))]

    def table(self) -> pl.DataFrame:
        """The history as a checkpoint keeps it."""
        rows = [
            (prompt, tally.solved, tally.failed, *_lists(self._visits.get(prompt)))
            for prompt, tally in self._tallies.items()
        ]
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def resume(self, table: pl.DataFrame) -> None:
        """Restore what `table` gave."""
        self._tallies, self._visits = {}, {}
        for prompt, solved, failed, token_ids, logprobs in table.iter_rows():
            self._tallies[prompt] = Tally(solved, failed)
            if token_ids is not None:
                self._visits[prompt] = Visit(array("i", token_ids), array("f", logprobs))


def _lists(visit: Visit | None) -> tuple[list[int] | None, list[float] | None]:
    return (None, None) if visit is None else (visit.token_ids.tolist(), visit.logprobs.tolist())


def _mean_distance(before: "array[float]", now: "array[float]") -> float:
    return sum(abs(a - b) for a, b in zip(before, now, strict=True)) / max(1, len(before))
