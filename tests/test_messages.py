"""A message reaches the user from any process, and in any encoding of the terminal."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from stage2_train.ranks import join_ranks
from tests.conftest import ROOT
from tests.fakes import write_artifact

COMMANDS = ("vstar", "train", "forecast", "evaluate", "regrade")

SAYS_WHEN_TOLD = """
import sys
from common.terminal.messages import say_once
print("ready", flush=True)
sys.stdin.readline()
say_once(sys.argv[1], unless_said=len(sys.argv) > 2)
"""

FAILS_ON_RANK_1 = """
import os, time
from common.errors import UserError
import cli
@cli.app.command("fail")
def fail():
    if os.environ["RANK"] == "1":
        raise UserError("only rank 1 found it")
    with cli._ending_cleanly():
        time.sleep(60)
cli.main()
"""

BOTH_BREAK = """
import cli
@cli.app.command("break")
def breaks():
    assert False, "our own defect"
cli.main()
"""


FILLS_THE_GPU = """
import torch
import cli
@cli.app.command("fill")
def fill():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nSee the documentation")
cli.main()
"""


def environment(**changes: str) -> dict[str, str]:
    """That of a process without a launcher, and the changes."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONIOENCODING")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "COLUMNS": "200", **changes}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, in whose path stand characters of Latin-1 and beyond Unicode's first plane."""
    folder = tmp_path_factory.mktemp("messages") / "é😀"
    outcomes = {"p1": ["correct", "wrong"], "p2": ["wrong", "wrong"], "p3": ["correct", "correct"]}
    write_artifact(folder / "demo" / "vstar.parquet", outcomes)
    return folder


def cli(
    *arguments: str, artifacts: Path, stdout: Any = subprocess.PIPE, **changes: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *arguments],
        cwd=artifacts,
        env=environment(ASTAR_PO_ARTIFACTS=str(artifacts), **changes),
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_said_whatever_rank_a_scheduler_has_given_the_process(
    command: str, artifacts: Path
) -> None:
    for world_size in ("1", "2"):
        result = cli(
            *(command, "--config", "none.toml"),
            artifacts=artifacts,
            RANK="1",
            WORLD_SIZE=world_size,
            MASTER_PORT="1",
        )
        assert result.returncode == 2
        assert result.stderr.startswith(b"error: cannot read the config none.toml")


