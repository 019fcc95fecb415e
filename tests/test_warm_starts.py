"""Commands that start warm end as cold ones do, and cost what they and the programs they started have cost."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from common.processes import execute, executing_warm, program, show
from common.warm_starts import CAN_FORK, HAS_GPU, WarmStarts, can_fork, warm_starts
from tests import warm as started
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="programs are not forked here")


def test_where_the_end_of_a_process_is_not_told_programs_start_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    assert can_fork()
    monkeypatch.setattr("os.pidfd_open", refused)
    assert not can_fork()


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmStarts]:
    with warm_starts() as found:
        assert found is not None
        yield found


def command(folder: Path, text: str) -> list[str]:
    (folder / "program.py").write_text(text)
    return [sys.executable, str(folder / "program.py")]


def test_a_command_that_fails_says_why_and_where_the_rest_is(warm: WarmStarts, tmp_path: Path) -> None:
    fails = command(tmp_path, "print('line'); print('error: no such thing'); raise SystemExit(2)")
    with pytest.raises(UserError, match=r"^error: no such thing \(all of it: .*log\)$"):
        execute(fails, tmp_path / "log", {}, warm)
    dies = command(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"^exit status -9"):
        execute(dies, tmp_path / "other", {}, warm)


def test_a_command_has_its_environment_and_its_cost(warm: WarmStarts, tmp_path: Path) -> None:
    text = """
import os, time
block = bytearray(300 * 2**20)
until = time.process_time() + 0.3
while time.process_time() < until: pass
print(os.environ["GIVEN"])
"""
    cost = execute(command(tmp_path, text), tmp_path / "log", {"GIVEN": "this"}, warm)
    assert (tmp_path / "log").read_text() == "this\n"
    assert cost.seconds >= cost.cpu_seconds >= 0.3
    assert cost.peak_gib > 0.3


ORDERS_ANOTHER = """
import os, sys
from common.processes import start
from common.warm_starts import inherited
busy = '''
import time
until = time.process_time() + 0.5
while time.process_time() < until: pass
'''
with open(sys.argv[1], "w") as file:
    file.write(busy)
warm = inherited()
assert warm is not None
assert start([sys.executable, sys.argv[1]], dict(os.environ), warm=warm).wait().exit_code == 0
"""


def test_what_a_program_has_ordered_is_counted_as_its_own(warm: WarmStarts, tmp_path: Path) -> None:
    orders = [*command(tmp_path, ORDERS_ANOTHER), str(tmp_path / "busy.py")]
    cost = execute(orders, tmp_path / "log", {"PYTHONPATH": str(ROOT)}, warm)
    assert cost.cpu_seconds > 0.5


def test_the_number_of_threads_is_what_the_environment_says(warm: WarmStarts, tmp_path: Path) -> None:
    asks = command(tmp_path, "import torch; print(torch.get_num_threads())")
    for threads in (3, 1):  # from the second program on torch is there
        execute(asks, tmp_path / "log", {"OMP_NUM_THREADS": str(threads)}, warm)
    assert (tmp_path / "log").read_text() == "3\n1\n"


def test_a_process_that_was_not_forked_inherits_no_server(warm: WarmStarts, tmp_path: Path) -> None:
    asks = """
import subprocess, sys
from common.warm_starts import inherited
print(inherited() is not None, flush=True)
if sys.argv[1:]:
    subprocess.run([sys.executable, __file__])
"""
    execute([*command(tmp_path, asks), "again"], tmp_path / "log", {"PYTHONPATH": str(ROOT)}, warm)
    assert (tmp_path / "log").read_text() == "True\nFalse\n"


COUNTS = """
import sys
import torch
from torch._dynamo.utils import counters
from common.engines.vllm_engine import leave_uncompiled
is_there = "vllm.v1.worker.cpu_worker" in sys.modules
leave_uncompiled()
from vllm.v1.sample.ops.logprobs import batched_count_greater_than
batched_count_greater_than(torch.eye(3), torch.zeros(3, 1))
print(is_there, sum(counters["inductor"].values()), sum(counters["aot_autograd"].values()))
"""


@pytest.mark.skipif(HAS_GPU, reason="helpers are compiled on a GPU")
@pytest.mark.parametrize("is_cold", [True, False], ids=["cold", "warm"])
def test_helpers_of_the_sampler_are_not_compiled_on_a_cpu(
    warm: WarmStarts, tmp_path: Path, is_cold: bool
) -> None:
    """They were where the server had imported them: 2 to 10 s, and an error without a C++ compiler."""
    counts, log = command(tmp_path, COUNTS), tmp_path / "log"

    def said() -> str:
        log.unlink(missing_ok=True)
        execute(counts, log, {"PYTHONPATH": str(ROOT)}, None if is_cold else warm)
        return log.read_text()

    if is_cold:
        assert said() == "False 0 0\n"
    else:
        wait_until(lambda: said().startswith("True"))  # the server imports between two programs
        assert said() == "True 0 0\n"


ORDERS_AND_WAITS = """
import signal, sys
from pathlib import Path
from common.processes import execute, show
from common.warm_starts import warm_starts
signal.signal(signal.SIGINT, signal.default_int_handler)
with warm_starts() as warm:
    execute([sys.executable, sys.argv[1]], Path(sys.argv[2]), {}, warm)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("is_cold", [True, False], ids=["a server of its own", "an inherited one"])
def test_a_program_ends_with_what_has_ordered_it(
    tmp_path: Path, ending: signal.Signals, is_cold: bool
) -> None:
    sleeper, log = tmp_path / "sleeper.py", tmp_path / "log"
    sleeper.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    (tmp_path / "orders.py").write_text(ORDERS_AND_WAITS)
    with started.popen(
        [tmp_path / "orders.py", sleeper, log],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cold=is_cold,
    ) as process:
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        process.send_signal(ending)
        process.wait(30)
        state = Path(f"/proc/{log.read_text().strip()}/stat")
        wait_until(lambda: not state.exists())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupt_is_passed_on_to_a_command_that_shows_its_output(tmp_path: Path) -> None:
    text = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    text += "print('begun', flush=True); time.sleep(60)"
    shows = (
        ORDERS_AND_WAITS.rpartition("    execute")[0]
        + "    sys.exit(show([sys.executable, sys.argv[1]], warm))"
    )
    (tmp_path / "shows.py").write_text(shows)
    with started.popen(
        [tmp_path / "shows.py", command(tmp_path, text)[1]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 7


def test_commands_of_several_processes_start_cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("common.processes.warm_starts", lambda: pytest.fail("a server was started"))
    with executing_warm() as run, pytest.raises(UserError, match="arguments are required"):
        run([*program(2)[:-1], "--no-such-option"], tmp_path / "log", {})


def test_a_command_of_the_command_line_starts_warm(tmp_path: Path) -> None:
    with executing_warm() as run:
        run([*program(), "--help"], tmp_path / "log", {"COLUMNS": "80"})
    assert "Post-train language models" in (tmp_path / "log").read_text()
    assert show([*program(), "no-such-command"], None) == 2
