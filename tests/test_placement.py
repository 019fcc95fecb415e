"""Engines of training in processes of their own: the same training as with an engine inside, also if one is lost."""

import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from common.config import EngineConfig
from common.engines import EngineBuilder, build_engine
from common.engines.local_workers import shares_beside
from common.errors import UserError
from common.runs import RunPaths, run_paths
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.run import run_stage2
from stage2_train.watchers import Turn
from tests.stage2_runs import tiny_config, write_tiny_vstar

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\..*")

OWN = "own processes"


def configured(folder: Path, model: Path, run: str, **engine: Any) -> Config:
    document = tiny_config(folder, model).model_dump(mode="json", exclude_none=True)
    document |= {"run": run, "engine": {"backend": "transformers", "max_num_seqs": 16, **engine}}
    return Config.model_validate(document)


class Killer:
    """Kills the engine's process, which has this in its command line, after an iteration."""

    def __init__(self, after: int, command: str = "common.engines.local_workers") -> None:
        self._after = after
        self._command = command
        self.killed: list[int] = []

    def after(self, turn: Turn) -> None:
        if turn.number == self._after:
            for process in psutil.Process().children(recursive=True):
                if self._command in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed.append(process.pid)


def trained(
    config: Config, observers: Sequence[Any] = (), build_engine: EngineBuilder = build_engine
) -> RunPaths:
    paths = run_paths(config.run)
    if not paths.vstar.exists():
        paths.root.mkdir(parents=True)
        write_tiny_vstar(config, paths.vstar)
    console = Terminal(file=io.StringIO(), width=200)
    run_stage2(config, console, build_engine=build_engine, observers=observers)
    return paths


def metrics_of(paths: RunPaths) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    return [
        {name: row[name] for name in row if not name.startswith(("time/", "throughput/", "memory/"))}
        for row in rows
    ]


def assert_same_training(found: RunPaths, expected: RunPaths) -> None:
    for ours, theirs in zip(metrics_of(found), metrics_of(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    weights = load_file(expected.model / "model.safetensors")
    for name, weight in load_file(found.model / "model.safetensors").items():
        assert torch.allclose(weight, weights[name], atol=1e-5), name


def test_the_training_is_that_of_an_engine_inside_even_if_one_is_killed(
    tmp_path: Path, tiny_model: Path, artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = trained(configured(tmp_path, tiny_model, "inside"))
    own = trained(configured(tmp_path, tiny_model, "own", placement=OWN))
    killer = Killer(after=1)
    disturbed = trained(configured(tmp_path, tiny_model, "disturbed", placement=OWN), [killer])
    assert len(killer.killed) == 1
    assert (
        "warning: engine 1 of 1 died of SIGKILL, perhaps for want of memory; it is started again"
        in capsys.readouterr().err
    )
    rows = metrics_of(inside)
    assert len(rows) == 4
    for paths in (own, disturbed):
        assert_same_training(paths, inside)
    assert not [
        each for each in psutil.Process().children() if "common.engines.local_workers" in each.cmdline()
    ]


def shares(engine: dict[str, Any], devices: int, ranks: int) -> list[list[dict[str, str]]]:
    config = EngineConfig.model_validate({"placement": OWN, **engine})
    names = [str(number) for number in range(devices)]
    found = [shares_beside(config, names, rank, ranks, cores=8) for rank in range(ranks)]
    return [[share.environment for share in each] for each in found]


def gpus(*names: str) -> list[dict[str, str]]:
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


def test_ranks_divide_the_gpus_that_they_do_not_train_on() -> None:
    assert shares({}, devices=8, ranks=2) == [gpus("2", "3", "4"), gpus("5", "6", "7")]
    assert shares({}, devices=8, ranks=3) == [gpus("3"), gpus("4"), gpus("5")]
    assert shares({"tensor_parallel_size": 2}, devices=8, ranks=2) == [gpus("2,3"), gpus("4,5")]
    assert shares({"engines": 2}, devices=8, ranks=2) == [gpus("2"), gpus("3")]
    assert shares({}, devices=0, ranks=2) == [[{"OMP_NUM_THREADS": "2"}]] * 2


def test_engines_that_have_no_gpu_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"4 engines of 1 need 4, found 4 of which 4 train; train with fewer processes"
    ):
        shares({}, devices=4, ranks=4)
    with pytest.raises(UserError, match=r"engines 3 cannot be divided among the 2 processes of training"):
        shares({"engines": 3}, devices=8, ranks=2)
    with pytest.raises(ValueError, match=r"sleep_while_training = True would have no effect"):
        EngineConfig.model_validate({"placement": OWN, "sleep_while_training": True})
