"""Evaluations in processes that can be killed: `python -m tests.evaluate_jobs`, started by tests/killing.JobServer."""

import io
from pathlib import Path
from typing import Any

from tests.killing import FRAGMENT_SAMPLES, serve


def job(order: dict[str, Any]) -> None:
    from common.engines import LOCAL
    from common.sampling import writer
    from common.terminal.console import Terminal
    from stage2_train.config import Config
    from stage2_train.evaluation.run import evaluate
    from tests.fakes import ScriptedEngine

    writer.FRAGMENT_SAMPLES = FRAGMENT_SAMPLES
    engine = ScriptedEngine(sample_seconds=order["sample_seconds"])
    folders = {name: Path(folder) for name, folder in order["folders"].items()}
    engines = LOCAL.built_by(lambda *_, **__: engine)
    evaluate(Config.model_validate(order["config"]), folders, Terminal(file=io.StringIO()), engines=engines)


if __name__ == "__main__":
    import scipy.stats  # noqa: F401
    import torch

    import tests.fakes  # noqa: F401

    torch.set_num_threads(1)  # a fork has no threads of its parent's
    serve(job)
