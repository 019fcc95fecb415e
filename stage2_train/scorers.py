"""Scorers, which give each completion token a number: log-probs of π_ref or π_old, or the critic's values.

The reference π_ref is a second model, in the device's memory or, while it is not used, in the host's; under ZeRO-3 each
of several ranks holds a part of it. Under LoRA it is the policy without its adapter. π_old is the policy itself before
an iteration's first step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stage2_train.batch import TokenBatch
from stage2_train.config import Config
from stage2_train.critic import Critic
from stage2_train.learner import Partitioned
from stage2_train.logprobs import VocabularyHead, load_model, token_logprobs
from stage2_train.objectives.protocol import Column
from stage2_train.policy import Policy
from stage2_train.ranks import Ranks


class Scorer(Protocol):
    """A model that gives each completion token a number, without gradients."""

    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """The scores of each batch's completion tokens, shape (K,) each, float32.

        Every rank has to call it with at least one batch; the number of batches may differ between ranks.
        """
        ...


def build_scorers(
    columns: frozenset[Column],
    folder: Path,
    config: Config,
    policy: Policy,
    critic: Critic | None,
    ranks: Ranks,
) -> dict[Column, Scorer]:
    """A scorer for each of these columns that needs a model; the reference's weights are those in `folder`."""
    scorers: dict[Column, Scorer] = {}
    if "reference" in columns:
        scorers["reference"] = build_reference(folder, config, policy, ranks)
    if "old" in columns:
        scorers["old"] = PolicyScorer(policy, ranks)
    if "values" in columns:
        assert critic is not None, "an objective with values trains a critic"
        scorers["values"] = CriticScorer(critic, ranks)
    return scorers


def build_reference(folder: Path, config: Config, policy: Policy, ranks: Ranks) -> Scorer:
    """The reference policy that a config asks for."""
    if config.train.lora is not None:
        return PolicyScorer(policy, ranks, adapted=False)
    if config.train.zero_stage == 3 and ranks.world_size > 1:
        return PartitionedModel(folder, config, ranks)
    return SeparateModel(folder, config, ranks.device)


class SeparateModel:
    """A model of its own, whole on every rank."""

    def __init__(self, folder: Path, config: Config, device: torch.device) -> None:
        """Load it to the device, or with `train.offload_reference` to the host's memory."""
        self._module = load_model(folder, config).eval().requires_grad_(False)
        self._device = device
        self._in_host_memory: list[tuple[nn.Parameter, Tensor]] = []
        if config.train.offload_reference:
            for parameter in self._module.parameters():
                # A copy from memory that may be swapped out takes a detour.
                parameter.data = parameter.data.pin_memory() if device.type == "cuda" else parameter.data
                self._in_host_memory.append((parameter, parameter.data))
            for buffer in self._module.buffers():
                buffer.data = buffer.data.to(device)
        else:
            self._module.to(device)

    @torch.no_grad()
    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """ln π_ref of each token."""
        with self._on_device():
            return [token_logprobs(self._module, batch).logprobs_K for batch in batches]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        for parameter, weight in self._in_host_memory:
            parameter.data = weight.to(self._device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, weight in self._in_host_memory:
                parameter.data = weight


class PartitionedModel:
    """A model of its own, of which each rank holds a part."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks) -> None:
        self._network = Partitioned(load_model(folder, config), config, whole=[VocabularyHead])
        self._ranks = ranks

    @torch.no_grad()
    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """ln π_ref of each token."""
        found = [token_logprobs(self._network, batch).logprobs_K for batch in _in_step(batches, self._ranks)]
        return found[: len(batches)]


class PolicyScorer:
    """The policy's own weights, partitioned as they are: in their current state, or without the adapter."""

    def __init__(self, policy: Policy, ranks: Ranks, *, adapted: bool = True) -> None:
        self._policy = policy
        self._ranks = ranks
        self._adapted = adapted

    @torch.no_grad()
    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """ln π of each token, without dropout."""
        weights = self._policy.learner.evaluating() if self._adapted else self._policy.without_adapter()
        with weights:
            return [self._policy.logprobs(batch).logprobs_K for batch in _in_step(batches, self._ranks)][
                : len(batches)
            ]


class CriticScorer:
    """The critic's values."""

    def __init__(self, critic: Critic, ranks: Ranks) -> None:
        self._critic = critic
        self._ranks = ranks

    @torch.no_grad()
    def score(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """V of the state before each token."""
        with self._critic.learner.evaluating():
            return [self._critic.values(batch) for batch in _in_step(batches, self._ranks)][: len(batches)]


def _in_step(batches: Sequence[TokenBatch], ranks: Ranks) -> Iterator[TokenBatch]:
    """Repeat batches so that every rank has as many: under ZeRO-3 a forward pass is a collective operation."""
    for turn in range(ranks.largest(len(batches))):
        yield batches[turn % len(batches)]
