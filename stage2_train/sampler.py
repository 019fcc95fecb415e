"""The rollout engine of a training job and the grader behind it. An engine that dies is built anew, once a batch."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from common.config import SamplingParams
from common.engine import RolloutEngine
from common.errors import UserError
from common.grading import GraderPool
from common.rollout import Prompt, Rollout
from stage2_train.policy import Ranks
from stage2_train.rollouts import collect_rollouts

if TYPE_CHECKING:
    from torch import Tensor

    NamedWeights = Iterable[tuple[str, Tensor]]


class Sampler:
    """Gives rollouts of the current policy, also after its engine has died."""

    def __init__(
        self, build: Callable[[], RolloutEngine], pool: GraderPool, sampling: SamplingParams, ranks: Ranks
    ) -> None:
        """Build the engine, with the reference's weights."""
        self._build = build
        self._engine = build()
        self._pool = pool
        self._sampling = sampling
        self._ranks = ranks

    def rollouts(
        self,
        prompts: Sequence[Prompt],
        weights: "Callable[[], NamedWeights]",
        *,
        seed: int,
        places: Sequence[int],
        logprob_checks: int = 0,
    ) -> tuple[list[Rollout], int]:
        """One graded completion a prompt, and how many ranks' engines had to be built anew for it.

        `weights` are the policy's. Every rank asks for them, whoever's engine died: under ZeRO-3 giving them is a
        collective operation. Requests carry their seeds, so that the second attempt draws what the first would have.
        """

        def collect() -> list[Rollout]:
            return collect_rollouts(
                prompts,
                self._engine,
                self._pool,
                self._sampling,
                seed=seed,
                places=places,
                logprob_checks=logprob_checks,
            )

        rollouts = None
        try:
            rollouts = collect()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  an engine may die of anything
            print(
                f"warning: rank {self._ranks.rank}: the rollout engine died ({type(error).__name__}: {error}); "
                "it is built anew with the current weights and draws its batch again",
                file=sys.stderr,
            )
        died = self._ranks.total(int(rollouts is None))
        if died:
            # After the handler, whose exception holds on to the engine's memory.
            if rollouts is None:
                dict(self._pool.drain())  # grades of the first attempt
                self._engine.close()
                self._engine = self._build()
            self.load_weights(weights())
            if rollouts is None:
                rollouts = collect()
        assert rollouts is not None
        return rollouts, died

    def load_weights(self, weights: "NamedWeights") -> None:
        """Give the engine the policy's weights."""
        self._engine.load_weights(weights)

    def close(self) -> None:
        """Free the engine's memory."""
        self._engine.close()
