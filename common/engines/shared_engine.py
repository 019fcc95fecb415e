"""Lets ranks of a training job share one rollout engine, for models that do not fit one GPU."""

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch.distributed as dist

from common.errors import UserError
from common.model.files import model_numbers
from common.rollout import SampleRequest

T = TypeVar("T")


class SharedEngine:
    """A group of consecutive ranks that each hold a shard of one engine and run the same requests in the same order.

    `name` is unique, across machines and also across jobs that were killed.
    """

    def __init__(self, size: int) -> None:
        """Join the rank's group. A collective operation of all ranks; their number is a multiple of `size`."""
        ranks = range(dist.get_world_size())
        self._size = size
        self._place = dist.get_rank() % size
        # A separate group: another thread may be using the trainer's, which on GPUs cannot send Python objects.
        self._group, _ = dist.new_subgroups_by_enumeration(
            [list(ranks[start : start + size]) for start in ranks[::size]], backend="gloo"
        )
        self.name = self._gather(uuid4().hex)[0]

    def share(self, requests: Iterable[SampleRequest]) -> list[tuple[bool, SampleRequest]]:
        """The requests of all ranks of the group in one order, each with whether it is this rank's own.

        A collective operation of the group. The ranks' requests alternate, so that each rank always has completions to
        grade.
        """
        parts = self._gather(list(requests))
        return [
            (place == self._place, request)
            for turn in zip_longest(*parts)
            for place, request in enumerate(turn)
            if request is not None
        ]

    def _gather(self, item: T) -> list[T]:
        items: list[T] = [item] * self._size
        dist.all_gather_object(items, item, group=self._group)
        return items


def refuse_wrong_size(size: int, processes: int, folder: Path) -> None:
    """Raise UserError unless the job's ranks and the model in `folder` can be divided by `size`."""
    option = f"engine.training_tensor_parallel_size {size}"
    if processes % size:
        raise UserError(
            f"{option} cannot group the job's processes, found {processes}; start a multiple of {size} (NPROC), or "
            "choose a divisor of their number"
        )
    model = model_numbers(folder)
    numbers = {name: model.get(name) for name in ("num_attention_heads", "intermediate_size")}
    wrong = [f"{name} {number}" for name, number in numbers.items() if number is not None and number % size]
    # Fewer key-value heads than ranks are repeated.
    key_value_heads = model.get("num_key_value_heads") or numbers["num_attention_heads"] or size
    if max(key_value_heads, size) % min(key_value_heads, size):
        wrong.append(f"num_key_value_heads {key_value_heads}")
    if wrong:
        raise UserError(f"{option} cannot split {folder}, found {', '.join(wrong)}; choose a common divisor")
