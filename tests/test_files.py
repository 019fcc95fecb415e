"""Written files: whole or absent, never in place of something that is not a file, never outside artifacts/."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import UserError
from common.files import atomic_path, write_text, writing_to
from common.packages import is_installed
from common.runs import RUN_NAME, run_paths
from stage1_vstar.merge import samples_folder
from tests.conftest import ROOT

OUTPUTS = {
    "folder": "it is a folder; give the path of a file",
    "": "it is a folder; give the path of a file",
    "pipe": "it is a device, a pipe or a socket; give the path of a file",
    "link-to-device": "it is a device, a pipe or a socket; give the path of a file",
    "link-to-itself": "Too many levels of symbolic links; correct the path",
    "file/new": "a file stands where the path has a folder; correct the path",
    "file/new/new": "a file stands where the path has a folder; correct the path",
    "link-below-file": "a file stands where the path has a folder; correct the path",
    "/proc/new": "no file can be made in its folder; what was written before is whole",
    "/dev/full": "it is a device or an open stream",
    "/dev/stdout": "it is a device or an open stream",
    "/dev/fd/1": "it is a device or an open stream",
    "/proc/self/fd/1": "it is a device or an open stream",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what is no regular file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link-to-device").symlink_to("/dev/full")
    (tmp_path / "link-to-itself").symlink_to("link-to-itself")
    (tmp_path / "link-below-file").symlink_to("file/new")
    return tmp_path


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_is_no_regular_file_is_never_replaced(here: Path, output: str) -> None:
    before = {path.name: path.lstat() for path in here.iterdir()}
    device = Path("/dev/full").stat().st_ino
    with pytest.raises(UserError, match=rf"^cannot write .*: {OUTPUTS[output]}"):
        write_text(Path(output), "text")
    assert {path.name: path.lstat() for path in here.iterdir()} == before
    assert Path("/dev/full").stat().st_ino == device


def test_a_link_is_followed_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "far" / "target", tmp_path / "link", tmp_path / "dangling"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "far" / "new")
    write_text(link, "text")
    write_text(dangling, "text")
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert target.read_text() == (tmp_path / "far" / "new").read_text() == "text"
    assert sorted(path.name for path in target.parent.iterdir()) == ["new", "target"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from common.errors import UserError
from common.files import writing_to
import polars, safetensors.numpy, numpy, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
values = numpy.random.rand(1000)
for write in (
    lambda path: polars.DataFrame({"a": values}).write_parquet(path),
    lambda path: safetensors.numpy.save_file({"a": values}, path),
    lambda path: torch.save(torch.tensor(values), path),
    lambda path: path.write_bytes(bytes(values)),
):
    try:
        with writing_to(folder):
            write(folder / "file")
    except UserError as error:
        print(error)
"""


def test_a_full_disk_is_recognised_whatever_library_meets_it(tmp_path: Path) -> None:
    """Here no file may grow beyond a size; a full disk fails in the same calls."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stderr
    for line in lines:
        assert line.startswith(f"cannot write {tmp_path}: File too large; what was written before is whole.")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENOTDIR])
def test_an_error_of_the_disk_is_told_with_the_path(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/file: "), writing_to(tmp_path / "file"):
        raise OSError(number, os.strerror(number))


def test_a_folder_that_is_gone_is_told_and_a_file_that_is_missing_elsewhere_is_a_defect(
    tmp_path: Path,
) -> None:
    gone = tmp_path / "gone" / "file"
    with pytest.raises(UserError, match=r"gone/file: no file can be made in its folder"), writing_to(gone):
        gone.touch()
    with pytest.raises(FileNotFoundError), writing_to(tmp_path / "file"):
        (tmp_path / "other").read_text()


def test_a_defect_while_writing_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="ours"), atomic_path(tmp_path / "file"):
        raise KeyError("ours")
    with pytest.raises(UserError, match=r"^other$"), writing_to(tmp_path):
        raise UserError("other")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../x", "..", ".", "", "a b", "a/b", "/tmp", "-x", "é", "x\n"])
def test_a_run_cannot_lead_out_of_the_artifacts(name: str, artifacts: Path) -> None:
    with pytest.raises(
        UserError, match=r"run should be of letters, digits, .*, found .*give the name of a run"
    ):
        run_paths(name)
    assert run_paths("a.b_c-1").root == artifacts / "a.b_c-1"


def test_a_runs_name_is_the_same_thing_to_the_config_and_to_every_command() -> None:
    (pattern,) = RunConfig.model_fields["run"].metadata
    assert pattern.pattern == RUN_NAME


def test_a_source_of_merge_may_be_a_folder_but_no_run_outside_the_artifacts(
    tmp_path: Path, artifacts: Path
) -> None:
    inside, outside = artifacts / "mine" / "samples", tmp_path / "outside" / "samples"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        (folder / "part-0.parquet").touch()
    assert samples_folder("mine") == inside
    assert samples_folder(str(outside.parent)) == outside
    with pytest.raises(UserError, match=r"\.\./outside: no samples found"):
        samples_folder("../outside")


def test_a_folder_that_is_called_like_a_package_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leftover" / "run-1").mkdir(parents=True)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("leftover")
    assert not is_installed("nowhere")
    assert is_installed("package")
