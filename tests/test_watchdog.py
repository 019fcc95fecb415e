"""The watchdog: which rank hangs, in which phase, and that one that works is left alone."""

import re
import time
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stage2_train.ranks import ALONE, Ranks
from stage2_train.watchdog import Watchdog, in_phase
from tests.killing import JobServer
from tests.stage2_runs import tiny_config, write_tiny_vstar


def test_a_phase_that_takes_too_long_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def leave(status: int, message: str, *, unless_said: bool) -> None:
        said.append(message)

    monkeypatch.setattr("stage2_train.watchdog.leave", leave)
    with Watchdog(ALONE, timedelta(seconds=0.2)):
        for _ in range(8):  # together longer than the limit, each shorter
            with in_phase("update"):
                time.sleep(0.05)
        with in_phase("iteration"):
            for _ in range(8):
                with in_phase("update"):
                    time.sleep(0.05)
            assert not said
            with in_phase("rollout"):
                time.sleep(0.6)
    assert said
    assert re.match(r"error: rank 0 hangs in rollout, for 0.0 minutes; the limit is 0.00\d+ minutes", said[0])


class LostStore:
    """The store of ranks whose main one is gone."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_rank_ends_in_time_without_the_store_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Event()
    messages: list[str] = []

    def leave(status: int, message: str, *, unless_said: bool) -> None:
        messages.append(message)
        said.set()

    monkeypatch.setattr("stage2_train.watchdog.leave", leave)
    dog = Watchdog(Ranks(1, 1, torch.device("cpu")), timedelta(seconds=0.2))
    monkeypatch.setattr(dog, "_store", LostStore())
    with dog, in_phase("update"):
        assert said.wait(60)
    assert messages[0].startswith("error: rank 1 hangs in update, for 0.0 minutes; the limit is")


def test_nothing_is_watched_between_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage2_train.watchdog.leave", lambda *_, **__: pytest.fail("it left"))
    with Watchdog(ALONE, timedelta(seconds=0.05)) as dog:
        time.sleep(0.3)
        assert dog._thread.is_alive()


def test_a_job_names_the_rank_that_hangs_and_what_the_others_wait_in(
    tmp_path: Path, tiny_model: Path, artifacts: Path
) -> None:
    train = {"hang_minutes": 0.1, "zero_stage": 2}
    config = tiny_config(
        tmp_path, tiny_model, train=train, engine={"backend": "transformers", "max_num_seqs": 16}
    )
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    said = tmp_path / "said"
    with JobServer(artifacts, "tests.training_jobs") as jobs:
        status = jobs.run(
            config.model_dump(mode="json"),
            program="hang",
            processes=2,
            vstar=str(tmp_path / "vstar.parquet"),
            said=str(said),
            artifacts=str(artifacts),
        )
    assert status != 0
    lines = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert lines, said.read_text()[-3000:]
    assert re.search(
        r"rank 1 hangs in watching, for 0\.\d minutes \(rank 0 in [a-z]+, for 0\.\d minutes\)", lines[0]
    )
