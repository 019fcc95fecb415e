"""Two ranks of a job that share one vLLM engine: `-m tests.rollout_ranks JOB`, JOB being a JSON file.

Each rank writes what its engine gave it to <output>.<rank>. Of the requests rank 0 has all but the last four.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.config import SamplingParams
from common.data.rendering import PromptRenderer
from common.engines import RolloutEngine, build_engine
from common.rollout import Completion, SampleRequest
from common.seeds import derive_seed
from stage2_train.config import Config

REQUESTS = 24
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_tokens=16)
GREEDY = SAMPLING.model_copy(update={"temperature": 0.0})

Found = dict[Any, tuple[tuple[int, ...], tuple[float, ...]]]
"""Tokens and their log-probs by request."""


def requests(renderer: PromptRenderer, count: int = REQUESTS) -> list[SampleRequest]:
    return [
        SampleRequest(
            key=number,
            prompt_token_ids=renderer.render(f"Tom has {number} pens." + " He buys more." * (number % 5)),
            seed=derive_seed(7, number),
            with_logprobs=True,
        )
        for number in range(count)
    ]


def sample(engine: RolloutEngine, batch: list[SampleRequest], sampling: SamplingParams) -> Found:
    return {each.key: figures(each) for each in engine.generate(batch, sampling)}


def figures(completion: Completion) -> tuple[tuple[int, ...], tuple[float, ...]]:
    assert completion.sampled_logprobs is not None
    return completion.token_ids, completion.sampled_logprobs


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights, moved a little: the same in every process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    return {
        name: weight.detach() + 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in model.named_parameters()
    }


def work(config: Config, folder: Path) -> dict[str, Any]:
    renderer = PromptRenderer(folder, config.data)
    batch = requests(renderer)
    own = batch[:-4] if dist.get_rank() == 0 else batch[-4:]
    engine = build_engine(config, folder, renderer, beside_trainer=True)
    found: dict[str, Any] = {
        "greedy": sample(engine, own, GREEDY),
        "sampled": sample(engine, own, SAMPLING),
        "all are rank 1's": sample(engine, batch if dist.get_rank() == 1 else [], SAMPLING),
    }
    stream = engine.generate(own, SAMPLING)
    if dist.get_rank() == 0:
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    else:
        list(stream)
    found["after rank 0 lost interest"] = sample(engine, own, SAMPLING)
    engine.load_weights(other_weights(folder).items())
    found["with other weights"] = sample(engine, own, SAMPLING)
    engine.close()
    alive = torch.ones(1)
    dist.all_reduce(alive)
    found["ranks after closing"] = int(alive)
    engine = build_engine(config, folder, renderer, beside_trainer=True)
    found["built anew"] = sample(engine, own, SAMPLING)
    dies = [dataclasses.replace(own[0], prompt_token_ids=(1,) * 10_000), *own[1:]]
    try:
        sample(engine, dies, SAMPLING)
    except Exception as error:  # noqa: BLE001
        found["error"] = type(error).__name__, str(error)
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist.init_process_group("gloo")
    output = (
        f"{job['output']}.{dist.get_rank()}"  # before the engine that dies goes, and takes the group along
    )
    torch.save(work(Config.model_validate(job["config"]), Path(job["folder"])), output)
