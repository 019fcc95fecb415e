"""The seam between the stages and whatever samples completions for them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.config import RunConfig, SamplingParams
from common.data.rendering import PromptRenderer
from common.packages import refuse_missing
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


class EngineBuilder(Protocol):
    """What `build_engine` is. Jobs take it as an argument, for whoever has another engine, such as a test."""

    def __call__(
        self, config: RunConfig, folder: Path, renderer: PromptRenderer, *, beside_trainer: bool
    ) -> RolloutEngine:
        """Load the model in `folder`."""
        ...


def build_engine(
    config: RunConfig, folder: Path, renderer: PromptRenderer, *, beside_trainer: bool
) -> RolloutEngine:
    """Load the model in `folder` into the configured engine.

    `beside_trainer` says that the device and the process are shared with a training job.
    """
    if config.engine.backend == "vllm":
        refuse_missing("vllm", 'engine.backend is "vllm"', 'make setup, or set it to "transformers"')
        from common.engines.vllm_engine import VllmEngine

        return VllmEngine(config, folder, renderer, beside_trainer=beside_trainer)
    from common.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config, folder, renderer)
