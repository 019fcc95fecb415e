"""What DeepSpeed holds of a policy, as a program: `python -m tests.train_memory JOB.json`.

The job file names the model, `cases` (name to dtype and changes of [train]) and the file to write to.

In a process of its own, since DeepSpeed is initialised once a process.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from stage2_train import logprobs
from stage2_train.policy import Policy
from stage2_train.ranks import join_ranks
from tests.stage2_runs import tiny_config


def storages() -> dict[int, int]:
    """The bytes of every tensor's memory, by its address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def held_after_backward(model: Path, dtype: str, change: dict[str, Any]) -> int:
    """Bytes of the policy after the second step's first micro-batch, when AdamW has its moments; no bucket."""
    ranks = join_ranks(0)
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(Path(folder), model, train=change)
    section = config.model.model_copy(update={"dtype": dtype})
    before = storages().keys()
    policy = Policy(model, config.model_copy(update={"model": section}), ranks)
    input_ids = torch.randint(0, 100, (2, 10))
    is_completion = torch.arange(10).expand(2, 10) > 4
    for is_step in (True, False):
        policy.learner.backward(policy.learner(input_ids, is_completion)[0].sum(), last=is_step)
        if is_step:
            policy.learner.step()
    buckets = DeepSpeedZeroConfig().reduce_bucket_size
    return sum(size for place, size in storages().items() if place and place not in before and size < buckets)


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    zero = DeepSpeedZeroConfig()
    document: dict[str, Any] = {
        "bytes": {
            name: held_after_backward(Path(job["model"]), dtype, change)
            for name, (dtype, change) in job["cases"].items()
        },
        "reduce_bucket_size": zero.reduce_bucket_size,
        "max_live_parameters": zero.max_live_parameters,
        "sub_group_size": zero.sub_group_size,
        "logits_per_chunk": logprobs.LOGITS_PER_CHUNK,
        "logits_per_block": logprobs.LOGITS_PER_BLOCK,
    }
    Path(job["output"]).write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
