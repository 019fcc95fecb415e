"""Libraries' output goes to a file of the run, once; the terminal has this project's lines and every traceback."""

import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from common.terminal.console import Terminal
from common.terminal.library_log import libraries_logged
from tests.conftest import ROOT

LIBRARY = """
import logging, sys, warnings
print(f"{globals().get('name', 'a library')} prints")
print("another line of it", file=sys.stderr)
for _ in range(3):
    warnings.showwarning(FutureWarning("deprecated"), FutureWarning, "library.py", 7)
    logging.getLogger("library").warning("12:30:0%d it logs", _)
handler = logging.StreamHandler()
handler.emit(logging.makeLogRecord({"msg": "by a handler of its own"}))
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    file = tmp_path / "site-packages" / "library.py"
    file.parent.mkdir()
    file.write_text(LIBRARY)
    return file


def test_each_line_of_a_library_is_in_the_log_once_and_none_is_on_the_terminal(
    library: Path, tmp_path: Path
) -> None:
    """In a process of its own: pytest takes warnings and the log for itself."""
    program = (
        "import sys, runpy, pathlib; from common.terminal.library_log import libraries_logged\n"
        "with libraries_logged(pathlib.Path(sys.argv[1])): runpy.run_path(sys.argv[2])"
    )
    log = tmp_path / "libraries.log"
    result = subprocess.run(
        [sys.executable, "-c", program, log, library], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    command, *lines = log.read_text().splitlines()
    assert command.endswith(f"{log} {library}")
    assert lines == [
        "a library prints",
        "another line of it",
        "library.py:7: FutureWarning: deprecated",
        "12:30:00 it logs",
        "by a handler of its own",
    ]


def test_what_this_project_says_and_every_traceback_stay_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with libraries_logged(tmp_path / "libraries.log"):
        print("someone debugs")
        Terminal().print("a line of ours")
        try:
            raise ValueError("wrong")
        except ValueError:
            traceback.print_exc()
    output, errors = capsys.readouterr()
    assert output == "someone debugs\na line of ours\n"
    assert errors.endswith("ValueError: wrong\n")
    assert not (tmp_path / "libraries.log").exists()


def test_a_run_that_does_not_come_to_be_gets_no_log_and_one_that_does_has_all_lines(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "run" / "libraries.log"
    with libraries_logged(log):
        runpy.run_path(str(library))
        assert not log.parent.exists()
        log.parent.mkdir()
        runpy.run_path(str(library), {"name": "another library"})
    assert capsys.readouterr() == ("", "")
    lines = log.read_text().splitlines()
    assert [line for line in lines if "prints" in line] == ["a library prints", "another library prints"]


def test_ranks_share_a_log_and_are_told_apart(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with libraries_logged(tmp_path / "libraries.log"):
            runpy.run_path(str(library))
    lines = (tmp_path / "libraries.log").read_text().splitlines()
    assert [line for line in lines if "prints" in line] == [
        "rank 0: a library prints",
        "rank 1: a library prints",
    ]


def test_where_the_log_cannot_be_written_that_is_said_and_nothing_is_lost(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "libraries.log").symlink_to("/dev/full")
    with libraries_logged(tmp_path / "libraries.log"):
        runpy.run_path(str(library))
    warning, _, *lines = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: cannot write {tmp_path / 'libraries.log'}: No space left on device")
    assert lines[0] == "a library prints"
    assert lines[-1] == "by a handler of its own"


def test_a_progress_bar_of_a_library_is_for_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=is_terminal: shown)
        with libraries_logged(tmp_path / "libraries.log"):
            list(tqdm([1], desc="fetching"))
        assert ("fetching: 100%" in capsys.readouterr().err) == is_terminal
    assert not (tmp_path / "libraries.log").exists()
