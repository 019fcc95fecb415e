"""Finds out which columns a run's reward functions read, in a worker process: only there does the user's code run."""

from functools import cache

from common.errors import UserError
from common.grading.config import GraderConfig
from common.grading.conventions import Needs
from common.grading.graders import Grader, is_function
from common.grading.process import START_SECONDS, WorkerProcess
from common.grading.spec import GraderSpec


def row_needs(config: GraderConfig) -> Needs:
    """The parts of a row that the grader's functions read; built-in graders read none.

    Raises UserError for a function that cannot be loaded.
    """
    if not any(is_function(name) for name in config.names):
        return Needs()
    return _of_worker(config.spec, config.memory_bytes, Grader(config.spec).version)


@cache
def _of_worker(spec: GraderSpec, memory_bytes: int, version: str) -> Needs:
    """`version` is that of the functions' source, which may change while a process lives."""
    worker = WorkerProcess(spec, memory_bytes=memory_bytes)
    try:
        if worker.connection.poll(START_SECONDS):
            worker.receive()
            return worker.needs
        died = "does not load in time"
    except ValueError as refusal:
        raise UserError(str(refusal)) from None
    except EOFError:
        died = "ends the process that loads it"
    finally:
        worker.kill()
        worker.bury()
    raise UserError(f"grader.name = {', '.join(map(repr, spec.names))} {died} ({worker.death})")
