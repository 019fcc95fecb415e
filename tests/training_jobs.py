"""Stage 2 in processes that can be killed: `python -m tests.training_jobs` forks one for each line it reads."""

import io
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter  # noqa: F401
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401

import common.engine_transformers  # noqa: F401
from common.config import Config
from stage2_train.run import run_stage2
from tests.killing import serve


def job(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    run_stage2(Config.model_validate(order["config"]), Console(file=io.StringIO()), Path(order["vstar"]))


if __name__ == "__main__":
    serve(job)
