"""Programs that start warm, as `popen` and `run` like those of subprocess for `python PROGRAM…`.

A start takes 14 s of processor time before vLLM samples its first token, a warm one 3 s; see common/warm_starts.py. The
process that is forked starts with the first program and ends with the session. With ASTAR_PO_COLD_TESTS=1, as where
there is a GPU, programs start cold.
"""

import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.warm_starts import CAN_FORK, HAS_GPU, Order, WarmProcess, WarmStarts, warm_starts

__all__ = ["HAS_GPU", "IS_COLD", "popen", "run", "run_ranks", "stop"]

ROOT = Path(__file__).parents[1]
IS_COLD = not CAN_FORK or "ASTAR_PO_COLD_TESTS" in os.environ

Program = Sequence[str | Path]
"""A file or `-m` and a module, then the arguments."""

_open = ExitStack()
_server: WarmStarts | None = None


def server() -> WarmStarts:
    global _server
    if _server is None:
        _server = _open.enter_context(warm_starts({**os.environ, "HF_HUB_OFFLINE": "1"}))
    assert _server is not None
    return _server


def stop() -> None:
    """End the server, if it runs: when the session ends."""
    global _server
    _open.close()
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
        order = Order(
            program=program,
            folder=str(given["cwd"] or Path.cwd()),
            environment=dict(os.environ if given["env"] is None else given["env"]),
            own_session=bool(given["start_new_session"]),
        )
        self._process: WarmProcess = server().start(order, *files)
        self.pid = self._process.pid
        vars(subprocess.Popen)["_close_pipe_fds"](self, *pipes)

    def poll(self) -> int | None:
        if self.returncode is None and (ended := self._process.wait(0)) is not None:
            self.returncode = ended.exit_code
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if (ended := self._process.wait(timeout)) is None:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = ended.exit_code
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
