"""Stage 2 in processes that can be killed: `python -m tests.training_jobs` forks them for each line it reads.

An order names its `program`, one of PROGRAMS, and how many `processes` run it: as torchrun would, the environment tells
each its rank. The job's own process is rank 0, so that it has ended when the job has.
"""

import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401

import common.engines.transformers_engine  # noqa: F401
import stage2_train.tensorboard_file  # noqa: F401
from common.remote.copies import given
from common.terminal.console import Terminal
from stage2_train import learner
from stage2_train.config import Config
from stage2_train.metrics import Metrics, MetricsLog
from stage2_train.run import run_stage2
from stage2_train.watchers import Turn
from tests import critic_steps, objective_steps, policy_steps, split_steps, train_steps
from tests.killing import JobServer, serve

HANGS_AFTER_SECONDS = 600


def train(order: dict[str, Any]) -> None:
    """Train, and where the order says so kill the whole job: `iterations_later` after the figures of `killed_after`.

    Or `killed_in_conversion` of a checkpoint, when its files are there. `environment` adds to that of the server.
    """
    os.environ |= {"ASTAR_PO_ARTIFACTS": order["artifacts"], **order.get("environment", {})}
    if order.get("killed_in_conversion"):
        learner._unify = lambda folder: os.killpg(0, signal.SIGKILL)
    write, last_write = MetricsLog.write, time.monotonic()

    def write_and_die(log: MetricsLog, iteration: int, metrics: Metrics) -> None:
        nonlocal last_write
        write(log, iteration, metrics)
        seconds, last_write = time.monotonic() - last_write, time.monotonic()
        if iteration == order.get("killed_after"):
            if later := order.get("iterations_later"):
                threading.Timer(later * seconds, os.killpg, (0, signal.SIGKILL)).start()
            else:
                os.killpg(0, signal.SIGKILL)

    MetricsLog.write = write_and_die  # type: ignore[assignment, method-assign]
    run_stage2(Config.model_validate(order["config"]), Terminal(file=io.StringIO()), given(order["vstar"]))


class Hanging:
    """Makes rank 1 hang after the first iteration."""

    def after(self, turn: Turn) -> None:
        if turn.number == 1 and os.environ["RANK"] == "1":
            time.sleep(HANGS_AFTER_SECONDS)


def hang(order: dict[str, Any]) -> None:
    """Train until a rank hangs; what the job says goes to a file."""
    os.environ["ASTAR_PO_ARTIFACTS"] = order["artifacts"]
    with open(order["said"], "a") as said:
        os.dup2(said.fileno(), 2)
    config = Config.model_validate(order["config"])
    run_stage2(config, Terminal(file=io.StringIO()), Path(order["vstar"]), observers=[Hanging()])


PROGRAMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "train": train,
    "hang": hang,
    "train_steps": train_steps.main,
    "policy_steps": policy_steps.main,
    "objective_steps": objective_steps.main,
    "critic_steps": critic_steps.main,
    "split_steps": split_steps.main,
}


def fork_ranks(processes: int) -> list[int]:
    """Become one of `processes` ranks; in rank 0 the ids of the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(world, RANK="0", LOCAL_RANK="0")
    others = []
    for rank in range(1, processes):
        if (child := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return []
        others.append(child)
    return others


def job(order: dict[str, Any]) -> None:
    os.dup2(2, 1)  # DeepSpeed's log goes to the standard output, which is for the server's answers
    others = fork_ranks(order["processes"])
    signal.alarm(HANGS_AFTER_SECONDS)
    torch.set_num_threads(1)
    PROGRAMS[order["program"]](order)
    for other in others:
        assert os.waitpid(other, 0)[1] == 0, f"rank {others.index(other) + 1} failed"


def ranks_found(
    program: str, config: Config, folder: Path, cases: Mapping[int, Mapping[str, Any]]
) -> dict[int, list[Any]]:
    """What each rank of a program found, by the number of its processes; `cases` are those of each number.

    The config's vstar.parquet is in the folder, which is scratch besides.
    """
    found = {}
    with JobServer(folder / "artifacts", "tests.training_jobs") as jobs:
        for processes, theirs in cases.items():
            output = folder / f"found-{processes}"
            status = jobs.run(
                config.model_dump(mode="json"),
                program=program,
                processes=processes,
                vstar=str(folder / "vstar.parquet"),
                cases=theirs,
                output=str(output),
            )
            assert status == 0, f"{program} on {processes} processes"
            found[processes] = [torch.load(f"{output}.{rank}") for rank in range(processes)]
    return found


if __name__ == "__main__":
    serve(job)
