"""Draw rollouts ahead of their iteration: while the trainer works on one batch, the engine draws later ones.

With staleness k the completions of iteration n come from the weights after iteration n − 1 − k, and those of the first
k iterations from the reference. Only objectives with `allows_staleness` accept such completions. With k = 0 they come
from the current policy, and drawing and training do not overlap.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from common.rollout import Rollout
from common.seeds import derive_seed
from stage2_train.config import Config
from stage2_train.data import TrainingData, prompt_batch
from stage2_train.metrics import Metrics, timed
from stage2_train.ranks import Ranks
from stage2_train.sources.batches import Group, flat, own_places
from stage2_train.sources.rollouts import LOGPROB_CHECKS
from stage2_train.sources.sampler import Draw, Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from stage2_train.sources.sampler import NamedWeights

    Attempt = list[Group] | None


def training_draw(config: Config, data: TrainingData, ranks: Ranks, number: int) -> Draw:
    """A rank's draw for an iteration."""
    train, places = config.train, own_places(config.train, ranks)
    batch = prompt_batch(len(data.prompts), train.batch_size, config.seed, number)
    return Draw(
        prompts=[data.prompts[batch[place]] for place in places],
        places=places,
        seed=derive_seed(config.seed, "train", number),
        group_size=train.objective.group_size,
        # Engine and trainer have the same weights only if nothing is drawn ahead.
        logprob_checks=min(LOGPROB_CHECKS, train.mini_batch_size) if train.staleness == 0 else 0,
    )


def drawing(
    config: Config, data: TrainingData, sampler: Sampler, ranks: Ranks
) -> "Callable[[Callable[[], NamedWeights]], RolloutPipeline]":
    """Builds the pipeline of a training job from the function that gives the policy's weights."""
    return partial(
        RolloutPipeline, sampler, config.train.staleness, partial(training_draw, config, data, ranks)
    )


class RolloutPipeline:
    """The batches that are being drawn, and those that wait for their iteration.

    Except for the drawing itself, a rank does everything here in its main thread, at the same point as the other ranks,
    since gathering the weights is a collective operation. `version` is the number of finished iterations.
    """

    def __init__(
        self,
        sampler: Sampler,
        staleness: int,
        draw_of: Callable[[int], Draw],
        weights: "Callable[[], NamedWeights]",
    ) -> None:
        """`draw_of` gives a rank's share of an iteration's batch, `weights` the policy's current ones."""
        self._sampler = sampler
        self._staleness = staleness
        self._draw_of = draw_of
        self._weights = weights
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        start = partial(_take_own_stream, device)
        self._thread = ThreadPoolExecutor(1, initializer=start) if staleness else None
        self._begun: deque[tuple[Draw, Callable[[], Attempt]]] = deque()
        self._next = 1
        self._version = 0
        """Version of the weights that the engine will hold after all begun draws."""
        self._rebuilds = 0

    def groups(self, number: int, last: int, metrics: Metrics) -> list[Group]:
        """The batch of iteration `number`; others, up to iteration `last`, are drawn while it is trained on."""
        metrics |= {"time/rollout": 0.0, "time/weight_sync": 0.0}
        self._begin_until(min(last, number + max(0, self._staleness - 1)), number - 1, metrics)
        with timed("rollout", metrics):
            groups = self._take(number - 1)
        if self._thread is None:
            self._sampler.sleep()
        self._begin_until(min(last, number + self._staleness), number - 1, metrics)
        metrics["engine/rebuilds"] = float(self._rebuilds)
        self._rebuilds = 0
        return groups

    def now(self, draw: Draw, version: int) -> list[Rollout]:
        """Rollouts of the current policy, drawn after all begun draws."""
        self.waiting(version)
        if self._version != version:
            self._sampler.load_weights(self._weights())
            self._version = version
        return flat(self._settle(draw, self._sampler.attempt(draw), version))

    def waiting(self, version: int) -> list[list[Group]]:
        """The batches drawn for later iterations, which keep waiting for them."""
        batches = [self._take(version) for _ in range(len(self._begun))]
        self.resume(version, batches)
        return batches

    def resume(self, version: int, batches: Sequence[list[Group]]) -> None:
        """Continue after `version` iterations with the batches that were waiting at that point."""
        self._next = version + 1
        for batch in batches:
            self._hold(self._draw_of(self._next), partial(_given, batch))

    def close(self) -> None:
        """Begin no more draws, and discard those under way."""
        self._sampler.end()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_until(self, last: int, version: int, metrics: Metrics) -> None:
        while self._next <= last:
            with timed("weight_sync", metrics):
                copies = self._bring_weights(version)
            draw = self._draw_of(self._next)
            if self._thread is None:
                with timed("rollout", metrics):
                    attempt = self._sampler.attempt(draw)
                self._hold(draw, partial(_given, attempt))
            else:
                self._hold(draw, self._thread.submit(self._sampler.attempt, draw, copies).result)

    def _hold(self, draw: Draw, attempt: "Callable[[], Attempt]") -> None:
        self._begun.append((draw, attempt))
        self._next += 1

    def _bring_weights(self, version: int) -> "list[tuple[str, Tensor]] | None":
        """Give the engine the current weights; if it is still busy with older ones, return copies to be loaded later.

        The engine can only be busy here with a staleness of 2 or more.
        """
        if self._version == version:
            return None
        self._version = version
        if self._begun:
            return [(name, weight.to("cpu", copy=True)) for name, weight in self._weights()]
        self._sampler.load_weights(self._weights())
        return None

    def _take(self, version: int) -> list[Group]:
        draw, attempt = self._begun.popleft()
        return self._settle(draw, attempt(), version)

    def _settle(self, draw: Draw, attempt: "Attempt", version: int) -> list[Group]:
        def weights() -> "NamedWeights":
            self._wait()
            return self._weights()

        groups, died = self._sampler.settle(draw, attempt, weights)
        if died:
            self._rebuilds += died
            self._version = version
        return groups

    def _wait(self) -> None:
        for _, attempt in self._begun:
            attempt()


def _given(attempt: "Attempt") -> "Attempt":
    return attempt


def _take_own_stream(device: int | None) -> None:
    """Use a CUDA stream of its own, so that the thread's kernels do not wait for the trainer's."""
    if device is not None:
        torch.cuda.set_device(device)  # a thread starts with the first one
        torch.cuda.set_stream(torch.cuda.Stream())
