"""The gradient of an optimizer step in many slices: added up in bfloat16, as DeepSpeed does it, and in float32.

The same sequences in 1, 8 and 64 slices, under ZeRO-2, with and without DeepSpeed's grad_accum_dtype = fp32. Each
gradient is compared with that of the same weights in float32 throughout. What the number of slices adds to its error is
due to adding up; the rest is due to a forward and backward pass in bfloat16.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import settled
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import settings
from benchmarks.gpu.reload import spread_model
from benchmarks.gpu.watch import GIB
from stage2_train import learner
from stage2_train.batch import TokenBatch
from stage2_train.config import Config
from stage2_train.memory import read_shape
from stage2_train.policy import Policy
from stage2_train.ranks import join_ranks

SEQUENCES = 64
PROMPT, COMPLETION = 16, 112
SLICES = (1, 8, 64)
WAYS = {"float32": "float32", "bfloat16": "bfloat16", "bfloat16, added up in float32": "bfloat16"}
LARGEST_LOSS = 2.0
"""Times the error of one slice that 64 may have, as the project trains."""


def measure(findings: Findings, folder: Path) -> None:
    """Each way with each number of slices."""
    from deepspeed.utils import safe_get_full_grad

    model = spread_model(folder, is_tiny=findings.is_tiny, tied=False, odd=False)
    exact: list[Tensor] = []
    errors: dict[tuple[str, int], float] = {}
    for way, dtype in WAYS.items():
        config = settings(model, {"model.dtype": dtype, "train.zero_stage": 2, "train.max_grad_norm": 1e9})
        ranks = join_ranks(config.seed)
        with added_up_in_float32() if way.endswith("float32") and dtype == "bfloat16" else nullcontext():
            policy = Policy(model, config, ranks)
        parameters = list(policy.learner.module.parameters())
        for slices in SLICES:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            began = settled()
            backward(policy, tokens(read_shape(model).vocabulary, ranks.device), slices)
            seconds = settled() - began
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            gradient = [safe_get_full_grad(parameter).float() for parameter in parameters]
            if not exact:
                exact = [each.clone() for each in gradient]
            errors[way, slices] = error(gradient, exact)
            findings.row(
                f"The gradient of {SEQUENCES} sequences",
                way=way,
                slices=slices,
                off_by=errors[way, slices],
                s=seconds,
                peak_GiB=peak / GIB,
            )
            forget(policy)
    bfloat16 = "bfloat16"
    growth = errors[bfloat16, SLICES[-1]] / errors[bfloat16, SLICES[0]]
    findings.at_most("error of 64 slices over that of one, in bfloat16", growth, LARGEST_LOSS)


def tokens(vocabulary: int, device: torch.device) -> TokenBatch:
    """All sequences as one batch."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (SEQUENCES, PROMPT + COMPLETION), generator=generator)
    is_completion_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    is_completion_BT[:, PROMPT:] = True
    return TokenBatch(
        rows=tuple(range(SEQUENCES)), input_ids_BT=ids_BT, is_completion_BT=is_completion_BT
    ).to(device)


def backward(policy: Policy, batch: TokenBatch, slices: int) -> None:
    """The gradient of a sum of log-probs in which one sequence of two counts negatively, as advantages do."""
    size = SEQUENCES // slices
    for first in range(0, SEQUENCES, size):
        rows = slice(first, first + size)
        part = TokenBatch(
            rows=batch.rows[rows],
            input_ids_BT=batch.input_ids_BT[rows],
            is_completion_BT=batch.is_completion_BT[rows],
        )
        logprobs_K = policy.logprobs(part).logprobs_K
        sign_B = 1 - 2 * (torch.tensor(part.rows, device=logprobs_K.device) % 2)
        loss = (logprobs_K * sign_B[part.sequence_of_K]).sum() / (SEQUENCES * COMPLETION)
        policy.learner.backward(loss, last=first + size == SEQUENCES)


def forget(policy: Policy) -> None:
    """Drop the gradients without a step."""
    optimizer: Any = vars(policy.learner)["_engine"].optimizer
    optimizer.zero_grad()
    for group in optimizer.averaged_gradients:  # as a step does; others hold the dictionary itself
        optimizer.averaged_gradients[group] = None


def error(gradient: list[Tensor], exact: list[Tensor]) -> float:
    """The distance of two gradients over the length of the exact one."""
    apart = sum(float((one - other).square().sum()) for one, other in zip(gradient, exact, strict=True))
    length = sum(float(each.square().sum()) for each in exact)
    return math.sqrt(apart / length)


@contextmanager
def added_up_in_float32() -> Iterator[None]:
    """A learner that is made inside has DeepSpeed add up gradients in float32."""
    configure = learner._deepspeed_config

    def changed(config: Config) -> dict[str, Any]:
        return configure(config) | {"data_types": {"grad_accum_dtype": "fp32"}}

    learner._deepspeed_config = changed
    try:
        yield
    finally:
        learner._deepspeed_config = configure
