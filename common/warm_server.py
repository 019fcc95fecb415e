"""The process that programs are forked from, see common.warm_starts: `python -m common.warm_server CONTROL PARENT`.

It imports one library after the other whenever no order waits, and forks for each order. It has one thread, as a
process that forks must, and ends, with all its forks, when nobody can order any more.
"""

import atexit
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from common.lifetime import die_with
from common.warm_starts import CONTROL, LONGEST_MESSAGE, Ended, Order

LIBRARIES = (
    "torch",
    "common.engines.vllm_engine",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "vllm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.transformers",
    "vllm.entrypoints.llm",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.model_executor.layers.quantization.online.base",
    "typer",
    "rich.progress",
    "polars",
    "pyarrow.parquet",
    "deepspeed",
    "peft",
    "tensorboard.summary.writer.record_writer",
    "tensorboard.compat.proto.event_pb2",
    "pandas",  # by pyarrow, where it is installed
)
"""In the order in which programs need them, with what they import themselves when they are first used."""
OURS = ("common", "stage1_vstar", "stage2_train", "tests")


@dataclass(slots=True)
class Child:
    """A fork that runs a program."""

    pid: int
    reports: socket.socket
    """Where its start and its end are told."""
    ordered_by: "Child | None"
    """The program that has ordered it; None if that is no fork."""
    cpu_seconds: float = 0.0
    """Of the forks that it has ordered, and that have ended."""
    peak_gib: float = 0.0
    """Of the same."""

    def ended(self) -> None:
        """Wait for it, and tell how it has ended."""
        _, status, usage = os.wait4(self.pid, 0)
        ended = Ended(
            exit_code=os.waitstatus_to_exitcode(status),
            cpu_seconds=usage.ru_utime + usage.ru_stime + self.cpu_seconds,
            peak_gib=max(usage.ru_maxrss / 2**20, self.peak_gib),
        )
        if self.ordered_by is not None:
            self.ordered_by.cpu_seconds += ended.cpu_seconds
            self.ordered_by.peak_gib = max(self.ordered_by.peak_gib, ended.peak_gib)
        self.tell(asdict(ended))
        self.reports.close()

    def tell(self, message: Mapping[str, float]) -> None:
        with suppress(OSError):  # nobody waits for it any more
            self.reports.send(json.dumps(message).encode())


@dataclass(frozen=True, slots=True)
class Forked:
    """What a fork is to do."""

    order: Order
    files: Sequence[int]
    """Its standard input, output and error."""
    control: socket.socket
    """Its way to the server."""
    server: int
    """The id of that process."""


def serve(control: socket.socket) -> Forked | None:
    """Import and fork; returns in each fork what it is to do, and in the server None at the end."""
    waiting = deque(LIBRARIES)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        server = os.getpid()
        while True:
            ready = selector.select(0 if waiting else None)
            if not ready:
                _import(waiting.popleft())
            for key, _ in ready:
                if isinstance(key.fileobj, int):  # the pidfd of a fork that has ended
                    selector.unregister(key.fileobj)
                    os.close(key.fileobj)
                    key.data.ended()
                    _end_those_of(key.data, selector)
                    continue
                client = key.fileobj
                assert isinstance(client, socket.socket)
                text, files, *_ = socket.recv_fds(client, LONGEST_MESSAGE, 4)
                if text:
                    forked = _fork(Order(**json.loads(text)), files, key.data, selector, server)
                    if forked is not None:
                        return forked
                elif client is control:
                    return None
                else:  # the program has ended, or has no need of it
                    selector.unregister(client)
                    client.close()


def _fork(
    order: Order,
    files: Sequence[int],
    ordered_by: Child | None,
    selector: selectors.BaseSelector,
    server: int,
) -> Forked | None:
    """Fork; returns in the fork what it is to do, and in the server None. The last file is for reports."""
    *standard, reporting = files
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports = socket.socket(fileno=reporting)
    if (pid := os.fork()) == 0:
        _let_go(selector, [ours, reports])
        return Forked(order, standard, theirs, server)
    theirs.close()
    for file in standard:
        os.close(file)
    child = Child(pid, reports, ordered_by)
    child.tell({"pid": pid})
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, child)
    selector.register(ours, selectors.EVENT_READ, child)
    return None


def _import(library: str) -> None:
    """Import a library. If it fails or is not installed, the programs that need it say so themselves."""
    try:
        import_module(library)
        if library == "common.engines.vllm_engine":  # vLLM reads both when it is imported
            sys.modules[library].set_environment("float32")
            sys.modules[library].leave_uncompiled()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
    gc.freeze()


def _end_those_of(child: Child, selector: selectors.BaseSelector) -> None:
    """Kill the forks that a program has ordered: they end with it, as they end with the server."""
    for key in selector.get_map().values():
        if isinstance(key.fileobj, int) and key.data.ordered_by is child:
            signal.pidfd_send_signal(key.fileobj, signal.SIGKILL)


def _let_go(selector: selectors.BaseSelector, others: Sequence[socket.socket]) -> None:
    """Close what belongs to the server."""
    for key in list(selector.get_map().values()):
        if isinstance(key.data, Child):
            key.data.reports.close()
        if isinstance(key.fileobj, int):
            os.close(key.fileobj)
        elif isinstance(key.fileobj, socket.socket):
            key.fileobj.close()
    selector.close()
    for each in others:
        each.close()


def become(forked: Forked, path: list[str]) -> int:
    """Run a program as if the interpreter had been started with it; returns its exit code.

    `path` is sys.path as it was before anything was imported.
    """
    order = forked.order
    die_with(forked.server)
    if order.own_session:
        os.setsid()
    for standard, file in enumerate(forked.files):
        os.dup2(file, standard)
        os.close(file)
    # The old ones remember whether the server's files could be sought in.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    os.environ[CONTROL] = f"{os.getpid()}:{forked.control.detach()}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    _limit_threads()
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    packages = order.environment.get("PYTHONPATH")
    sys.path[:] = [*(packages.split(os.pathsep) if packages else ()), *path]
    return _run(list(order.program), order.folder)


def _run(program: list[str], folder: str) -> int:
    is_safe = program[0] == "-P"
    first, *rest = program[is_safe:]
    try:
        if first == "-m":
            name, *_ = sys.argv = rest
            sys.path[:0] = [] if is_safe else [folder]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path[:0] = [] if is_safe else [str(Path(first).parent)]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  as the interpreter does
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        return 1
    return 0


def _limit_threads() -> None:
    """Give torch the number of threads that OMP_NUM_THREADS says, which is read when it is imported."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))


def leave(exit_code: int) -> NoReturn:
    """End this process as the interpreter does, but for the garbage: it would take 3 s to find that of vLLM."""
    vars(threading)["_shutdown"]()
    vars(atexit)["_run_exitfuncs"]()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    os._exit(exit_code)


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who orders; they end this process
    path = sys.path[1:]  # without its own PYTHONPATH
    control, parent = (int(text) for text in sys.argv[1:])
    die_with(parent)
    forked = serve(socket.socket(fileno=control))
    if forked is None:
        os._exit(0)
    leave(become(forked, path))


if __name__ == "__main__":
    main()
