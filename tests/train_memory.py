"""What DeepSpeed holds of a policy, as a program: `python -m tests.train_memory MODEL OUTPUT.json`.

In a process of its own, since DeepSpeed is initialised once a process.
"""

import gc
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from stage2_train import logprobs
from stage2_train.policy import Policy, join_ranks
from tests.stage2_runs import tiny_config


def storages() -> dict[int, int]:
    """The bytes of every tensor's memory, by its address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def held_after_backward(model: Path, dtype: str, zero_stage: int) -> int:
    """Bytes of the policy after the second step's backward pass, when AdamW has its moments; no bucket."""
    ranks = join_ranks(0)
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(Path(folder), model, train={"zero_stage": zero_stage})
    section = config.model.model_copy(update={"dtype": dtype})
    before = storages().keys()
    policy = Policy(model, config.model_copy(update={"model": section}), ranks)
    input_ids = torch.randint(0, 100, (2, 10))
    is_completion = torch.arange(10).expand(2, 10) > 4
    for is_last in (False, True):
        policy.backward(policy.engine(input_ids, is_completion)[0].sum(), last=True)
        if not is_last:
            policy.step()
    buckets = DeepSpeedZeroConfig().reduce_bucket_size
    return sum(size for place, size in storages().items() if place and place not in before and size < buckets)


def main(model: str, output: str) -> None:
    zero = DeepSpeedZeroConfig()
    document: dict[str, Any] = {
        "bytes": {
            f"{dtype} {stage}": held_after_backward(Path(model), dtype, stage)
            for dtype, stage in product(("float32", "bfloat16"), (0, 1, 2, 3))
        },
        "reduce_bucket_size": zero.reduce_bucket_size,
        "max_live_parameters": zero.max_live_parameters,
        "sub_group_size": zero.sub_group_size,
        "logits_per_chunk": logprobs.LOGITS_PER_CHUNK,
        "logits_per_block": logprobs.LOGITS_PER_BLOCK,
    }
    Path(output).write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
