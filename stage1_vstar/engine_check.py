"""Check that the engine samples from the model in the folder: compare its log-probs with a plain forward pass."""

from collections.abc import Sequence
from pathlib import Path

from common.config import RunConfig
from common.engines import RolloutEngine
from common.parity import Gap, draw_compared, engine_logprobs, plain_logprobs, refuse_gap
from common.provenance import Allowance
from common.rollout import Prompt
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
    compared = draw_compared(engine, prompts, config, temperature=config.sampling.temperature)
    gap = Gap.between(
        [engine_logprobs(each) for _, each in compared],
        plain_logprobs(
            folder,
            config.model.dtype,
            config.sampling.temperature or 1.0,
            [(tuple(prompt.token_ids), each.token_ids) for prompt, each in compared],
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
