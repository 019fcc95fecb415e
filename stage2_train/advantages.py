"""Training's data for objectives with known advantages: the states that advantages.parquet keeps, and their actions."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.model.files import model_numbers
from common.provenance import Allowance
from common.rollout import Completion, Prompt, Rollout
from common.segments.files import ADVANTAGES_TABLE
from common.table_origin import prompt_rows, prompts_of, refuse_other_steps
from common.value import Counts
from stage2_train.config import Config
from stage2_train.objectives.protocol import LearnsOffline
from stage2_train.sources.batches import Group

_STATE = ("state_id", "prompt_id", "prefix_token_ids", "action_token_ids", "action_counts", "advantages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """The states to train on, as units that batches count: a state with all of its actions, or a single pair."""

    file: Path
    rows: pl.DataFrame
    """One row per state, with the columns that training reads."""
    prompts: Mapping[str, Prompt]
    """By prompt id."""
    state_wise: bool
    unique: bool
    """Whether an action is trained on once, not as often as it was drawn."""
    ends_S: Counts
    """The number of pairs up to the end of each state."""
    values_from: str
    chosen_by: str
    """The rules by which states were chosen, for people."""
    dropped: Mapping[str, int]
    """How many states each rule dropped."""
    accepted_mismatches: tuple[str, ...] = ()
    """Differences between the table's identity and this run's that the user allowed."""

    def __len__(self) -> int:
        """The number of units."""
        return self.rows.height if self.state_wise else self.pairs

    @property
    def unit(self) -> str:
        """What a batch counts."""
        return "states" if self.state_wise else "(state, action) pairs"

    @property
    def pairs(self) -> int:
        """The (state, action) pairs, each as often as it is trained on."""
        return int(self.ends_S[-1])

    def group(self, unit: int, visit: int = 0) -> Group:
        """The pairs of a unit, the same at each visit.

        A pair's prompt is the state, its completion the action, without its text.
        """
        if self.state_wise:
            return self._pairs_of(unit)
        state = int(np.searchsorted(self.ends_S, unit, side="right"))
        return [self._pairs_of(state)[unit - int(self.ends_S[state])]]

    def _pairs_of(self, state: int) -> Group:
        row = self.rows.row(state, named=True)
        prompt = self.prompts[row["prompt_id"]]
        token_ids = prompt.token_ids + array(prompt.token_ids.typecode, row["prefix_token_ids"])
        described = Prompt(
            id=row["state_id"],
            text=prompt.text,
            answer=prompt.answer,
            token_ids=token_ids,
            token_hash=prompt.token_hash,
        )
        actions = zip(
            *(row[name] for name in ("action_token_ids", "advantages", "action_counts")), strict=True
        )
        return [
            Rollout(
                prompt=described,
                completion=Completion(key=None, token_ids=tuple(tokens), text="", truncated=False),
                advantage=advantage,
            )
            for tokens, advantage, count in actions
            for _ in range(1 if self.unique else count)
        ]

    def digest(self) -> str:
        """A hash of everything that training reads of the table: the pairs in their order, and their advantages."""
        found = hashlib.sha256("\n".join(self.rows["state_id"]).encode())
        tokens = self.rows["action_token_ids"].explode()
        for column in (self.ends_S, tokens.list.len(), tokens.explode(), self.rows["advantages"].explode()):
            found.update(np.ascontiguousarray(column).tobytes())
        return found.hexdigest()[:32]

    def lines(self) -> list[str]:
        """The data, for people."""
        values = {"critic": "of the critic", "monte_carlo": "by Monte Carlo"}[self.values_from]
        lines = [
            f"{self.rows.height:,} states of {len(self.prompts):,} prompts with {self.pairs:,} (state, action) pairs, "
            f"values {values}, {self.chosen_by}"
        ]
        if self.dropped:
            rules = "; ".join(f"{rule}: {count:,}" for rule, count in self.dropped.items())
            lines.append(f"{sum(self.dropped.values()):,} other states were dropped by {rules}")
        return lines


def read_advantages(
    config: Config,
    renderer: PromptRenderer,
    identity: dict[str, Any],
    file: Path,
    allowance: Allowance,
    folder: Path,
) -> Advantages:
    """The states that a table keeps, for the model in `folder`.

    Raises UserError unless it was made as this run's config says and the model can read the states.
    """
    objective = config.train.objective
    assert isinstance(objective, LearnsOffline), "who reads advantages learns offline"
    provenance = ADVANTAGES_TABLE.provenance(file)
    refuse_other_steps(identity, provenance, file, allowance)
    dropped: Counter[str] = Counter()
    values_from, states, theirs = "", [], []
    for part in ADVANTAGES_TABLE.scan(file):
        dropped.update(dict(part["dropped_by"].drop_nulls().value_counts(sort=True).iter_rows()))
        values_from = part["values_from"][0]
        kept = part.filter("keep")
        states.append(kept.select(_STATE))
        theirs.append(prompt_rows(kept))
    rows, known = pl.concat(states), prompt_rows(pl.concat(theirs))
    if rows.is_empty():
        raise UserError(
            f"{file}: no state is left to train on; run `python cli.py filter --advantages {file}` with a smaller "
            "--min-gap"
        )
    found = prompts_of(known, config.data, renderer, file, allowance)
    prompts = {prompt.id: prompt for prompt in found}
    rows = rows.filter(pl.col("prompt_id").is_in(list(prompts)))
    _refuse_unreadable(rows, prompts, file, folder)
    unique, counts = config.advantages.unique, pl.col("action_counts").list
    pairs_S = rows.select(counts.len() if unique else counts.sum()).to_series().cast(pl.Int64)
    return Advantages(
        file=file,
        rows=rows,
        prompts=prompts,
        state_wise=objective.state_wise,
        unique=unique,
        ends_S=pairs_S.to_numpy().cumsum(),
        values_from=values_from,
        chosen_by=_chosen_by(provenance.context),
        dropped=dropped,
        accepted_mismatches=tuple(allowance.used),
    )


def _chosen_by(context: Mapping[str, Any]) -> str:
    if filters := context.get("filters"):
        return f"after dropping by {', '.join(filters)}"
    return f"gap of at least {context['min_gap']:g}"


def _refuse_unreadable(rows: pl.DataFrame, prompts: Mapping[str, Prompt], file: Path, folder: Path) -> None:
    """Raise UserError if a state or action has unknown token ids, or if both are longer than the model's context."""
    numbers = model_numbers(folder)
    tokens = pl.concat([rows["prefix_token_ids"].explode(), rows["action_token_ids"].explode().explode()])
    vocabulary, largest = numbers.get("vocab_size"), tokens.max()
    if vocabulary is not None and isinstance(largest, int) and largest >= vocabulary:
        raise UserError(
            f"{file}: a step has the token id {largest}, but the model in {folder} has {vocabulary} of them; the table "
            "belongs to another model"
        )
    own = (
        pl.col("prefix_token_ids").list.len()
        + pl.col("action_token_ids").list.eval(pl.element().list.len()).list.max()
    )
    lengths = rows.select("prompt_id", own.alias("own")).group_by("prompt_id").agg(pl.col("own").max())
    longest = max(len(prompts[prompt_id].token_ids) + length for prompt_id, length in lengths.iter_rows())
    context = numbers.get("max_position_embeddings")
    if context is not None and longest > context:
        raise UserError(
            f"{file}: the longest state with its next step has {longest} tokens, more than the model's context of "
            f"{context}; leave such states out with `python cli.py filter --where`"
        )
