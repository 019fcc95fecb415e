"""Workers of a fleet on a Ray cluster, an actor each. Only this file imports ray.

Ray places the actors and says when one is lost. All else is the fleet's, which gives a lost actor's requests to others
and starts an actor in its place: only what it was sampling is lost. Prompts, grades and the store stay with the job, so
a run can be continued with other engines, or without Ray.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import torch

from common.config import EngineConfig, RunConfig
from common.data.rendering import PromptRenderer
from common.engines.count import fitting, of_each_rank, small
from common.engines.fleet import EngineFleet
from common.engines.orders import Order, Reply
from common.engines.protocol import EngineBuilder, EngineSource, LowRank, RolloutEngine
from common.engines.weight_files import NamedTensors, in_parts
from common.engines.worker import serve
from common.errors import UserError, first_line
from common.runs import REPOSITORY

os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")  # ray would put its own function in the place of print
import ray

CONNECT_SECONDS = 10.0


class EngineActor:
    """The process of an engine. Orders and replies each keep their order, and neither waits for the other."""

    def __init__(self, build: Callable[[], RolloutEngine]) -> None:
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._replies: SimpleQueue[Reply | None] = SimpleQueue()
        threading.Thread(target=self._serve, args=(build,), daemon=True).start()

    def _serve(self, build: Callable[[], RolloutEngine]) -> None:
        try:
            serve(build, self._orders, self._replies.put)
        finally:
            self._replies.put(None)

    def take(self, order: Order) -> None:
        """Carry out an order after those before it."""
        self._orders.put(order)

    def replies(self) -> list[Reply]:
        """All replies since the last call, at least one. Raises EOFError if there will be none."""
        found = [self._replies.get()]
        while not self._replies.empty():
            found.append(self._replies.get())
        if found[0] is None:
            raise EOFError("its engine has ended")
        if found[-1] is None:
            self._replies.put(None)
        return [reply for reply in found if reply is not None]


ORDERS, REPLIES = "orders", "replies"
_Actor: Any = ray.remote(concurrency_groups={ORDERS: 1, REPLIES: 1})(EngineActor)


class RayWorker:
    """A worker that is an actor."""

    begins_at_once = False

    def __init__(self, build: Callable[[], RolloutEngine], **resources: Any) -> None:
        """Ask Ray for an actor, which begins once there are resources for it."""
        self._actor: Any = _Actor.options(**resources).remote(build)
        self._cause = ""

    def send(self, order: Order) -> None:
        """Like Worker.send."""
        self._actor.take.options(concurrency_group=ORDERS).remote(order)

    def receive(self) -> list[Reply]:
        """Like Worker.receive."""
        try:
            found: list[Reply] = ray.get(self._actor.replies.options(concurrency_group=REPLIES).remote())
        except ray.exceptions.RayError as error:
            self._cause = first_line(error)
            raise EOFError from error
        return found

    def cause_of_death(self) -> str:
        """Like Worker.cause_of_death."""
        return f"is lost ({self._cause})"

    def close(self) -> None:
        """Like Worker.close."""
        ray.kill(self._actor)


@dataclass(frozen=True, slots=True)
class RayWeights:
    """SharedWeights in Ray's store of objects."""

    parts: list[Any]

    @classmethod
    def put(cls, named_tensors: NamedTensors) -> Self:
        """Put weights there; each node fetches them once."""
        return cls([ray.put(part) for part in in_parts(named_tensors)])

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Like SharedWeights."""
        for part in self.parts:
            yield from ray.get(part).items()

    def discard(self) -> None:
        """Let go of them."""
        self.parts.clear()


@contextmanager
def ray_engines(address: str | None) -> Iterator[EngineSource]:
    """Engines on a Ray cluster: the one at the address, by default at $RAY_ADDRESS, else that of this machine.

    It is connected to when the first engine is needed. Raises UserError then if there is none at the address; on this
    machine one is started if there is none. Raises UserError at once for several processes of training without an
    address: each would start one.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and address is None:
        raise UserError(
            f"{ranks} processes train with --executor ray, and each would start a cluster: start one with `ray start "
            "--head`, and give its address with --address"
        )

    def sized(config: RunConfig, folder: Path, samples: int) -> RunConfig:
        _connect(address)
        return _sized(config, folder, samples)

    def build(
        config: RunConfig,
        folder: Path,
        renderer: PromptRenderer,
        *,
        beside_trainer: bool,
        adapter: LowRank | None = None,
    ) -> EngineFleet:
        _connect(address)
        count = _beside_trainer(config.engine, ranks) if beside_trainer else config.engine.engines
        assert isinstance(count, int), "a number has been chosen"
        jobs = ranks if beside_trainer else 1
        return _fleet(config, folder, renderer, count, _resources(config.engine, count * jobs), adapter)

    try:
        yield EngineSource(build=build, sized=sized)
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    if ray.is_initialized():
        return
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    try:
        _refuse_closed_port(address)  # in a second, for which Ray takes minutes
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--address {address}: there is no Ray cluster to connect to ({first_line(error)}); start one with "
            "`ray start --head`, or leave the option out to start one on this machine"
        ) from error


