"""The rollout engine of a training job and its grader. An engine that dies is rebuilt, once per batch."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

from common.config import SamplingParams
from common.engines import RolloutEngine
from common.errors import EngineFailed, UserError, cause
from common.grading import GraderPool
from common.rollout import Prompt
from stage2_train.ranks import Ranks
from stage2_train.sources.batches import Group
from stage2_train.sources.rollouts import collect_rollouts

if TYPE_CHECKING:
    from torch import Tensor

    NamedWeights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw of a rank: completions of each prompt, from the random streams of `seed` and `places`.

    `places` number the prompts within the whole job. The engine reports log-probs of the first `logprob_checks`.
    """

    prompts: Sequence[Prompt]
    places: Sequence[int]
    seed: int
    group_size: int = 1
    logprob_checks: int = 0
    longest: int | None = None
    """Truncate completions at this many tokens, if that is less than the configured limit."""
    sampling: SamplingParams | None = None
    """By default that of training."""
    pool: GraderPool | None = None
    """By default that of training."""


class Sampler:
    """Gives graded rollouts of the weights that its engine holds, also after the engine has died."""

    def __init__(
        self, build: Callable[[], RolloutEngine], pool: GraderPool, sampling: SamplingParams, ranks: Ranks
    ) -> None:
        """Build the engine, with the reference's weights."""
        self._build = build
        self._engine = build()
        self._pool = pool
        self._sampling = sampling
        self._ranks = ranks
        self._is_ending = Event()

    def attempt(self, draw: Draw, weights: "list[tuple[str, Tensor]] | None" = None) -> list[Group] | None:
        """The graded completions of each prompt, or None if the engine died while drawing them.

        `weights`, if any, are loaded first and then released. Only this method may run in another thread. Raises
        UserError if the GPU itself has failed, after which no code of this process can use it.
        """
        import torch

        try:
            if weights is not None:
                self._engine.load_weights(weights)
                weights.clear()
            return self._collect(draw)
        except Exception as error:  # an engine may die in any way
            if isinstance(error, UserError) and not isinstance(error, EngineFailed):
                raise
            if self._is_ending.is_set():
                return None
            origin = error.__cause__ or error
            if isinstance(origin, torch.AcceleratorError) and "out of memory" not in str(origin):
                raise UserError(
                    f"the GPU failed while completions were drawn ({cause(origin)}): this process cannot use it any "
                    "more; start the job again, which continues from the last checkpoint"
                ) from error
            print(
                f"warning: rank {self._ranks.rank}: the rollout engine died ({cause(origin)}); "
                "it is rebuilt with the current weights and draws its batch again",
                file=sys.stderr,
            )
            dict((draw.pool or self._pool).drain())  # grades of draws that were discarded
            return None

    def settle(
        self, draw: Draw, groups: list[Group] | None, weights: "Callable[[], NamedWeights]"
    ) -> tuple[list[Group], int]:
        """Draw a batch again whose engine died; also returns the number of ranks whose engine had to be rebuilt.

        Every rank gathers the weights, whichever engine died: under ZeRO-3 that is a collective operation. Requests
        carry their seeds, so with equal weights the second attempt draws the same completions.
        """
        died = self._ranks.total(int(groups is None))
        if died:
            current = weights()
            if groups is None:
                self._engine.close()
                self._engine = self._build()
            self.load_weights(current)
            if groups is None:
                groups = self._collect(draw)
        assert groups is not None
        return groups, died

    def _collect(self, draw: Draw) -> list[Group]:
        sampling = draw.sampling or self._sampling
        if draw.longest is not None:
            sampling = sampling.model_copy(update={"max_completion_tokens": draw.longest})
        return collect_rollouts(
            draw.prompts,
            self._engine,
            draw.pool or self._pool,
            sampling,
            seed=draw.seed,
            places=draw.places,
            group_size=draw.group_size,
            logprob_checks=draw.logprob_checks,
            is_ending=self._is_ending,
        )

    def load_weights(self, weights: "NamedWeights") -> None:
        """Give the engine the policy's weights."""
        self._engine.load_weights(weights)

    def sleep(self) -> None:
        """Release the engine's memory until it receives weights again."""
        self._engine.sleep()

    def end(self) -> None:
        """Stop a draw under way in another thread; it returns no completions."""
        self._is_ending.set()

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()
