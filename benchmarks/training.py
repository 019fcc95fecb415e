"""Iterations of stage 2 without a run around them, on real data or on made-up models, prompts and completions.

Evaluation, log, checkpoints and export, which `run_stage2` adds, are left out.
"""

import json
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

import cli  # noqa: F401  the thread settings of the command line
from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.demo.base_model import build_tokenizer
from common.engines import RolloutEngine
from common.grading import GraderPool
from common.rollout import Completion, Prompt, SampleRequest
from common.runs import REPOSITORY
from stage2_train.config import Config
from stage2_train.data import Stage1, TrainingData
from stage2_train.ranks import join_ranks
from stage2_train.sources.pipeline import RolloutPipeline, drawing
from stage2_train.sources.sampler import Sampler
from stage2_train.train import Trainer

DEMO = REPOSITORY / "configs" / "demo.toml"


@contextmanager
def training(
    config: Config, data: TrainingData, build: Callable[[], RolloutEngine]
) -> Iterator[Trainer[RolloutPipeline]]:
    """A trainer, ready for its first iteration."""
    ranks = join_ranks(config.seed)
    with (
        GraderPool(config.grader) as pool,
        closing(Sampler(build, pool, config.sampling, ranks)) as sampler,
    ):
        trainer = Trainer(config, data, drawing(config, data, sampler, ranks), ranks)
        with closing(trainer.source):
            yield trainer


class ScriptedEngine:
    """Replaces an engine: completions come from `write`, which answers each request, not from a model."""

    def __init__(self, write: Callable[[SampleRequest], Completion]) -> None:
        self._write = write

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Like RolloutEngine.generate."""
        return map(self._write, requests)

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Gather the weights, as a real engine does."""
        deque(named_tensors, maxlen=0)

    def sleep(self) -> None:
        """There is nothing to free."""

    def close(self) -> None:
        """There is nothing to free."""


def random_completion(request: SampleRequest, length: int, vocabulary: int) -> Completion:
    """Random tokens; one of two completions is right if the answer is 1, as in `made_up_data`."""
    tokens = random.Random(request.seed).choices(range(vocabulary), k=length)
    return Completion(
        key=request.key, token_ids=tuple(tokens), text=f"#### {request.seed % 2}", truncated=False
    )


def save_random_model(folder: Path, document: dict[str, Any], *, ends: Sequence[int] = ()) -> None:
    """A model of random weights with this config.json, and the demo's tokenizer; `ends` end a completion, too."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**document, **special))
    if ends:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def made_up_data(folder: Path, config: Config, lengths: Sequence[int]) -> TrainingData:
    """Prompts of random tokens, of these lengths; the answer of each is 1, and half of stage 1's samples were right."""
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    rng = random.Random(0)
    prompts = [
        Prompt(
            id=str(number),
            text="",
            answer="1",
            token_ids=array("i", rng.choices(range(vocabulary), k=length)),
            token_hash="",
        )
        for number, length in enumerate(lengths)
    ]

    def for_all(value: Any) -> dict[str, Any]:
        return {prompt.id: value for prompt in prompts}

    stage1 = Stage1(
        file=folder / "vstar.parquet",
        vstar=for_all(0.5),
        pass_rate=for_all(0.5),
        rewards=for_all([0.0, 1.0]),
        beta1=config.vstar.beta1,
        num_samples="2",
        first_batch=None,
    )
    renderer = PromptRenderer(folder, config.data)
    return TrainingData(
        folder=folder,
        renderer=renderer,
        prompts=prompts,
        held_out=[],
        stage1=stage1,
        identity={"model": {}, "grader": ""},  # for a model's card, which nobody writes
    )