class Rank:
    """A process of a job whose standard error is `stderr`; it is running when this returns."""

    def __init__(self, *says: str, folder: Path, stderr: int, **launcher: str) -> None:
        job = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "here",
            "MASTER_PORT": "1",
            "TMPDIR": str(folder),
            **launcher,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", SAYS_WHEN_TOLD, *says],
            cwd=ROOT,
            env=environment(**job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def speak(self) -> None:
        """Have it say what it has to say, and end."""
        with self._process as process:
            process.communicate("now\n", timeout=60)
            assert process.returncode == 0


def said(file: Path) -> list[str]:
    """The lines since the last call."""
    lines = file.read_text().splitlines()
    os.truncate(file, 0)
    return lines


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[int]:
    """A file that processes share as their standard error: tmp_path / terminal."""
    descriptor = os.open(tmp_path / "terminal", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    yield descriptor
    os.close(descriptor)


ALONE = """
from stage2_train.ranks import join_ranks
ranks = join_ranks(0)
print(ranks.rank, ranks.world_size)
"""


@pytest.mark.parametrize(
    "left_over",
    [
        {"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29512"},
        {"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "x", "MASTER_ADDR": "nohost", "MASTER_PORT": "abc"},
    ],
)
def test_one_process_trains_alone_whatever_a_scheduler_has_left_in_its_environment(
    left_over: dict[str, str],
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=ROOT,
        env=environment(**left_over),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (0, "0 1\n"), result.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", None), ("LOCAL_RANK", "x"), ("MASTER_PORT", "abc"), ("MASTER_ADDR", None), ("RANK", "2")],
)
def test_a_launch_that_lacks_something_says_what_instead_of_waiting(
    name: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for key, text in (whole | {name: value}).items():
        if text is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, text)
    with pytest.raises(UserError, match=rf"{name} is .* torchrun"):
        join_ranks(0)


def test_a_rank_does_not_wait_for_ever_for_one_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    whole = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for key, text in whole.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setattr("stage2_train.ranks.MEETING", timedelta(seconds=0.1))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    with pytest.raises(UserError, match=rf"rank 0 of 2 has not met the others at 127.0.0.1:{port} \("):
        join_ranks(0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {
        "WORLD_SIZE": "4",
        "RANK": "2",
        "LOCAL_RANK": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for key, text in whole.items():
        monkeypatch.setenv(key, text)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"more processes of training on this machine than GPUs, which are 2"):
        join_ranks(0)


def test_processes_of_a_job_say_the_same_thing_once_and_those_of_a_later_job_say_it_again(
    tmp_path: Path, terminal: int
) -> None:
    first, second = (Rank("wrong", folder=tmp_path, stderr=terminal) for _ in range(2))
    other = Rank("wrong in another way", folder=tmp_path, stderr=terminal)
    interrupted = Rank("interrupted", "unless said", folder=tmp_path, stderr=terminal)
    for rank in (first, second, other, interrupted):
        rank.speak()
    assert said(tmp_path / "terminal") == ["wrong", "wrong in another way"]
    for words in (["interrupted", "unless said"], ["wrong"]):
        Rank(*words, folder=tmp_path, stderr=terminal).speak()
    assert said(tmp_path / "terminal") == ["interrupted", "wrong"]


def test_a_process_that_torchrun_starts_late_does_not_say_it_again(tmp_path: Path, terminal: int) -> None:
    """This process stands for the launcher: it began before the first of them spoke."""
    for words, restarts in (("wrong", "0"), ("wrong", "0"), ("wrong in another way", "0"), ("wrong", "1")):
        launcher = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": restarts}
        Rank(words, folder=tmp_path, stderr=terminal, **launcher).speak()
    assert said(tmp_path / "terminal") == ["wrong", "wrong in another way", "wrong"]


def test_processes_that_write_to_different_places_each_say_it(tmp_path: Path, terminal: int) -> None:
    here = Rank("wrong", folder=tmp_path, stderr=terminal)
    with (tmp_path / "rank-1").open("w") as file:
        there = Rank("wrong", folder=tmp_path, stderr=file.fileno())
        here.speak()
        there.speak()
    assert said(tmp_path / "terminal") == said(tmp_path / "rank-1") == ["wrong"]


def test_a_message_that_cannot_be_noted_for_the_others_is_said(tmp_path: Path, terminal: int) -> None:
    Rank("wrong", folder=tmp_path / "none", stderr=terminal).speak()
    assert said(tmp_path / "terminal") == ["wrong"]


def torchrun(program: str, *arguments: str, folder: Path) -> list[str]:
    """What a program that fails on two processes says of it itself: what torchrun adds begins with its date or name."""
    (folder / "program.py").write_text(program)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")
    result = subprocess.run(
        [sys.executable, *launcher, str(folder / "program.py"), *arguments],
        env=environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    return result.stderr.splitlines()


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        (
            "import cli; cli.main()",
            ["train", "-c", "none.toml"],
            "error: cannot read the config none.toml: No such",
        ),
        (FAILS_ON_RANK_1, ["fail"], "error: only rank 1 found it"),
        (BOTH_BREAK, ["break"], "AssertionError: our own defect"),
    ],
    ids=["a mistake of all", "a mistake that one rank finds", "a defect"],
)
def test_under_torchrun_what_is_wrong_is_said_once(
    tmp_path: Path, program: str, arguments: list[str], line: str
) -> None:
    lines = torchrun(program, *arguments, folder=tmp_path)
    assert sum(each.startswith(line) for each in lines) == 1, "\n".join(lines)
    assert not any("interrupted" in each for each in lines)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\u03b21 0.5 \u2192 0.5, mean V\u0302*"), ("utf-8", "β1 0.5 → 0.5, mean V̂*")],
)
def test_every_encoding_gets_text_and_valid_json(encoding: str, shown: str, artifacts: Path) -> None:
    line = cli("rescore", "--beta1", "0.5", artifacts=artifacts, PYTHONIOENCODING=encoding)
    assert line.returncode == 0, line.stderr
    assert shown in line.stdout.decode(encoding)
    document = cli("inspect", "--json", artifacts=artifacts, PYTHONIOENCODING=encoding)
    assert document.returncode == 0, document.stderr
    found = json.loads(document.stdout.decode(encoding))
    assert found["path"] == str(artifacts / "demo" / "vstar.parquet")


def test_a_reader_that_has_enough_ends_a_command_quietly(artifacts: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    for arguments in (("filter",), ("filter", "--json")):
        result = cli(*arguments, artifacts=artifacts, stdout=theirs)
        assert (result.returncode, result.stderr) == (1, b"")
    mistake = cli("inspect", "--run", "none", artifacts=artifacts, stdout=theirs)
    assert mistake.stderr.startswith(b"error: there is no ")
    os.close(theirs)


def test_a_full_disk_behind_standard_output_is_said(artifacts: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        for arguments in (("filter",), ("filter", "--json")):
            result = cli(*arguments, artifacts=artifacts, stdout=full.fileno())
            assert result.returncode == 2
            assert re.fullmatch(rb"error: standard output: No space left on device; .*\n", result.stderr)


def test_a_closed_standard_output_is_no_mistake(artifacts: Path) -> None:
    command = f"{sys.executable} {ROOT / 'cli.py'} inspect >&-"
    result = subprocess.run(
        command,
        shell=True,
        env=environment(ASTAR_PO_ARTIFACTS=str(artifacts)),
        capture_output=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_full_gpu_is_said_with_what_takes_less() -> None:
    """torch's own exception, made by hand: the tests have no GPU."""
    result = subprocess.run(
        [sys.executable, "-c", FILLS_THE_GPU, "fill"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    line = r"error: the GPU's memory is full: CUDA out of memory\. Tried to allocate 2\.00 GiB\. What takes less: .*\n"
    assert re.fullmatch(line, result.stderr)
