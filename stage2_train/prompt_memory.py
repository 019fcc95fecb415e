"""What an objective remembers of each prompt, from stage 1's samples on: a baseline where there is no group.

A prompt's memory changes after the iteration that visits it, by its reward and by how far the policy has moved since
the last visit. That is measured on the completion of the last visit, whose log-probs are kept with it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.grading import UNJUDGED
from common.rollout import Rollout
from stage2_train.batch import TokenBatch, TokenSequence
from stage2_train.objectives.protocol import Memory, RemembersPrompts
from stage2_train.ranks import Ranks
from stage2_train.scorers import Scorer

Logprobs = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Visit:
    """A completion of a prompt, with its log-probs after the update of its iteration."""

    token_ids: tuple[int, ...]
    logprobs: Logprobs


class PromptMemory:
    """The memories of all prompts, the same on every rank."""

    def __init__(
        self,
        objective: RemembersPrompts,
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
        self._memories = {prompt: objective.first_memory(values) for prompt, values in rewards.items()}
        self._visits: dict[str, Visit] = {}

    def expected(self, prompt_id: str) -> float:
        """The reward that a prompt's memory lets expect."""
        return self._memories[prompt_id].expected

    def visit(self, rollouts: Sequence[Rollout]) -> None:
        """Take notice of this rank's rollouts of an iteration, after its update; a collective operation."""
        judged = [rollout for rollout in rollouts if rollout.grade.outcome not in UNJUDGED]
        again = [rollout for rollout in judged if rollout.prompt.id in self._visits]
        last = [self._visits[rollout.prompt.id] for rollout in again]
        current = [tuple(rollout.completion.token_ids) for rollout in judged]
        logprobs = self._logprobs(judged, current, rollouts[0])
        moved = self._logprobs(again, [visit.token_ids for visit in last], rollouts[0])
        drift = {
            rollout.prompt.id: _mean_distance(visit.logprobs, now)
            for rollout, visit, now in zip(again, last, moved, strict=True)
        }
        visits = [
            (
                rollout.prompt.id,
                rollout.grade.reward,
                drift.get(rollout.prompt.id, 0.0),
                Visit(tokens, values),
            )
            for rollout, tokens, values in zip(judged, current, logprobs, strict=True)
        ]
        for prompt, reward, moved_by, visit in self._ranks.gather(visits):
            self._memories[prompt] = self._objective.next_memory(self._memories[prompt], reward, moved_by)
            self._visits[prompt] = visit

    def _logprobs(
        self, rollouts: Sequence[Rollout], completions: Sequence[tuple[int, ...]], filler: Rollout
    ) -> list[Logprobs]:
        """The policy's log-probs of completions of these rollouts' prompts."""
        sequences = [
            TokenSequence(
                row=row, prompt_token_ids=tuple(rollout.prompt.token_ids), completion_token_ids=tokens
            )
            for row, (rollout, tokens) in enumerate(zip(rollouts, completions, strict=True))
        ]
        if not self._ranks.largest(len(sequences)):
            return []
        batches = self._cut([[sequence] for sequence in sequences])
        scored = self._policy.score(batches or self._cut([[TokenSequence.of(0, filler)]]))
        found: dict[int, Logprobs] = {}
        for batch, values_K in zip(batches, scored, strict=False):
            lengths = [len(completions[row]) for row in batch.rows]
            for row, part in zip(batch.rows, values_K.cpu().split(lengths), strict=True):
                found[row] = tuple(part.tolist())
        return [found[row] for row in range(len(sequences))]

    def document(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {
            "memories": {prompt: asdict(memory) for prompt, memory in self._memories.items()},
            "visits": {prompt: asdict(visit) for prompt, visit in self._visits.items()},
        }

    def resume(self, document: dict[str, Any]) -> None:
        """Take over what `document` gave."""
        self._memories = {prompt: Memory(**memory) for prompt, memory in document["memories"].items()}
        self._visits = {
            prompt: Visit(tuple(visit["token_ids"]), tuple(visit["logprobs"]))
            for prompt, visit in document["visits"].items()
        }


def _mean_distance(before: Logprobs, now: Logprobs) -> float:
    return sum(abs(a - b) for a, b in zip(before, now, strict=True)) / max(1, len(before))
