"""The states of segments.parquet, joined to trajectories: a state's tokens are the beginning of its solution's.

One forward pass over a trajectory gives the values of all its states. A state that several solutions share belongs to
one trajectory only, so it is trained on once.
"""

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.config import DataConfig
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.grading import UNJUDGED
from common.provenance import STRICT, Allowance
from common.seeds import derive_seed
from common.segments.files import SEGMENTS_TABLE
from common.table_origin import PROMPT, prompt_rows, prompts_of

COLUMNS = (
    *("state_id", *PROMPT, "prefix_token_ids", "solutions"),
    *("is_terminal", "num_completions", "rewards", "outcomes", "value"),
)
KEPT = ("prompt_id", "solutions", "is_terminal", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A prompt with a solution, and the states along it."""

    token_ids: Sequence[int]
    """Of the prompt and the solution."""
    ends: tuple[int, ...]
    """The number of tokens of each state, ascending."""
    states: tuple[int, ...]
    """The number of each state: its row in the table."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticData:
    """The states of a table, and the trajectories through them."""

    table: pl.DataFrame
    """One row per state: the columns KEPT, the number of `tokens` after the prompt, and `noise`.

    `noise` is the variance of the value as a mean of so many completions: 0 for a terminal state, whose reward is
    exact, and missing where fewer than two completions were judged.
    """
    training: Sequence[Trajectory]
    held_out: Sequence[Trajectory]

    def states(self, trajectories: Iterable[Trajectory]) -> pl.DataFrame:
        """The rows of the states of these trajectories, with their number as `state`."""
        numbers = sorted(number for each in trajectories for number in each.states)
        return self.table.with_row_index("state")[numbers]

    def some_training(self, prompts: int, seed: int) -> list[Trajectory]:
        """The training trajectories of so many prompts, chosen at random, or of all if there are no more."""
        prompt_of = self.table["prompt_id"].to_list()
        ids = sorted({prompt_of[each.states[0]] for each in self.training})
        chosen = set(random.Random(derive_seed(seed, "critic threshold")).sample(ids, min(prompts, len(ids))))
        return [each for each in self.training if prompt_of[each.states[0]] in chosen]


def is_held_out(prompt_id: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out share: a function of its id alone."""
    digest = hashlib.sha256(f"critic {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_critic_data(
    path: Path, data: DataConfig, renderer: PromptRenderer, held_out: float, allowance: Allowance = STRICT
) -> CriticData:
    """Read segments.parquet and join its states to trajectories; `data` is [data].

    Raises UserError for a table that breaks its contract, if prompts now have other tokens, or if no prompt is left to
    train on.
    """
    table = pl.concat(SEGMENTS_TABLE.scan(path, COLUMNS))
    prompts = prompts_of(prompt_rows(table), data, renderer, path, allowance)
    token_ids = {prompt.id: prompt.token_ids for prompt in prompts}
    table = table.filter(pl.col("prompt_id").is_in(list(token_ids))).with_row_index("state")
    parts: dict[bool, list[Trajectory]] = {False: [], True: []}
    for (prompt_id,), rows in table.group_by("prompt_id", maintain_order=True):
        states = dict(zip(rows["state"], map(tuple, rows["prefix_token_ids"].to_list()), strict=True))
        parts[is_held_out(str(prompt_id), held_out)].extend(trajectories(token_ids[str(prompt_id)], states))
    if not parts[False]:
        raise UserError(
            f"{path} has no prompt to train on: critic.held_out = {held_out:g} holds all {len(token_ids)} out; lower it"
        )
    kept = table.select(*KEPT, tokens=pl.col("prefix_token_ids").list.len(), noise=_noise(table))
    return CriticData(table=kept, training=parts[False], held_out=parts[True])


def trajectories(
    prompt_token_ids: Sequence[int], states: Mapping[int, tuple[int, ...]]
) -> Iterator[Trajectory]:
    """The fewest sequences of tokens that every state of a prompt is the beginning of, each state in one of them.

    `states` are the tokens after the prompt, by the state's number. In lexicographic order a state that is the
    beginning of any other is the beginning of the next one.
    """
    prompt = array("i", prompt_token_ids)
    pending: list[tuple[tuple[int, ...], int]] = []
    for tokens, number in sorted(((tokens, number) for number, tokens in states.items()), reverse=True):
        if pending and pending[-1][0][: len(tokens)] != tokens:
            yield _joined(prompt, pending)
            pending = []
        pending.append((tokens, number))
    if pending:
        yield _joined(prompt, pending)


def _joined(prompt: "array[int]", longest_first: Sequence[tuple[tuple[int, ...], int]]) -> Trajectory:
    along = longest_first[::-1]
    return Trajectory(
        token_ids=prompt + array("i", along[-1][0]),
        ends=tuple(len(prompt) + len(tokens) for tokens, _ in along),
        states=tuple(number for _, number in along),
    )


def _noise(table: pl.DataFrame) -> pl.Series:
    """The unbiased estimate s²/n of the variance of each state's mean reward."""
    unjudged = [outcome.value for outcome in UNJUDGED]
    noise: list[float | None] = []
    for rewards, outcomes, is_terminal in table.select("rewards", "outcomes", "is_terminal").iter_rows():
        judged = [
            reward for reward, outcome in zip(rewards, outcomes, strict=True) if outcome not in unjudged
        ]
        if is_terminal:
            noise.append(0.0)
        else:
            noise.append(float(np.var(judged, ddof=1)) / len(judged) if len(judged) > 1 else None)
    return pl.Series(noise, dtype=pl.Float64)
