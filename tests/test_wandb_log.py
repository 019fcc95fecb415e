"""Weights & Biases as a service that may not be there: training neither waits for it nor ends with it."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UserError
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.wandb_log import WandbLog
from tests.fakes import tiny_config


class Run:
    """What wandb.init returns; fails at an iteration."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.sent: dict[int, dict[str, float]] = {}
        self.finished = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the service\nis down")
        self.sent[step] = metrics

    def finish(self) -> None:
        self.finished = True


def log_to(
    run: Run | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[WandbLog, io.StringIO]:
    def init(**options: Any) -> Run:
        assert (options["project"], options["name"]) == ("mine", "test")
        if isinstance(run, Exception):
            raise run
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config: Config = tiny_config(tmp_path, tmp_path, train={"wandb_project": "mine"})
    printed = io.StringIO()
    return WandbLog(config, Terminal(file=printed)), printed


def test_each_iteration_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    log, printed = log_to(run, tmp_path, monkeypatch)
    for iteration in (1, 2):
        log.write(iteration, {"reward/mean": 0.5 * iteration})
    log.close()
    assert run.sent == {1: {"reward/mean": 0.5}, 2: {"reward/mean": 1.0}}
    assert run.finished
    assert printed.getvalue() == ""


def test_a_failure_is_said_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(fails_at=2)
    log, printed = log_to(run, tmp_path, monkeypatch)
    for iteration in (1, 2, 3):
        log.write(iteration, {"reward/mean": 1.0})
    log.close()
    assert list(run.sent) == [1]
    said = "warning: wandb failed (ConnectionError: the service is down): it gets no more figures"
    assert printed.getvalue().startswith(said)
    assert printed.getvalue().count("\n") == 1


def test_a_run_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"wandb cannot begin a run \(RuntimeError: no API key\); run `wandb login`"
    ):
        log_to(RuntimeError("no API key"), tmp_path, monkeypatch)
