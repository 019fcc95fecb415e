"""The seam between the stages and whatever samples completions for them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.config import Config, SamplingParams
from common.prompts import PromptRenderer
from common.rollout import Completion, SampleRequest

if TYPE_CHECKING:
    import torch


class RolloutEngine(Protocol):
    """Samples completions from a model whose weights can be replaced in place."""

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Sample one completion a request, in the order in which they end."""
        ...

    def load_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
        """Take over new weights, named as in the Hugging Face checkpoint."""
        ...

    def sleep(self) -> None:
        """Free what memory the engine can do without until the next `load_weights`, before which it cannot sample."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


def build_engine(
    config: Config, folder: Path, renderer: PromptRenderer, *, beside_trainer: bool
) -> RolloutEngine:
    """Load the model in `folder` into the configured engine.

    `beside_trainer` says that the device and the process are shared with a training job.
    """
    if config.engine.backend == "vllm":
        from common.engine_vllm import VllmEngine

        return VllmEngine(config, folder, renderer, beside_trainer=beside_trainer)
    from common.engine_transformers import TransformersEngine

    return TransformersEngine(config, folder, renderer)


def request_seed(seed: int, *parts: str | int) -> int:
    """A seed for one sample: the same for the same run seed and address, whatever else is in the batch."""
    import hashlib

    text = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
