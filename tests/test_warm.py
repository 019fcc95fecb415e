"""Programs that start warm see what those see that start from nothing, and end alike."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import warm

PROGRAM = """
import atexit, json, os, sys, threading, time

atexit.register(print, "at exit")
ours = {"cli", "common", "stage1_vstar", "stage2_train", "tests"} & {name.partition(".")[0] for name in sys.modules}
os.environ.pop("ASTAR_PO_WARM", None)
print(json.dumps([__name__, sys.argv, sys.path, os.getcwd(), dict(os.environ), sorted(ours), sys.stdin.readline()]))
threading.Thread(target=lambda: (time.sleep(0.2), print("from a thread"))).start()
match sys.argv[1]:
    case "exit": sys.exit(3)
    case "say why": sys.exit("no reason")
    case "fail": raise ValueError("a reason")
"""


def finish(folder: Path, program: list[str], *, cold: bool) -> tuple[list[str], str, int]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "packages"), "NAMED": "value"}
    with warm.popen(
        program,
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cold=cold,
    ) as process:
        output, errors = process.communicate("a line\n", timeout=60)
    assert process.returncode is not None
    return output.splitlines(), errors.splitlines()[-1] if errors else "", process.returncode


@pytest.mark.parametrize("how", ["return", "exit", "say why", "fail"])
@pytest.mark.parametrize("is_module", [False, True], ids=["file", "module"])
def test_a_warm_program_sees_what_a_cold_one_does_and_ends_like_it(
    tmp_path: Path, how: str, is_module: bool
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [*(["-m", "program"] if is_module else [str(tmp_path / "program.py")]), how]
    expected = finish(tmp_path, program, cold=True)
    found = finish(tmp_path, program, cold=False)
    assert found[1:] == expected[1:]
    assert found[0][1:] == expected[0][1:] == ["from a thread", "at exit"]
    ours, theirs = (json.loads(lines[0]) for lines, *_ in (found, expected))
    assert ours == theirs
    assert ours[5:] == [[], "a line\n"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_warm_program_can_be_waited_for_and_killed(tmp_path: Path, number: signal.Signals) -> None:
    program = "import time; print('begun', flush=True); time.sleep(60)"
    # A shell lets its background jobs ignore Ctrl-C, and so what they start; a warm program is told anew.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    ended: list[Any] = []
    for cold in (True, False):
        (tmp_path / "program.py").write_text(heeding + program if cold else program)
        with warm.popen(
            [tmp_path / "program.py"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cold=cold,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
            assert os.getpgid(process.pid) == process.pid
            os.killpg(process.pid, number)
            ended.append(process.wait(120))  # the server may be importing
    assert ended[0] == ended[1] == -number
