"""Train in rounds: each round's model is the reference, the sampler and the start of the next one.

Each step of a round is a command of the command line in a process of its own, so nothing of the stages is imported.
"""

from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.processes import Execute, execute
from common.rounds.page import write_rounds
from common.rounds.plan import Plan
from common.rounds.steps import Steps
from common.runs import exclusive_run
from common.settings import Loader
from common.terminal.console import Terminal


def run_rounds(
    path: Path,
    load: Loader,
    console: Terminal,
    *,
    count: int,
    overrides: Sequence[str] = (),
    run: str | None = None,
    where: Sequence[str] = (),
    processes: int = 1,
    execute: Execute = execute,
) -> None:
    """Do the steps that are missing of `count` rounds, and write the page after each round.

    A call with a higher `count` adds rounds. `where` are conditions on the prompts that each round trains on. Raises
    UserError for a mistake in the config before anything runs, and if a step fails.
    """
    config, inputs = load(path, overrides, run)
    if where and "vstar" not in inputs:
        raise UserError(
            "--where chooses among the prompts of vstar.parquet, which this objective does not read; leave it out"
        )
    plan = Plan(config=config, inputs=inputs, where=where, processes=processes)
    steps = Steps(plan=plan, console=console, execute=execute)
    with exclusive_run(plan.paths, "rounds"):
        steps.prepare(plan.begun(), load)
        if not plan.config.is_evaluated:
            console.print(
                "no evaluation: the config has neither [evaluate.data] nor [evaluate.benchmarks.<name>]"
            )
        steps.make_base_model()
        for number in range(1, count + 1):
            if steps.complete(plan.round(number)) and number < count:
                write_rounds(plan)
        sheet = write_rounds(plan)
        if sheet.rows:
            console.print(sheet.on_terminal())
        console.print(f"{plan.paths.rounds('html')}: the rounds side by side; rounds.md has the table")
