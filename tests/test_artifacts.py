"""Run folders, whole-or-absent writes, the run's lock, and the hashes that tie an artifact to its model."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import atomic_path, write_text
from common.model.files import model_identity, reference_model, resolve_model
from common.provenance import context, differences
from common.runs import REPOSITORY, exclusive_run, run_paths
from tests.fakes import tiny_config


def test_a_runs_folder_lies_in_the_checkout_or_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASTAR_PO_ARTIFACTS", raising=False)
    assert run_paths("a").vstar == REPOSITORY / "artifacts" / "a" / "vstar.parquet"
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(tmp_path))
    assert run_paths("a").samples == tmp_path / "a" / "samples"


def test_a_file_appears_only_under_its_name_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("ha")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*No space left on device; what was written before"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from common.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(Path(sys.argv[1]), 'x' * 5000)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from common.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], cwd=REPOSITORY, timeout=60)
    assert result.returncode == -9
    assert path.read_text() == "old"


def test_the_second_of_two_jobs_on_one_run_is_told_who_holds_it(artifacts: Path) -> None:
    with (
        exclusive_run(run_paths("one"), "vstar"),
        pytest.raises(
            UserError,
            match=rf"another vstar job \(process {os.getpid()} on .+\) is writing to {artifacts}/one",
        ),
        exclusive_run(run_paths("one"), "vstar"),
    ):
        raise AssertionError("two jobs hold the same run")


def test_other_runs_and_other_kinds_of_job_do_not_wait_for_each_other(artifacts: Path) -> None:
    with (
        exclusive_run(run_paths("one"), "vstar"),
        exclusive_run(run_paths("two"), "vstar"),
        exclusive_run(run_paths("one"), "train"),
    ):
        assert (artifacts / "two").is_dir()


def test_a_killed_job_frees_its_run(artifacts: Path) -> None:
    script = (
        "import os\n"
        "from common.runs import exclusive_run, run_paths\n"
        "with exclusive_run(run_paths('one'), 'vstar'):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60).returncode == -9
    assert (artifacts / "one" / ".vstar.lock").exists()
    with exclusive_run(run_paths("one"), "vstar"):
        pass


@pytest.mark.parametrize("problem", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_with_advice(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, problem: int
) -> None:
    def flock(*_: int) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(
            UserError, match=rf"cannot lock {artifacts}/one/.*{os.strerror(problem)}; two jobs could"
        ),
        exclusive_run(run_paths("one"), "vstar"),
    ):
        raise AssertionError("a run is held without a lock")


def test_differences_name_each_field_with_both_values() -> None:
    here = {"model": {"weights": "a", "tokenizer": "t"}, "grader": "gsm8k/1", "seed": 0}
    there = {"model": {"weights": "b", "tokenizer": "t"}, "grader": "gsm8k/1", "extra": None, "top": [1]}
    assert differences(here, here) == {}
    assert list(differences(here, there).values()) == [
        'model.weights is "b" there and "a" here',
        "seed is null there and 0 here",
        "top is [1] there and null here",
    ]


def test_a_models_identity_follows_its_weights_and_tokenizer_and_nothing_else(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    original = model_identity(tiny_model)
    (copy / "README.md").write_text("another name, the same model")
    assert model_identity(copy) == original

    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    changed = model_identity(copy)
    assert changed["tokenizer"] != original["tokenizer"]
    assert changed["weights"] == original["weights"]

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_identity(copy)["weights"] != original["weights"]


def test_a_model_is_found_in_its_runs_own_folder(artifacts: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, artifacts / "test" / "base_model")
    config = tiny_config(tiny_model, tmp_path / "x.jsonl", model={"path": "{run}/base_model"})
    assert reference_model(config) == artifacts / "test" / "base_model"


def test_a_missing_or_unusable_model_is_named_with_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model at /no/where; check model\.path"):
        resolve_model("/no/where", None)
    with pytest.raises(UserError, match=r"there is no model at \./none; check model\.path"):
        resolve_model("./none", None)
    with pytest.raises(UserError, match=r"not a model in Hugging Face format: it has no config\.json"):
        resolve_model(str(tmp_path), None)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=r"holds no \*\.safetensors weights; convert the model"):
        model_identity(copy)


def test_the_context_records_where_and_how_an_artifact_was_made(tiny_model: Path, tmp_path: Path) -> None:
    made = context(tiny_config(tiny_model, tmp_path / "x.jsonl", data={"limit": 3}))
    assert made["model_path"] == str(tiny_model)
    assert made["data"]["limit"] == 3
    assert made["versions"]["pyarrow"]
    assert made["versions"]["torch"].startswith("2.")
    assert made["commit"] is None or len(made["commit"]) == 40
