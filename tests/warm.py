"""Programs that start warm: each a fork of one process that has imported torch, transformers, vLLM and DeepSpeed.

`popen` and `run` are those of subprocess for `python PROGRAM…`, which takes 14 s of processor time before vLLM samples
its first token and 3 s when it starts warm. What is of this project each program imports itself. `python -m tests.warm`
is the process that is forked; it starts with the first program and ends with the session. Where there is a CUDA device,
which does not survive a fork, and with ASTAR_PO_COLD_TESTS=1, programs start cold.
"""

import atexit
import gc
import inspect
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
LONGEST_MESSAGE = 1 << 20
HAS_GPU = Path("/dev/nvidiactl").exists()
IS_COLD = HAS_GPU or "ASTAR_PO_COLD_TESTS" in os.environ

Program = Sequence[str | Path]
"""A file or `-m` and a module, then the arguments."""


class Server:
    """The test's end: asks for forks, and hears how each of them ends."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ended: dict[int, int] = {}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)  # each program has its own
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def fork(self, order: Mapping[str, Any], files: Sequence[int]) -> int:
        """Start a program with these files as its standard input, output and error; returns its process id."""
        socket.send_fds(self._control, [json.dumps(order).encode()], files)
        while (started := self._read().get("started")) is None:
            pass
        return started

    def exit_code(self, child: int, timeout: float | None) -> int | None:
        """That of a child, as in Popen.returncode; None if it still runs after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            while child not in self._ended:
                if not selector.select(None if end is None else max(0.0, end - time.monotonic())):
                    return None
                self._read()
        return self._ended[child]

    def _read(self) -> dict[str, int]:
        text = self._control.recv(LONGEST_MESSAGE)
        assert text, "the process that programs are forked from has died"
        message: dict[str, int] = json.loads(text)
        if "ended" in message:
            self._ended[message["ended"]] = message["exit_code"]
        return message

    def close(self) -> None:
        self._control.close()
        self._process.wait()


_server: Server | None = None


def server() -> Server:
    global _server
    if _server is None:
        _server = Server()
    return _server


def stop() -> None:
    """End the server, if it runs: when the session ends."""
    global _server
    if _server is not None:
        _server.close()
        _server = None


class WarmPopen(subprocess.Popen[str]):
    """A Popen whose child is forked and waited for by the server."""

    def _execute_child(self, *arguments: Any) -> None:
        """In place of Popen's own, which forks and executes. Its parameters have other places in other Pythons."""
        signature = inspect.signature(vars(subprocess.Popen)["_execute_child"])
        given = signature.bind(self, *arguments).arguments
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        pipes = [given[name] for name in names]
        files = [
            standard if own == -1 else own for standard, own in enumerate((pipes[0], pipes[3], pipes[5]))
        ]
        _, *program = given["args"]
        order = {
            "program": program,
            "cwd": str(given["cwd"] or Path.cwd()),
            "env": dict(os.environ if given["env"] is None else given["env"]),
            "start_new_session": bool(given["start_new_session"]),
        }
        self.pid = server().fork(order, files)
        vars(subprocess.Popen)["_close_pipe_fds"](self, *pipes)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = server().exit_code(self.pid, timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = server().exit_code(self.pid, timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def popen(
    program: Program,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    start_new_session: bool = False,
    cold: bool = False,
) -> subprocess.Popen[str]:
    """Start `python PROGRAM…` in the background, as subprocess.Popen does; `cold` where the start itself is tested."""
    return (subprocess.Popen if cold or IS_COLD else WarmPopen)(
        [sys.executable, *map(str, program)],
        cwd=cwd,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=start_new_session,
        text=True,
    )


def run(
    program: Program,
    *,
    timeout: float | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    cold: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM…` to its end, as subprocess.run does; output and errors are kept."""
    with popen(
        program, cwd=cwd, env=env, cold=cold, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_ranks(processes: int, program: Program, *, timeout: float, env: Mapping[str, str]) -> None:
    """Run a program on so many ranks, which the environment tells what torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        popen(
            program,
            cwd=ROOT,
            env={**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=timeout)
            assert rank.returncode == 0, errors[-4000:]
    finally:
        for rank in ranks:
            with rank:
                rank.kill()


# The server.


def import_libraries() -> None:
    """All that is not of this project, with what it would import itself when it is first used."""
    from common.engines.vllm_engine import set_environment

    set_environment("float32")
    import deepspeed  # noqa: F401
    import pandas  # noqa: F401  by pyarrow, where it is installed
    import peft  # noqa: F401
    import polars  # noqa: F401
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401
    import vllm.model_executor.models.qwen2
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from tensorboard.compat.proto import event_pb2  # noqa: F401
    from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401
    from vllm import LLM  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] in ("common", "tests")]:
        del sys.modules[name]


def forked(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each order that comes; returns the order and its files in the fork, and None at the end."""
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    _, status = os.waitpid(key.data, 0)
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    ended = {"ended": key.data, "exit_code": os.waitstatus_to_exitcode(status)}
                    control.send(json.dumps(ended).encode())
                    continue
                text, files, *_ = socket.recv_fds(control, LONGEST_MESSAGE, 3)
                if not text:
                    return None
                if (child := os.fork()) == 0:
                    return json.loads(text), files
                for file in files:
                    os.close(file)
                selector.register(os.pidfd_open(child), selectors.EVENT_READ, child)
                control.send(json.dumps({"started": child}).encode())


def become(order: Mapping[str, Any], files: Sequence[int], path: list[str]) -> int:
    """Run a program as if the interpreter had been started with it; returns its exit code.

    `path` is sys.path as it was before the libraries were imported.
    """
    if order["start_new_session"]:
        os.setsid()
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    # The old ones remember whether the server's files could be sought in.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    if packages := order["env"].get("PYTHONPATH"):
        path = [path[0], *packages.split(os.pathsep), *path[1:]]
    sys.path[:] = path
    first, *rest = order["program"]
    try:
        if first == "-m":
            sys.path[0], sys.argv = order["cwd"], list(rest)
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = str(Path(first).parent), [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        return 1
    return 0


def leave(exit_code: int) -> NoReturn:
    """End this process as the interpreter does, but for the garbage: it would take 3 s to find that of vLLM."""
    vars(threading)["_shutdown"]()
    vars(atexit)["_run_exitfuncs"]()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests; they end this process
    path = sys.path.copy()
    import_libraries()
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as control:
        order = forked(control)
    leave(0 if order is None else become(*order, path))


if __name__ == "__main__":
    main()
