"""Jobs in processes that can be killed: stage 1's by `python -m tests.killing`, which forks one for each line it reads.

It has imported everything, so that a job starts in milliseconds; each job is a process group of its own. Stage 2's come
from tests/training_jobs.py.
"""

import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import warm

ROOT = Path(__file__).parents[1]
FRAGMENT_SAMPLES = 10


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the process still meant to do happens."""


class JobServer:
    """The test's end: starts jobs one at a time."""

    def __init__(self, artifacts: Path, module: str = "tests.killing") -> None:
        environment = {**os.environ, "ASTAR_PO_ARTIFACTS": str(artifacts), "HF_HUB_OFFLINE": "1"}
        self._process = warm.popen(
            ["-m", module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self,
        config: dict[str, Any],
        *,
        seconds: float | None = None,
        at_write: int | None = None,
        sample_seconds: float = 0.0,
        **order: Any,
    ) -> int:
        """Run a job, kill its process group after `seconds` or at the n-th write; returns its wait status.

        `sample_seconds` is how long stage 1's scripted engine takes for a sample.
        """
        assert self._process.stdin is not None
        order |= {"config": config, "at_write": at_write, "sample_seconds": sample_seconds}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        group = int(self._answer())
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it was faster
                os.killpg(group, signal.SIGKILL)
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the job server has died"
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def kill_five_times(command: Callable[[Path], Sequence[str | Path]], artifacts: Path) -> None:
    """Run a command of cli.py in artifacts/whole, and in artifacts/killed with five SIGKILLs at random instants.

    `command` makes its arguments for a folder of artifacts.
    """

    def start(name: str) -> subprocess.Popen[bytes]:
        folder = artifacts / name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ASTAR_PO_ARTIFACTS": str(folder)}
        return subprocess.Popen(
            [sys.executable, ROOT / "cli.py", *command(folder)], env=environment, stdout=subprocess.DEVNULL
        )

    began = time.monotonic()
    assert start("whole").wait(600) == 0
    longest = time.monotonic() - began
    instants = random.Random(0)
    for _ in range(5):
        process = start("killed")
        try:
            process.wait(instants.uniform(0.05, 0.25) * longest)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert start("killed").wait(600) == 0


def kill_at_each_write(
    run: Callable[[str, int | None], int],
    check: Callable[[str], object],
    assert_same: Callable[[str, str], None],
) -> int:
    """Kill jobs at their first write, second, …, until one has fewer writes; returns how many there are.

    `run` does a job of that name, killed at a write or not at all; `check` looks at what a killed one has left. Each
    job is completed and must then have the results of "whole".
    """
    write = 1
    while run(f"killed-{write}", write) == signal.SIGKILL:
        check(f"killed-{write}")
        assert run(f"killed-{write}", None) == 0
        assert_same(f"killed-{write}", "whole")
        write += 1
    assert_same(f"killed-{write}", "whole")
    return write - 1


def killed_at(write: int) -> None:
    """Have this process killed at its n-th step of writing a file: half written, unsynchronised, or not yet renamed."""
    import pyarrow.parquet as pq

    steps = 0

    def dies(function: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == write:
                if half is not None:
                    half(*arguments)
                os.killpg(os.getpgid(0), signal.SIGKILL)
                time.sleep(60)
            return function(*arguments, **options)

        return step

    def half_the_bytes(path: Path, content: Any) -> None:
        with path.open("wb") as file:
            file.write(memoryview(content)[: len(content) // 2])

    def half_a_table(_: Any, target: Any, **__: Any) -> None:
        if isinstance(target, Path):
            target.write_bytes(b"PAR1 and then")

    os.fsync = dies(os.fsync)
    Path.replace = dies(Path.replace)  # type: ignore[method-assign]
    Path.write_bytes = dies(Path.write_bytes, half_the_bytes)  # type: ignore[method-assign]
    pq.write_table = dies(pq.write_table, half_a_table)


def job(order: dict[str, Any]) -> None:
    from common.engines import LOCAL
    from common.sampling import writer as writer
    from common.terminal.console import Terminal
    from stage1_vstar.run import run_stage1
    from stage1_vstar.segments.run import run_segments
    from stage2_train.config import Config
    from tests.fakes import ScriptedEngine, SteppingEngines

    writer.FRAGMENT_SAMPLES = FRAGMENT_SAMPLES
    config, console = Config.model_validate(order["config"]), Terminal(file=io.StringIO())
    seconds = order["sample_seconds"]
    if order["at_write"] is not None:
        killed_at(order["at_write"])
    if order.get("job") == "segments":
        run_segments(config, console, engines=LOCAL.built_by(SteppingEngines(sample_seconds=seconds).build))
        return
    engine = ScriptedEngine(sample_seconds=seconds)
    run_stage1(config, console, check=False, engines=LOCAL.built_by(lambda *_, **__: engine))


def serve(job: Callable[[dict[str, Any]], None]) -> None:
    """Fork a process that does the job for each order that is read; say its id, then its wait status."""
    gc.freeze()  # DeepSpeed collects garbage at each start of ZeRO-3: what was imported is none
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os.setsid()
            try:
                job(json.loads(line))
            except BaseException:  # noqa: BLE001  the parent reads the exit status
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    import polars  # noqa: F401
    import pyarrow
    from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401

    import common.model.output_layer
    import common.model.pretrained  # noqa: F401
    import stage1_vstar.run
    import stage1_vstar.segments.run  # noqa: F401
    import tests.fakes  # noqa: F401

    pyarrow.array([])  # imports pandas, if it is there
    serve(job)
