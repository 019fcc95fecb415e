"""Stage 2 as `cli.py train` runs it, but that each completion ends at its prompt's length.

python -m benchmarks.peers.forced_run FOLDER IMPORTS: the workload of vocabulary.py is in FOLDER; the resident memory
of the libraries goes to IMPORTS, everything else to the run's artifacts.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import cli  # noqa: F401  the thread settings of the command line
import stage2_train.run
from benchmarks.peers.processes import resident_mib
from common.config import SamplingParams
from common.data.prompts import PromptRenderer
from common.engines.vllm_engine import VllmEngine
from common.rollout import Completion, SampleRequest
from stage2_train.config import Config


class ForcedEngine(VllmEngine):
    """vLLM that ends a completion at its length, neither before nor after; its last token becomes the end token."""

    def __init__(
        self, lengths: dict[tuple[int, ...], int], config: Config, folder: Path, renderer: PromptRenderer
    ) -> None:
        super().__init__(config, folder, renderer, beside_trainer=True)
        assert self.llm is not None
        engine: Any = self.llm.llm_engine
        add_request = engine.add_request

        def add_forced(name: str, prompt: Any, parameters: Any) -> None:
            length = lengths[tuple(prompt["prompt_token_ids"])]
            parameters.min_tokens = parameters.max_tokens = length
            add_request(name, prompt, parameters)

        engine.add_request = add_forced
        self._end = renderer.eos_token_ids[0]

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        without_logprobs = (replace(request, with_logprobs=False) for request in requests)
        for completion in super().generate(without_logprobs, sampling):
            token_ids = (*completion.token_ids[:-1], self._end)
            yield replace(completion, token_ids=token_ids, truncated=False)


def main() -> None:
    from vllm import LLM  # noqa: F401  its memory is the libraries', not ours

    folder, imports = Path(sys.argv[1]), Path(sys.argv[2])
    imports.write_text(json.dumps(resident_mib()))
    config = Config.model_validate_json((folder / "config.json").read_text())
    by_text: dict[str, int] = json.loads((folder / "lengths.json").read_text())

    def build(config: Config, folder: Path, renderer: PromptRenderer, **_: Any) -> VllmEngine:
        lengths = {renderer.render(text): length for text, length in by_text.items()}
        return ForcedEngine(lengths, config, folder, renderer)

    assert "build_engine" in vars(stage2_train.run)
    vars(stage2_train.run)["build_engine"] = build
    stage2_train.run.run_stage2(config, Console(), folder / config.run / "vstar.parquet")


if __name__ == "__main__":
    main()
