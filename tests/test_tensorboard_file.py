"""TensorBoard's file is what TensorBoard reads, and a full disk is noticed where the figures are written."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stage2_train.tensorboard_file import TensorBoardFile
from tests.conftest import ROOT


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_was_written_and_forgets_what_a_lost_run_wrote(tmp_path: Path) -> None:
    lost = TensorBoardFile(tmp_path, first_step=0)
    for step in (1, 2, 3):
        lost.write(step, {"reward/mean": step / 4, "kl/sequence": 1.0})
    # It is on disk, whoever kills the process now.
    assert shown(tmp_path)["reward/mean"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    continued = TensorBoardFile(tmp_path, first_step=3)
    continued.write(3, {"reward/mean": 0.0})
    assert shown(tmp_path) == {
        "reward/mean": [(1, 0.25), (2, 0.5), (3, 0.0)],
        "kl/sequence": [(1, 1.0), (2, 1.0)],
    }
    lost.close()
    continued.close()


FULL_DISK = """
import io, resource, sys
from pathlib import Path
from common.terminal.console import Terminal
from common.errors import UserError
from common.runs import RunPaths
from stage2_train.metrics import MetricsLog
from tests.stage2_runs import tiny_config
folder, digits = Path(sys.argv[1]), int(sys.argv[2])
config = tiny_config(folder, folder / "model")
log = MetricsLog(config, RunPaths(folder), Terminal(file=io.StringIO()), first_iteration=0, last=100)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for iteration in range(100):
        log.write(iteration, {f"m/{number}": round(1 / 3, digits) for number in range(40)})
except UserError as error:
    print(error)
log.close()
"""


@pytest.mark.parametrize(("digits", "which"), [(0, "tensorboard"), (16, "metrics.jsonl")])
def test_a_disk_that_fills_while_figures_are_written_is_one_error_that_names_the_place(
    tmp_path: Path, digits: int, which: str
) -> None:
    """Here no file may grow beyond a size; a full disk fails in the same calls. Digits take room in one of the two."""
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path, str(digits)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"cannot write {tmp_path / which}: File too large; ")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
