"""Small tables of states and of advantages, without a model's samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from common.contract import polars_schema
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.grading import fingerprint
from common.model.files import model_identity
from common.provenance import Provenance, sampling_identity
from common.segments.advantages import dropped_by, with_advantages
from common.segments.files import (
    ADVANTAGES,
    ADVANTAGES_TABLE,
    SEGMENTS,
    SEGMENTS_TABLE,
    standard_error,
    state_id,
)
from stage1_vstar.table import with_dropped
from stage2_train.config import Config

Action = tuple[tuple[int, ...], int, bool, float, int]
"""Tokens, how many of the state's completions begin with it, whether it ends the solution, mean reward, samples."""

PROMPT: dict[str, Any] = {
    "prompt_id": "p",
    "prompt": "question",
    "answer": "1",
    "prompt_token_hash": "hash",
}


def state(prefix: Sequence[int], actions: Sequence[Action], **prompt: Any) -> dict[str, Any]:
    """A row of segments.parquet; without actions it is terminal."""
    prompt = PROMPT | prompt
    total = sum(count * value for _, count, _, value, _ in actions)
    drawn = sum(count for _, count, *_ in actions) or 1
    texts = [" ".join(map(str, tokens)) for tokens, *_ in actions]
    columns = list(zip(*actions, strict=True)) or [()] * 5
    return {
        **prompt,
        "state_id": state_id(prompt["prompt_id"], prefix),
        "prefix": " ".join(map(str, prefix)),
        "prefix_token_ids": list(prefix),
        "step": len(prefix),
        "solutions": [0],
        "is_terminal": not actions,
        "num_completions": drawn,
        "rewards": [min(1.0, total / drawn)] * drawn,
        "outcomes": ["wrong"] * drawn,
        "completion_tokens": [1] * drawn,
        "value": min(1.0, total / drawn),
        "value_se": standard_error(total, drawn),
        "action_texts": texts,
        **{
            name: [list(value) if isinstance(value, tuple) else value for value in column]
            for name, column in zip(
                ("action_token_ids", "action_counts", "action_ends", "action_values", "action_samples"),
                columns,
                strict=True,
            )
        },
    }


def segments(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a table of states."""
    return pl.DataFrame(list(rows), schema=polars_schema(SEGMENTS))


def write_segments(
    path: Path, rows: Sequence[dict[str, Any]], identity: dict[str, Any], **context: Any
) -> None:
    """Write segments.parquet."""
    provenance = Provenance(identity=identity, context={"model_path": "m", **context})
    SEGMENTS_TABLE.write(segments(rows), provenance, path)


def identity_of(config: Config) -> dict[str, Any]:
    """The identity that a run of this config has."""
    folder = Path(config.model.path)
    renderer = PromptRenderer(folder, config.data)
    return sampling_identity(config, renderer, model_identity(folder), fingerprint(config.grader))


def states_of(config: Config, *, each: int = 2) -> list[dict[str, Any]]:
    """A few states of each of a config's prompts, with two to four actions of one to six tokens."""
    renderer = PromptRenderer(Path(config.model.path), config.data)
    end = renderer.eos_token_ids[0]
    rows = []
    for number, prompt in enumerate(load_prompts(config.data, config, renderer)):
        known = {"prompt_id": prompt.id, "prompt": prompt.text, "answer": prompt.answer}
        for depth in range(each):
            prefix = tuple(10 + (number + place) % 50 for place in range(3 * depth))
            actions: list[Action] = []
            for choice in range(2 + (number + depth) % 3):
                tokens = tuple(
                    20 + choice + (number + place) % 40 for place in range(1 + (choice + depth) % 5)
                )
                ends = choice == 0
                tokens = (*tokens, end) if ends else tokens
                value = float(number % 2) if ends else (choice + depth) / 5
                actions.append((tokens, 1 + choice, ends, value, 4))
            rows.append(state(prefix, actions, **known, prompt_token_hash=prompt.token_hash))
    return rows


def write_advantages(config: Config, path: Path, *, min_gap: float = 0.1, **change: Any) -> pl.DataFrame:
    """advantages.parquet of a config, from Monte-Carlo values; `change` overrides parts of its identity."""
    rows = segments(states_of(config)).with_columns(
        pl.lit(None, polars_schema(ADVANTAGES)["critic_values"]).alias("critic_values")
    )
    found = with_dropped(with_advantages(rows, "monte_carlo"), dropped_by(min_gap)).select(ADVANTAGES.names)
    context = {"values": "monte_carlo", "min_gap": min_gap, "segments": "", "critic": None}
    ADVANTAGES_TABLE.write(found, Provenance(identity=identity_of(config) | change, context=context), path)
    return found
