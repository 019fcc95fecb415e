"""The step-level tables: segments.parquet has one row per state, advantages.parquet one per state to train on.

A state is a prompt with the first steps of a solution; an action is a next step. Both are token ids, since log-probs
of a text are those of the tokens that the model drew.
"""

import hashlib
from array import array
from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from common.contract import Constant, Contract, Rule, Unique
from common.grading import OUTCOMES

SEGMENTS_COMMAND = "python cli.py segments"
ADVANTAGES_COMMAND = "python cli.py advantages"

_TOKEN_IDS = pa.list_(pa.field("item", pa.int32(), nullable=False))
_NUMBERS = pa.list_(pa.float64())

_STATE = [
    pa.field("state_id", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("answer", pa.string(), nullable=False),
    pa.field("prompt_token_hash", pa.string(), nullable=False),
    pa.field("prefix", pa.string(), nullable=False),
    pa.field("prefix_token_ids", _TOKEN_IDS, nullable=False),
    pa.field("step", pa.int32(), nullable=False),
]
"""`prefix` is the text of the first `step` steps; before the first one it is empty."""

_ACTIONS = [
    pa.field("action_texts", pa.list_(pa.string()), nullable=False),
    pa.field("action_token_ids", pa.list_(_TOKEN_IDS), nullable=False),
    pa.field("action_counts", pa.list_(pa.int32()), nullable=False),
    pa.field("action_ends", pa.list_(pa.bool_()), nullable=False),
    pa.field("action_values", _NUMBERS, nullable=False),
    pa.field("action_samples", pa.list_(pa.int32()), nullable=False),
]
"""The different next steps of a state: their texts, tokens, and how many of the state's completions begin with each.

`action_ends`: whether nothing follows, since the step ends the completion. `action_values` is the mean reward of the
`action_samples` completions that go through state and action: those of the state that begin with it, and those of the
state that it leads to, if that is in the table too.
"""

SEGMENTS = pa.schema(
    [
        *_STATE,
        pa.field("solutions", pa.list_(pa.int32()), nullable=False),
        pa.field("is_terminal", pa.bool_(), nullable=False),
        pa.field("num_completions", pa.int32(), nullable=False),
        pa.field("rewards", _NUMBERS, nullable=False),
        pa.field("outcomes", pa.list_(pa.string()), nullable=False),
        pa.field("completion_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("value_se", pa.float64(), nullable=False),
        *_ACTIONS,
    ]
)
"""`solutions` are the sample_index of the chosen solutions that go through the state.

`completion_tokens` are those after the prefix. A terminal state is a whole solution: its only reward is the solution's,
after which no token comes. `value` is the mean reward of the completions
that could be judged, `value_se` its standard error.
"""

ADVANTAGES = pa.schema(
    [
        *_STATE,
        *_ACTIONS,
        pa.field("critic_values", _NUMBERS),
        pa.field("values_from", pa.string(), nullable=False),
        pa.field("values", _NUMBERS, nullable=False),
        pa.field("standard_errors", _NUMBERS, nullable=False),
        pa.field("advantages", _NUMBERS, nullable=False),
        pa.field("gap", pa.float64(), nullable=False),
        pa.field("keep", pa.bool_(), nullable=False),
        pa.field("dropped_by", pa.string()),
    ]
)
"""`values` are Q(s, a) of each action, from `critic_values` or the Monte-Carlo `action_values`, as `values_from` says.

The value of an action that ends the solution is its reward, whatever `values_from` says. `standard_errors` are those of
the Monte-Carlo values. `advantages` are the values less their mean over the state's completions (Eq. 3.7); `gap` is
the largest less the smallest of them. Training uses the states that `keep`.
"""

_TOLERANCE = 1e-9


def _as_many(columns: Sequence[str]) -> dict[str, Rule]:
    first, *others = columns
    return {
        f"{name} has one entry per action": pl.col(name).list.len() == pl.col(first).list.len()
        for name in others
    }


_OF_STATES: dict[str, Rule] = {
    "a state appears once": Unique(["state_id"]),
    "step counts from 0": pl.col("step") >= 0,
    "only the prompt itself has no prefix": (pl.col("step") == 0)
    == (pl.col("prefix_token_ids").list.len() == 0),
    **_as_many([field.name for field in _ACTIONS]),
    "a state's actions differ": pl.col("action_token_ids").list.n_unique()
    == pl.col("action_token_ids").list.len(),
    "action_counts are positive": pl.col("action_counts").list.eval(pl.element() >= 1).list.all(),
    "action_values are between 0 and 1": (
        pl.col("action_values")
        .list.eval(pl.element().is_between(-_TOLERANCE, 1 + _TOLERANCE).fill_null(False))
        .list.all()
    ),
}

SEGMENTS_TABLE = Contract(
    schema=SEGMENTS,
    invariants={
        **_OF_STATES,
        "num_completions counts the rewards": pl.col("rewards").list.len() == pl.col("num_completions"),
        "num_completions counts the outcomes": pl.col("outcomes").list.len() == pl.col("num_completions"),
        "num_completions counts the lengths": (
            pl.col("completion_tokens").list.len() == pl.col("num_completions")
        ),
        "there is a completion": pl.col("num_completions") >= 1,
        "outcomes are known": (
            pl.col("outcomes").list.eval(pl.element().is_in(OUTCOMES).fill_null(False)).list.all()
        ),
        "rewards are between 0 and 1": (
            pl.col("rewards").list.eval(pl.element().is_between(0, 1).fill_null(False)).list.all()
        ),
        "value is between 0 and 1": pl.col("value").is_between(0, 1),
        "value_se is not negative": pl.col("value_se") >= 0,
        "a terminal state has no action": ~pl.col("is_terminal") | (pl.col("action_texts").list.len() == 0),
    },
    version=1,
    migrations={},
    remedy=SEGMENTS_COMMAND,
)

ADVANTAGES_TABLE = Contract(
    schema=ADVANTAGES,
    invariants={
        **_OF_STATES,
        **_as_many(["action_texts", "values", "standard_errors", "advantages"]),
        "critic_values are missing or one per action": pl.col("critic_values").is_null()
        | (pl.col("critic_values").list.len() == pl.col("values").list.len()),
        "values_from is critic or monte_carlo": pl.col("values_from").is_in(["critic", "monte_carlo"]),
        "values_from is the same for every state": Constant("values_from"),
        "values are finite": pl.col("values").list.eval(pl.element().is_finite().fill_null(False)).list.all(),
        "advantages are finite": (
            pl.col("advantages").list.eval(pl.element().is_finite().fill_null(False)).list.all()
        ),
        "gap is the range of the advantages": (
            pl.col("gap") - (pl.col("advantages").list.max() - pl.col("advantages").list.min())
        ).abs()
        < _TOLERANCE,
        "no rule dropped a state that is kept": ~pl.col("keep") | pl.col("dropped_by").is_null(),
    },
    version=1,
    migrations={},
    remedy=ADVANTAGES_COMMAND,
)


def state_id(prompt_id: str, prefix: Sequence[int]) -> str:
    """A content hash of a prompt and the tokens of the first steps."""
    content = prompt_id.encode() + array("i", prefix).tobytes()
    return hashlib.sha256(content).hexdigest()[:24]


def standard_error(total: float, count: int) -> float:
    """The standard error of a mean of `count` rewards between 0 and 1 that add up to `total`.

    It is the standard deviation of the Beta posterior under Jeffreys' prior, which is not 0 if all rewards are equal.
    For rewards between 0 and 1 it is an upper bound.
    """
    a, b = total + 0.5, count - total + 0.5
    return float((a * b / ((a + b) ** 2 * (a + b + 1))) ** 0.5)
