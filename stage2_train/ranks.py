"""The processes of a training job: their ranks, and the communication between them."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from common.errors import RankLost, UserError, first_line

PATIENCE = timedelta(hours=24)
"""How long a collective operation waits before it fails. Long before, the watchdog ends a job that hangs."""
MEETING = timedelta(minutes=15)
"""How long a rank waits for the others at the start, as long as torchrun waits for the other nodes."""

LOST = ("Connection closed", "Connection reset", "Broken pipe", "Socket closed", "Timed out waiting")
"""What gloo says when a peer is gone."""
_SOURCE = re.compile(r"^\[[^\]]*\]\s*")
"""The line of gloo's source with which its messages begin."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def largest(self, count: int) -> int:
        """The largest of the ranks' counts."""
        if self.world_size == 1:
            return count
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most.item())

    def total(self, count: int) -> int:
        """The sum of the ranks' counts."""
        if self.world_size == 1:
            return count
        everywhere = torch.tensor(count, device=self.device)
        dist.all_reduce(everywhere, dist.ReduceOp.SUM)
        return int(everywhere.item())

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which have one shape."""
        if self.world_size == 1:
            return values
        everywhere = values.clone()
        dist.all_reduce(everywhere, dist.ReduceOp.SUM)
        return everywhere

    def from_main(self, item: T) -> T:
        """The main rank's item."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def gather(self, items: list[T]) -> list[T]:
        """All ranks' items."""
        if self.world_size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def once(self, work: Callable[[], T]) -> T:
        """The result of work that the main rank does for all ranks. Raises its UserError on every rank."""
        return self._shared(work, self.is_main, 0)

    def once_a_node(self, work: Callable[[], T]) -> T:
        """The result of work that one rank of each node does for its ranks. Raises its UserError on every rank."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        return self._shared(work, local_rank == 0, self.rank - local_rank)

    def _shared(self, work: Callable[[], T], is_ours: bool, doer: int) -> T:
        if self.world_size == 1:
            return work()
        result: T | UserError | None = None
        if is_ours:
            try:
                result = work()
            except UserError as error:
                result = error
        found: list[T | UserError | None] = self.gather([result])
        for one in found:
            if isinstance(one, UserError):
                raise one
        return found[doer]  # type: ignore[return-value]


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A process without others, for work that needs no device."""


@contextmanager
def noticing_lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Raises RankLost in place of the errors of torch's collective operations when another rank is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no other type
        message = first_line(error)
        is_lost = isinstance(error, dist.DistError) or any(sign in message for sign in LOST)
        if ranks.world_size == 1 or not is_lost:
            raise
        cause = _SOURCE.sub("", message).split(". ")[0]
        raise RankLost(
            f"rank {ranks.rank} has lost the connection to another rank ({cause}): look at the output of the other "
            "nodes. The same command continues from the last checkpoint, on any number of nodes"
        ) from error


def launched_processes() -> int:
    """The number of processes according to the launcher; 1 without one. Raises UserError if it is not a number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE is {text!r} in the environment: unset it, or start training with torchrun"
        )
    return int(text)


def _refuse_incomplete_launch(processes: int) -> None:
    """Raise UserError unless the environment gives this process's rank and the address where the ranks meet."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        text = os.environ.get(name, "")
        if not text or (name != "MASTER_ADDR" and not text.isdecimal()):
            raise UserError(
                f"WORLD_SIZE is {processes} in the environment, but {name} is {text!r}: start training with torchrun, "
                "which sets all of them, or unset WORLD_SIZE to train in one process"
            )
    if int(os.environ["RANK"]) >= processes:
        raise UserError(
            f"RANK is {os.environ['RANK']} in the environment, of WORLD_SIZE {processes}: ranks count from 0; start "
            "training with torchrun"
        )


def _join(processes: int, backend: str) -> None:
    """Initialise torch.distributed once all ranks are there: it would wait for a missing one as long as PATIENCE."""
    store, rank, _ = next(rendezvous("env://", timeout=MEETING))
    store.set(f"rank {rank}", "is there")
    store.wait([f"rank {other}" for other in range(processes)], MEETING)
    store.set_timeout(PATIENCE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)


def join_ranks(seed: int) -> Ranks:
    """Initialise torch.distributed, before any vLLM engine, whose group would otherwise be taken for the job's.

    Under torchrun the launcher's environment gives the rank; without it the job is this process alone, whatever RANK
    and MASTER_ADDR say. Raises UserError if the other processes cannot be reached, or if there are more on this machine
    than it has GPUs.
    """
    expected = launched_processes()
    if expected == 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    else:
        _refuse_incomplete_launch(expected)
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"there are more processes of training on this machine than GPUs, which are {gpus}: start as many as "
                "GPUs (NPROC, --nproc-per-node)"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            _join(expected, "nccl" if on_gpu else "gloo")
        except (dist.DistError, ValueError) as error:
            raise UserError(
                f"rank {os.environ['RANK']} of {expected} has not met the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({first_line(error)}): look at the output of the other nodes; start all "
                "with torchrun, or unset RANK and WORLD_SIZE"
            ) from error
    assert dist.get_world_size() == expected, (
        f"{dist.get_world_size()} ranks joined, the launcher started {expected}"
    )
    torch.manual_seed(seed)
    return Ranks(dist.get_rank(), expected, device)
