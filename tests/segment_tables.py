"""A small segments.parquet, made up: solutions of a few steps, and values that follow from their tokens.

Every step is one of WORDS and a line break; a state's value is the share of GOOD among its words, 1/2 at the prompt.
A prompt's first two solutions share their first step.
"""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl

from common.contract import polars_schema
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.provenance import Provenance
from common.rollout import Prompt
from common.segments.files import SEGMENTS, SEGMENTS_TABLE, standard_error, state_id
from stage2_train.config import Config

GOOD = " buys"
WORDS = (GOOD, " has")
COMPLETIONS = 12
SOLUTIONS = 3


def write_segments(config: Config, path: Path, *, steps: int = 3) -> pl.DataFrame:
    """The table of the config's prompts, each with SOLUTIONS solutions of 1 to `steps` steps; returns its rows."""
    renderer = PromptRenderer(Path(config.model.path), config.data)
    rng = random.Random(config.seed)
    rows: list[dict[str, Any]] = []
    for prompt in load_prompts(config.data, config, renderer):
        lengths = [rng.randint(1, steps) for _ in range(SOLUTIONS)]
        words = [[rng.choice(WORDS) for _ in range(length)] for length in lengths]
        words[1][0] = words[0][0]
        rows += _rows(prompt, words, renderer)
    frame = pl.DataFrame(rows, schema=polars_schema(SEGMENTS))
    SEGMENTS_TABLE.write(frame, Provenance(identity={"model": {}}, context={}), path)
    return frame


def value_of(words: tuple[str, ...]) -> float:
    """A multiple of 1/COMPLETIONS for up to three words."""
    return sum(word == GOOD for word in words) / len(words) if words else 0.5


def _rows(prompt: Prompt, solutions: list[list[str]], renderer: PromptRenderer) -> list[dict[str, Any]]:
    through: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, words in enumerate(solutions):
        for step in range(len(words) + 1):
            through[tuple(words[:step])].append(number)
    rows = []
    for state, members in through.items():
        rows.append(_row(prompt, state, members, solutions, renderer))
        if finished := [number for number in members if tuple(solutions[number]) == state]:
            rows.append(_row(prompt, state, finished, [], renderer))
    return rows


def _row(
    prompt: Prompt,
    words: tuple[str, ...],
    members: list[int],
    solutions: list[list[str]],
    renderer: PromptRenderer,
) -> dict[str, Any]:
    """The row of a state; of a whole solution, which ends with an EOS, if there are no `solutions` to go on with."""
    is_terminal = not solutions
    text = "".join(f"{word}\n" for word in words)
    end = renderer.eos_token_ids[:1] if is_terminal else ()
    tokens = [*step_tokens(words, renderer), *end]
    value = float(value_of(words) > 0.5) if is_terminal else value_of(words)
    rewards = [value] if is_terminal else [float(n < round(value * COMPLETIONS)) for n in range(COMPLETIONS)]
    going_on = [solutions[number] for number in members if solutions and len(solutions[number]) > len(words)]
    longer = {each[len(words)] for each in going_on}
    actions = [(word, step_tokens((word,), renderer)) for word in sorted(longer)]
    return {
        "state_id": state_id(prompt.id, tokens),
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "prompt_token_hash": prompt.token_hash,
        "prefix": text,
        "prefix_token_ids": tokens,
        "step": len(words) + is_terminal,
        "solutions": members,
        "is_terminal": is_terminal,
        "num_completions": len(rewards),
        "rewards": rewards,
        "outcomes": ["correct" if reward else "wrong" for reward in rewards],
        "completion_tokens": [1] * len(rewards),
        "value": sum(rewards) / len(rewards),
        "value_se": standard_error(sum(rewards), len(rewards)),
        "action_texts": [f"{word}\n" for word, _ in actions],
        "action_token_ids": [ids for _, ids in actions],
        "action_counts": [1 for _ in actions],
        "action_ends": [False for _ in actions],
        "action_values": [0.5 for _ in actions],
        "action_samples": [1 for _ in actions],
    }


def step_tokens(words: tuple[str, ...], renderer: PromptRenderer) -> list[int]:
    """The tokens of some steps, one after the other."""
    return [token for word in words for token in renderer.tokenizer.encode(f"{word}\n")]
