"""The stored samples of prompts or states."""

from array import array
from collections.abc import Collection

import polars as pl

from common.errors import UserError
from common.store import ADDRESS, SampleStore
from stage1_vstar.segments.states import Sample


def read_samples(store: SampleStore, ids: Collection[str], count: int) -> dict[str, list[Sample]]:
    """The first `count` samples of each of these prompts or states, in order.

    Raises the UserErrors of `refuse_unusable`.
    """
    columns = [pl.col(name) for name in (*ADDRESS, "completion_ids", "outcome", "reward")]
    frame = (
        store.samples_of(ids, columns)
        .filter(pl.col("sample_index") < count)
        .unique(ADDRESS, keep="first")
        .sort(ADDRESS)
    )
    _refuse_unusable(frame.select(pl.col("completion_ids").is_null(), "reward"), store)
    found: dict[str, list[Sample]] = {}
    for name, index, token_ids, outcome, reward in frame.iter_rows():
        sample = Sample(index=index, token_ids=array("i", token_ids), outcome=outcome, reward=reward)
        found.setdefault(name, []).append(sample)
    return found


def refuse_unusable(store: SampleStore, ids: Collection[str], count: int) -> None:
    """Raise UserError if any of these samples has no tokens, or a reward that is not between 0 and 1."""
    columns = [pl.col("sample_index"), pl.col("completion_ids").is_null(), pl.col("reward")]
    _refuse_unusable(store.samples_of(ids, columns).filter(pl.col("sample_index") < count), store)


def _refuse_unusable(frame: pl.DataFrame, store: SampleStore) -> None:
    """`completion_ids` says whether there are none."""
    if frame["completion_ids"].any():
        raise UserError(
            f"{store.folder} holds samples without their tokens, which `vstar` does not keep; run `segments` under "
            "another --run, or before `vstar`"
        )
    if not frame["reward"].is_between(0, 1).all():
        low, high = frame.select(low=pl.col("reward").min(), high=pl.col("reward").max()).row(0)
        raise UserError(
            f"{store.folder} holds rewards from {low} to {high}, but values of states are shares of the best reward: "
            "scale the rewards to 0 to 1"
        )
