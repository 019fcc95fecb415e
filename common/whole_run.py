"""All commands of one run, in turn: each in a process of its own, which shows what it prints and starts warm."""

from collections.abc import Sequence
from pathlib import Path

from common.config import RunConfig
from common.errors import UserError
from common.processes import program, show
from common.runs import run_paths
from common.settings import makes_base_model
from common.steps import BY_SEVERAL
from common.warm_starts import warm_starts


def run_all(
    path: Path,
    config: RunConfig,
    before_training: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    processes: int = 1,
) -> int:
    """Run what is missing of a run: each command continues, or finds nothing to do. Stops at one that fails.

    `path` and `overrides` are what the config was read from; `before_training` are the commands that make what training
    reads. Returns the exit code of the last command. Raises UserError if one is killed.
    """
    options = ["--config", str(path), "--run", config.run]
    options += [part for override in overrides for part in ("--set", override)]
    with warm_starts() as warm:
        for command in commands_of(config, before_training):
            several = processes if command in BY_SEVERAL else 1
            arguments = ["--run", config.run] if command == "report" else options
            status = show([*program(several), command, *arguments], warm if several == 1 else None)
            if status < 0:
                raise UserError(f"{command} was killed by signal {-status}; the same command continues")
            if status:
                return status
    return 0


def commands_of(config: RunConfig, before_training: Sequence[str]) -> list[str]:
    """The commands of a run in their order; the demo's base model only if it is not there, as it takes no other."""
    lacks_base = makes_base_model(config) and not run_paths(config.run).base_model.exists()
    evaluation = ["evaluate"] if config.is_evaluated else []
    return [*(["base-model"] if lacks_base else []), *before_training, "train", *evaluation, "report"]