def _refuse_closed_port(address: str | None) -> None:
    """Raise OSError if the address is a host's port on which nobody listens."""
    host, _, port = (address or "").rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _room(kind: str, each: int) -> int:
    """How many engines fit on the nodes that are there now, with so many GPUs or cores each; an engine is on one."""
    return sum(int(node["Resources"].get(kind, 0)) // each for node in ray.nodes() if node["Alive"])


def _sized(config: RunConfig, folder: Path, samples: int) -> RunConfig:
    """Like with_engines, for the GPUs or cores of the cluster."""
    if config.engine.engines != "auto":
        return config
    if _room("GPU", 1):
        return fitting(config, _room("GPU", config.engine.tensor_parallel_size), samples)
    nodes = sum(node["Alive"] for node in ray.nodes())
    return fitting(config, _room("CPU", 1) if small(folder) else nodes, samples)


def _beside_trainer(engine: EngineConfig, ranks: int) -> int:
    """The number of engines of a rank of training: its part of the cluster's GPUs, or without any one.

    Raises UserError if a configured number cannot be divided among the ranks.
    """
    if engine.engines == "auto":
        return max(1, _room("GPU", engine.tensor_parallel_size) // ranks)
    return of_each_rank(engine.engines, ranks)


def _resources(engine: EngineConfig, engines: int) -> dict[str, int]:
    """What Ray is to reserve for each of so many engines. Raises UserError if no node has as many GPUs.

    Ray would wait for such a node without a word.
    """
    if not _room("GPU", 1):
        cores = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        return {"num_cpus": next((each for each in range(cores, 0, -1) if _room("CPU", each) >= engines), 1)}
    if not _room("GPU", engine.tensor_parallel_size):
        raise UserError(
            f"engine.tensor_parallel_size {engine.tensor_parallel_size}: no node of the Ray cluster has as many GPUs, "
            "and an engine is on one node; choose fewer, or add such a node"
        )
    return {"num_gpus": engine.tensor_parallel_size, "num_cpus": 1}


def _fleet(
    config: RunConfig,
    folder: Path,
    renderer: PromptRenderer,
    count: int,
    resources: dict[str, int],
    adapter: LowRank | None,
) -> EngineFleet:
    from common.engines import build_engine

    engine = config.engine
    alone = config.model_copy(
        update={"engine": engine.model_copy(update={"engines": 1, "placement": "inside"})}
    )
    one = partial(_build_on_node, partial(build_engine, adapter=adapter), alone, folder.absolute(), renderer)
    return EngineFleet(
        lambda _: RayWorker(one, **resources),
        count,
        engine=engine,
        share=RayWeights.put,
        hopeless=_own_node_is_lost,
    )


def _own_node_is_lost() -> str | None:
    """Without its node a job can start no actor, and Ray would let it wait for ever."""
    own = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return None if own in alive else "the Ray node that this job belongs to is lost"


def _build_on_node(
    build: EngineBuilder, config: RunConfig, folder: Path, renderer: PromptRenderer
) -> RolloutEngine:
    if not folder.is_dir():
        raise UserError(
            f"there is no {folder} on the node {ray.util.get_node_ip_address()}; put the model on storage that all "
            "nodes see under the same path"
        )
    return build(config, folder, renderer, beside_trainer=False)
