"""The interface of the engines that sample completions, and of the functions that build them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.config import RunConfig, SamplingParams
from common.data.rendering import PromptRenderer
from common.rollout import Completion, SampleRequest

if TYPE_CHECKING:
    import torch


class RolloutEngine(Protocol):
    """Samples completions from a model whose weights can be replaced in place."""

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Sample one completion per request; yields them in the order in which they end."""
        ...

    def load_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
        """Replace the weights; the names are those of the Hugging Face checkpoint."""
        ...

    def sleep(self) -> None:
        """Free memory until the next `load_weights`; the engine cannot sample before that."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The shape of an adapter, W + (alpha / rank) B A in each adapted layer."""

    rank: int
    alpha: int


class EngineBuilder(Protocol):
    """The type of `build_engine`. Jobs take it as an argument, so that a test can pass another engine."""

    def __call__(
        self,
        config: RunConfig,
        folder: Path,
        renderer: PromptRenderer,
        *,
        beside_trainer: bool,
        adapter: LowRank | None = None,
    ) -> RolloutEngine:
        """Load the model in `folder`.

        With an adapter, `load_weights` takes the tensors of one of this shape, named as peft does, and leaves the
        model's weights as they are.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSource:
    """Where the engines of a job run."""

    build: EngineBuilder
    sized: Callable[[RunConfig, Path, int], RunConfig]
    """The config with a number of engines, for a model's folder and the number of samples to draw."""

    def built_by(self, build: EngineBuilder) -> "EngineSource":
        """The same with other engines."""
        return replace(self, build=build)
