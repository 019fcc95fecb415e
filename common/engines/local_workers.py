"""Workers of a fleet on this machine: child processes with GPUs, or a share of the cores, of their own.

`python -m common.engines.local_workers` is such a process: a fresh interpreter, which holds nothing of its parent's
memory and devices.
"""

import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from common.config import EngineConfig, RunConfig
from common.data.rendering import PromptRenderer
from common.engines.count import cores, of_each_rank, visible_devices
from common.engines.fleet import EngineFleet
from common.engines.orders import LoadWeights, Order, Reply, SharedWeights
from common.engines.protocol import EngineBuilder, RolloutEngine
from common.engines.weight_files import WeightFiles
from common.engines.worker import serve
from common.errors import UserError
from common.processes import start
from common.runs import REPOSITORY, run_paths
from common.terminal.library_log import libraries_logged
from common.warm_starts import inherited

ENDING_SECONDS = 10.0
LAUNCHED_BY = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
)
"""Variables of a launcher of several ranks: an engine is no rank of the job that has started it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a process may use of the machine."""

    threads: int | None = None
    """Of torch, on a CPU."""
    devices: Sequence[str] = ()
    """Values for CUDA_VISIBLE_DEVICES."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that limit a process to it."""
        return {
            **({"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {}),
            **({"OMP_NUM_THREADS": str(self.threads)} if self.threads is not None else {}),
        }


class LocalWorker:
    """A worker in a child process, which ends with this one."""

    begins_at_once = True

    def __init__(self, build: Callable[[], RolloutEngine], share: Share, log: Path) -> None:
        """Start it, warm where this process was; `build` builds its engine there.

        Libraries' output goes to the log.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = start(
                [sys.executable, "-P", "-m", "common.engines.local_workers"],
                _environment() | share.environment,
                warm=inherited(),
                stdin=theirs.fileno(),
            )
        self._connection = Connection(ours.detach())
        # It reads this once it has imported what that takes. No order comes before: it is not ready.
        threading.Thread(target=self._tell, args=(_pickled((build, log)),), daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, order: Order) -> None:
        """Like Worker.send. It does not wait for the engine: a thread of the process is always reading."""
        self._tell(_pickled(order))

    def _tell(self, message: bytes) -> None:
        with suppress(OSError):  # its death is heard by who receives
            self._connection.send_bytes(message)

    def receive(self) -> list[Reply]:
        """Like Worker.receive."""
        try:
            return [pickle.loads(self._connection.recv_bytes())]
        except OSError as error:
            raise EOFError from error

    def cause_of_death(self) -> str:
        """Like Worker.cause_of_death."""
        ended = self._process.wait(ENDING_SECONDS)
        status = None if ended is None else ended.exit_code
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            return f"died of {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
        return f"ended with exit status {status}"

    def close(self) -> None:
        """Like Worker.close."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with what the engine has started, or left behind
        self._process.wait()


def fleet_of_machine(
    config: RunConfig, folder: Path, renderer: PromptRenderer, build: EngineBuilder
) -> EngineFleet:
    """As many engines on this machine as the config says. Raises UserError, see EngineFleet."""
    count = config.engine.engines
    assert isinstance(count, int), "a number has been chosen"
    shares = shares_of(count, visible_devices(), config.engine.tensor_parallel_size, cores())
    return _fleet(config, folder, renderer, build, shares)


def fleet_beside_trainer(
    config: RunConfig, folder: Path, renderer: PromptRenderer, build: EngineBuilder
) -> EngineFleet:
    """This rank's engines, on GPUs that no rank trains on, or on a share of the cores. Raises UserError."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # torchrun's name of it, and that of DeepSpeed's launcher.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))
    shares = shares_beside(config.engine, visible_devices(), rank, ranks, cores())
    return _fleet(config, folder, renderer, build, shares)


def _fleet(
    config: RunConfig, folder: Path, renderer: PromptRenderer, build: EngineBuilder, shares: Sequence[Share]
) -> EngineFleet:
    share = config.engine.cpu_kv_cache_gib / len(shares)
    engine = config.engine.model_copy(update={"engines": 1, "placement": "inside", "cpu_kv_cache_gib": share})
    alone = config.model_copy(update={"engine": engine})
    one = partial(build, alone, folder, renderer, beside_trainer=False)
    log = run_paths(config.run).libraries_log
    return EngineFleet(
        lambda number: LocalWorker(one, shares[number], log),
        len(shares),
        engine=engine,
        share=WeightFiles.write,
    )


def shares_beside(
    engine: EngineConfig, devices: Sequence[str], rank: int, ranks: int, cores: int
) -> list[Share]:
    """The shares of a rank's engines, one rank of `ranks` on this machine. Raises UserError if there is none.

    Ranks train on the first GPUs, one each. Without GPUs the engines of all ranks have half of the cores.
    """
    spare, each = devices[ranks:], engine.tensor_parallel_size
    count = engine.engines
    if count == "auto":
        count = ranks * max(1, len(spare) // (ranks * each))
    mine = of_each_rank(count, ranks)
    if devices and count * each > len(spare):
        raise UserError(
            f'engine.placement "own processes" needs GPUs that training leaves free: {count} engines of {each} need '
            f"{count * each}, found {len(devices)} of which {ranks} train; train with fewer processes"
        )
    return shares_of(mine, spare[rank * each * mine :], each, max(1, cores // (2 * ranks)))


def shares_of(count: int, devices: Sequence[str], devices_each: int, cores: int) -> list[Share]:
    """Each engine's GPUs, or without any its share of the cores. Raises UserError if there are too few GPUs."""
    if not devices:
        return [Share(threads=max(1, cores // count))] * count
    needed = count * devices_each
    if needed > len(devices):
        of_each = "" if devices_each == 1 else f" × tensor_parallel_size {devices_each}"
        most = len(devices) // devices_each
        advice = f"choose at most {most} engines, or leave it out" if most else "lower tensor_parallel_size"
        raise UserError(
            f"engine.engines {count}{of_each} needs {needed} GPUs, found {len(devices)}; {advice}"
        )
    return [Share(devices=devices[start : start + devices_each]) for start in range(0, needed, devices_each)]


def _environment() -> dict[str, str]:
    path = [str(REPOSITORY), *(os.path.abspath(entry) for entry in sys.path)]
    others = {name: value for name, value in os.environ.items() if name not in LAUNCHED_BY}
    return {**others, "PYTHONPATH": os.pathsep.join(path)}


def _pickled(message: object) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def main() -> None:
    """The process of a worker."""
    connection = Connection(os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    build, log = pickle.loads(connection.recv_bytes())
    orders: SimpleQueue[Order] = SimpleQueue()

    def listen() -> None:
        shared: SharedWeights | None = None
        try:
            while True:
                order = pickle.loads(connection.recv_bytes())
                if isinstance(order, LoadWeights):
                    shared = order.weights
                orders.put(order)
        except (EOFError, OSError):  # the job is gone
            if shared is not None:
                shared.discard()
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()

    def reply(message: Reply) -> None:
        connection.send_bytes(_pickled(message))

    with libraries_logged(log):
        serve(build, orders, reply)


if __name__ == "__main__":
    main()
