"""Helpers of stage 1's tests: questions, an engine in place of vLLM's, runs and their results.

`python -m tests.stage1_runs ORDER` is a job in a process of its own that waits at its first sample for a line to read.
"""

import io
import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import polars as pl
import pytest

from common.engines import LOCAL, EngineBuilder, build_engine
from common.provenance import read_provenance
from common.rollout import SampleRequest
from common.runs import WHOLE, Shard, run_paths
from common.store import SampleStore
from common.terminal.console import Terminal
from common.vstar_file import read_vstar
from stage1_vstar.adaptive import Rule
from stage1_vstar.run import run_stage1
from stage2_train.config import Config
from tests.fakes import ScriptedEngine

QUESTIONS = 6

engine_builder: EngineBuilder = build_engine
"""The function by which `run` loads its engine; fixtures replace it."""


def write_questions(path: Path, rows: int = QUESTIONS) -> Path:
    lines = [
        json.dumps({"prompt": f"How many is {number}?", "answer": str(1 + number % 4)})
        for number in range(rows)
    ]
    path.write_text("\n".join(lines))
    return path


class Engines:
    """Stands where `build_engine` does: hands out the engine of the moment and counts how often one is loaded."""

    def __init__(self) -> None:
        self.loaded = 0
        self.next = ScriptedEngine()

    def build(self, *_: Any, **__: Any) -> ScriptedEngine:
        self.loaded += 1
        return self.next


def scripted_engines(monkeypatch: pytest.MonkeyPatch, artifacts: Path) -> Iterator[Engines]:
    """The body of the fixture `engines`: every run of the test draws from a scripted engine."""
    assert run_paths("test").root.parent == artifacts
    scripted = Engines()
    monkeypatch.setattr("tests.stage1_runs.engine_builder", scripted.build)
    yield scripted
    assert scripted.next.closed or not scripted.loaded


def run(
    config: Config,
    shard: Shard = WHOLE,
    *,
    adaptive: Rule | None = None,
    allow_mismatch: Collection[str] = (),
    check: bool = False,
) -> str:
    """Run stage 1; returns its output. A scripted engine has no log-probs that could be checked."""
    printed = io.StringIO()
    run_stage1(
        config,
        Terminal(file=printed, width=200),
        shard=shard,
        adaptive=adaptive,
        allow_mismatch=allow_mismatch,
        check=check,
        engines=LOCAL.built_by(engine_builder),
    )
    return printed.getvalue()


def stored(name: str = "test") -> pl.DataFrame:
    fragments = SampleStore(run_paths(name).samples, read_provenance(run_paths(name).vstar))
    return fragments.read().sort("prompt_id", "sample_index")


def rows_of(name: str = "test") -> pl.DataFrame:
    return read_vstar(run_paths(name).vstar)[0]


def contents(folder: Path, pattern: str = "*") -> dict[Path, bytes]:
    """Every file below a folder, byte for byte."""
    return {path: path.read_bytes() for path in folder.rglob(pattern) if path.is_file()}


class HeldJob:
    """A job on a shard, in a process of its own, that has drawn its first sample and waits to be let go."""

    def __init__(self, config: Config, shard: Shard) -> None:
        order = {"config": config.model_dump(mode="json"), "shard": str(shard)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stage1_runs", json.dumps(order)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_it_draws(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "drawing\n"

    def finish(self) -> str:
        """Let it continue to its end; returns its output."""
        printed, _ = self._process.communicate("go on\n", timeout=60)
        assert self._process.returncode == 0
        return printed

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def held_job(order: dict[str, Any]) -> None:
    global engine_builder

    held = True

    def write(request: SampleRequest) -> str:
        nonlocal held
        if held:
            print("drawing", flush=True)
            sys.stdin.readline()
            held = False
        return f"so #### {1 + request.seed % 4}"

    engine_builder = lambda *_, **__: ScriptedEngine(write)  # noqa: E731
    print(run(Config.model_validate(order["config"]), Shard.parse(order["shard"])), flush=True)


if __name__ == "__main__":
    held_job(json.loads(sys.argv[1]))
