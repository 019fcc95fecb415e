"""Training's data with `train.rollouts = "stage1"`: the samples behind V̂*, with their token ids and rewards."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.errors import UserError
from common.grading import Grade, Outcome
from common.provenance import ACCEPTED, Allowance, Provenance
from common.rollout import Completion, Prompt, Rollout
from common.store import SampleStore
from stage2_train.config import TrainConfig
from stage2_train.sources.batches import Group

_COLUMNS = ("prompt_id", "rewards", "outcomes", "completion_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Stage 1's samples of the prompts to train on: 4 bytes a token in memory, on every rank."""

    rows: pl.DataFrame
    """One row per prompt, in the order of `prompts`: its samples' rewards, outcomes and token_ids, by sample index."""
    prompts: Sequence[Prompt]
    group_size: int

    unit = "prompts"

    def __len__(self) -> int:
        return len(self.prompts)

    def group(self, unit: int, visit: int) -> Group:
        """The next `group_size` samples of a prompt: its visits go through all of its samples, again and again."""
        row = self.rows.row(unit, named=True)
        count = len(row["rewards"])
        first = visit * self.group_size
        return [
            Rollout(
                prompt=self.prompts[unit],
                completion=Completion(
                    key=None,
                    token_ids=tuple(row["token_ids"][index]),
                    text="",
                    truncated=row["outcomes"][index] == Outcome.TRUNCATED,
                ),
                grade=Grade(outcome=Outcome(row["outcomes"][index]), reward=row["rewards"][index]),
            )
            for index in ((first + at) % count for at in range(self.group_size))
        ]

    def digest(self) -> str:
        """A hash of everything that training reads of the samples besides V̂*, in their order."""
        found = hashlib.sha256("\n".join(self.rows["prompt_id"]).encode())
        tokens = self.rows["token_ids"].explode()
        for column in (tokens.list.len(), tokens.explode(), self.rows["rewards"].explode()):
            found.update(np.ascontiguousarray(column).tobytes())
        return found.hexdigest()[:32]

    def lines(self) -> list[str]:
        """The data, for people."""
        samples = int(self.rows["rewards"].list.len().sum())
        return [
            f"trained on stage 1's {samples:,} samples themselves, {self.group_size} of each prompt at a visit"
        ]


def read_samples(
    folder: Path,
    rows: pl.DataFrame,
    provenance: Provenance,
    prompts: Sequence[Prompt],
    train: TrainConfig,
) -> Samples:
    """The samples in a store's folder that a table of V̂* was made of: its rows, and its provenance.

    Raises UserError if one is missing, has no token ids, or is not the one that V̂* was made of.
    """
    if not folder.is_dir():
        raise UserError(
            f'there is no {folder}, whose samples train.rollouts = "stage1" trains on; `vstar` writes them: copy them '
            "to that folder, or beside the table"
        )
    accepted = Allowance(known=provenance.context.get(ACCEPTED, []))
    store, group_size = SampleStore(folder, provenance, accepted), train.objective.group_size
    order = pl.DataFrame({"prompt_id": [prompt.id for prompt in prompts]})
    table = order.join(rows.select(_COLUMNS), on="prompt_id", how="left", maintain_order="left")
    few = table.filter(pl.col("rewards").list.len() < group_size)
    if few.height:
        raise UserError(
            f"train.objective.group_size {group_size} is more than the samples of {few.height:,} prompts, such as "
            f"{few['prompt_id'][0]} with {len(few['rewards'][0])}; choose a smaller one, or draw more samples"
        )
    ids = store.token_ids(table.select("prompt_id", pl.col("rewards").list.len().alias("num_samples")))
    if without := ids["completion_ids"].null_count():
        raise UserError(
            f"{folder}: {without:,} samples have no token ids, which are kept only with vstar.keep_token_ids = true; "
            "draw them again with another --run"
        )
    found = ids.group_by("prompt_id", maintain_order=True).agg(pl.col("completion_ids").alias("token_ids"))
    chosen = table.join(found, on="prompt_id", how="left", maintain_order="left")
    lengths = pl.col("token_ids").list.eval(pl.element().list.len().cast(pl.Int32))
    other = chosen.filter(lengths.ne_missing(pl.col("completion_tokens")))
    if other.height:
        raise UserError(
            f"{folder}: the samples of {other.height:,} prompts, such as {other['prompt_id'][0]}, are not those that "
            "V̂* was made of; put the samples of the table beside it"
        )
    return Samples(
        rows=chosen.select("prompt_id", "rewards", "outcomes", "token_ids"),
        prompts=prompts,
        group_size=group_size,
    )
