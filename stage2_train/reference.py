"""The reference policy π_ref that the regression measures against: ln π_ref of completions, all of them at a visit.

It is a second model, in the device's memory or between visits in the host's; or, under LoRA, the policy without its
adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stage2_train.batch import TokenBatch
from stage2_train.config import Config
from stage2_train.logprobs import load_model, token_logprobs
from stage2_train.policy import Policy, Ranks


class Reference(Protocol):
    """π_ref."""

    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """ln π_ref(y_t | x, y_<t) of each batch's completion tokens, shape (K,) each, float32.

        Every rank has to call it, with one batch at least; they may differ in their number of them.
        """


def build_reference(folder: Path, config: Config, policy: Policy, ranks: Ranks) -> Reference:
    """The reference policy that a config asks for; its weights are those in `folder`."""
    if config.train.lora is not None:
        return PolicyWithoutAdapter(policy, ranks)
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
    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """As Reference.logprobs."""
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


class PolicyWithoutAdapter:
    """The policy's own frozen weights, partitioned as they are."""

    def __init__(self, policy: Policy, ranks: Ranks) -> None:
        self._policy = policy
        self._ranks = ranks

    @torch.no_grad()
    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """As Reference.logprobs."""
        # Under ZeRO-3 a forward pass is a collective operation: who has fewer batches repeats some.
        rounds = self._ranks.largest(len(batches))
        with self._policy.without_adapter() as engine:
            found = [
                token_logprobs(engine, batches[turn % len(batches)]).logprobs_K for turn in range(rounds)
            ]
        return found[: len(batches)]
