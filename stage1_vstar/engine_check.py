"""Check that the engine samples from the model in the folder: compare its log-probs with a plain forward pass."""

from collections.abc import Sequence
from pathlib import Path

from common.config import RunConfig, SamplingParams
from common.engines import RolloutEngine
from common.parity import COMPLETIONS, TOKENS, Gap, engine_logprobs, plain_logprobs, refuse_gap
from common.provenance import Allowance
from common.rollout import Prompt, SampleRequest
from common.seeds import derive_seed
from common.store import SampleStore
from common.terminal.console import Terminal

SMALL_MODEL = 1_000_000_000
"""Up to this many parameters the check loads a second copy of the model into main memory by default."""


def check_engine(
    config: RunConfig,
    folder: Path,
    store: SampleStore,
    allowance: Allowance,
    console: Terminal,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
) -> None:
    """Raise UserError unless engine and forward pass agree on a few completions; an accepted gap is recorded."""
    sampling = SamplingParams(
        temperature=config.sampling.temperature,
        max_completion_tokens=min(TOKENS, config.sampling.max_completion_tokens),
    )
    chosen = prompts[:COMPLETIONS]
    requests = [
        SampleRequest(
            key=number,
            prompt_token_ids=tuple(prompt.token_ids),
            seed=derive_seed(config.seed, "check", prompt.id),
            with_logprobs=True,
        )
        for number, prompt in enumerate(chosen)
    ]
    found = {each.key: each for each in engine.generate(requests, sampling)}
    completions = [found[number] for number in range(len(chosen))]
    gap = Gap.between(
        [engine_logprobs(each) for each in completions],
        plain_logprobs(
            folder,
            config.model.dtype,
            config.sampling.temperature or 1.0,
            [
                (tuple(prompt.token_ids), each.token_ids)
                for prompt, each in zip(chosen, completions, strict=True)
            ],
        ),
    )
    said = refuse_gap(
        gap,
        f"the engine ({config.engine.backend}) and a plain forward pass by transformers",
        config,
        allowance=allowance,
        remedy="no sample has been drawn",
    )
    store.provenance = store.provenance.accepting(allowance)
    console.print(said)
