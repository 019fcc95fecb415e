"""Stage 2 as `cli.py train` runs it, in a process that reports the end of each iteration, as TRL's run does.

python -m benchmarks.peers.our_run JOB REPORT. A job may force completions to the lengths of their prompts.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli  # noqa: F401  the thread settings of the command line
from benchmarks.peers.job import JsonFile, Report
from benchmarks.processes import resident_mib
from common.config import RunConfig, SamplingParams
from common.data.rendering import PromptRenderer
from common.engines import EngineBuilder, LowRank, build_engine
from common.engines.endings import Endings
from common.engines.vllm_engine import VllmEngine
from common.parity import PARITY
from common.rollout import Completion, SampleRequest
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.run import run_stage2
from stage2_train.watchers import Turn

if TYPE_CHECKING:
    import vllm


@dataclass(frozen=True, slots=True, kw_only=True)
class OurJob(JsonFile):
    """A training run of ours."""

    config: dict[str, Any]
    vstar: str | None
    """None for an objective without stage 1."""
    completion_lengths: dict[str, int] | None = None
    """Completion lengths by the prompt's text, in place of the model's own end."""


class ForcedEngine(VllmEngine):
    """vLLM that ends each completion exactly at its given length; the last token becomes the end token."""

    def __init__(
        self, config: RunConfig, folder: Path, renderer: PromptRenderer, lengths: Mapping[str, int]
    ) -> None:
        super().__init__(config, folder, renderer, beside_trainer=True)
        self._lengths = {renderer.render(text): length for text, length in lengths.items()}
        self._end = renderer.eos_token_ids[0]

    def _sampling_params(self, request: SampleRequest, sampling: SamplingParams) -> "vllm.SamplingParams":
        parameters = super()._sampling_params(request, sampling)
        parameters.min_tokens = parameters.max_tokens = self._lengths[request.prompt_token_ids]
        return parameters

    def _completion(
        self, request: SampleRequest, output: "vllm.CompletionOutput", endings: Endings
    ) -> Completion:
        length = SamplingParams(max_completion_tokens=self._lengths[request.prompt_token_ids])
        return super()._completion(request, output, Endings(self._renderer, length))

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Like VllmEngine.generate, without log-probs."""
        without_logprobs = (replace(request, with_logprobs=False) for request in requests)
        for completion in super().generate(without_logprobs, sampling):
            token_ids = (*completion.token_ids[:-1], self._end)
            yield replace(completion, token_ids=token_ids, truncated=False)


@dataclass(slots=True)
class Clock:
    """A watcher that records the end of each iteration, before the other watchers."""

    ends: list[float] = field(default_factory=list)
    """The first is that of iteration 0, when training is about to begin."""
    rollout_seconds: float = 0.0
    completion_tokens: list[int] = field(default_factory=list)

    def after(self, turn: Turn) -> None:
        """Note the time."""
        self.ends.append(time.time())
        self.rollout_seconds += turn.metrics.get("time/rollout", 0.0)
        self.completion_tokens += [len(rollout.completion.token_ids) for rollout in turn.rollouts]


def main() -> None:
    from vllm import LLM  # noqa: F401  its memory is the libraries', not ours

    imported, imports_mib = time.time(), resident_mib()
    job = OurJob.read(Path(sys.argv[1]))
    config, lengths, clock = Config.model_validate(job.config), job.completion_lengths, Clock()

    def build_forced(
        config: RunConfig,
        folder: Path,
        renderer: PromptRenderer,
        *,
        beside_trainer: bool,
        adapter: LowRank | None = None,
    ) -> VllmEngine:
        assert lengths is not None
        assert beside_trainer
        return ForcedEngine(config, folder, renderer, lengths)

    builder: EngineBuilder = build_forced if lengths else build_engine
    allowed = [PARITY] if lengths else []  # a forced end has no log-prob of the model's
    run_stage2(
        config,
        Terminal(),
        None if job.vstar is None else Path(job.vstar),
        allowed,
        builder,
        observers=[clock],
    )
    if lengths:
        expected, found = sorted(lengths.values()), sorted(clock.completion_tokens)
        assert found == expected, f"completions of {found} tokens, not of {expected}"
    began, *ends = clock.ends
    Report(
        imported=imported,
        began=began,
        updates=ends,
        generate_seconds=clock.rollout_seconds,
        imports_mib=imports_mib,
    ).write(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
