"""Small tables of states and of advantages, without a model's samples.

`states_of` makes up tokens and values. `write_solutions` has solutions of words from WORDS, each a step with a line
break, whose values a critic can learn: the share of GOOD among a state's words, 1/2 at the prompt.
"""

import random
from collections import defaultdict
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
from common.rollout import Prompt
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

GOOD = " buys"
WORDS = (GOOD, " has")
COMPLETIONS = 12
SOLUTIONS = 3

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


def write_solutions(config: Config, path: Path, *, steps: int = 3) -> pl.DataFrame:
    """segments.parquet of the config's prompts, each with SOLUTIONS solutions of 1 to `steps` steps; returns its rows.

    A prompt's first two solutions share their first step.
    """
    renderer = PromptRenderer(Path(config.model.path), config.data)
    rng = random.Random(config.seed)
    rows: list[dict[str, Any]] = []
    for prompt in load_prompts(config.data, config, renderer):
        lengths = [rng.randint(1, steps) for _ in range(SOLUTIONS)]
        words = [[rng.choice(WORDS) for _ in range(length)] for length in lengths]
        words[1][0] = words[0][0]
        rows += _of_prompt(prompt, words, renderer)
    write_segments(path, rows, identity_of(config))
    return segments(rows)


def value_of(words: tuple[str, ...]) -> float:
    """A multiple of 1/COMPLETIONS for up to three words."""
    return sum(word == GOOD for word in words) / len(words) if words else 0.5


def _of_prompt(prompt: Prompt, solutions: list[list[str]], renderer: PromptRenderer) -> list[dict[str, Any]]:
    through: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, words in enumerate(solutions):
        for step in range(len(words) + 1):
            through[tuple(words[:step])].append(number)
    rows = []
    for state, members in through.items():
        rows.append(_solutions_state(prompt, state, members, solutions, renderer))
        if finished := [number for number in members if tuple(solutions[number]) == state]:
            rows.append(_solutions_state(prompt, state, finished, [], renderer))
    return rows


def _solutions_state(
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
