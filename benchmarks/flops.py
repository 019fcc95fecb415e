"""Floors for benchmarks: the least that a model must compute and move, and how fast this machine does that.

Shapes: _B sequence.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage2_train.memory import Shape

BACKWARD = 2
"""A backward pass is two products for each of the forward pass."""
ADAMW_BYTES = 28
"""AdamW reads a parameter, its gradient and two moments and writes all but the gradient, in float32."""


def forward_flops(shape: Shape, lengths_B: Sequence[int], completions_B: Sequence[int]) -> float:
    """Operations of one forward pass over sequences of `lengths_B` tokens, the last `completions_B` of them sampled.

    Counts only real tokens, only pairs that causal attention uses, and the vocabulary only where a completion token is
    predicted. A multiplication and an addition are two operations.
    """
    layer = sum(rows * columns for rows, columns in layer_products(shape))
    attention = 2 * shape.queries * sum(length * (length + 1) for length in lengths_B)
    output = 2 * shape.hidden * shape.vocabulary * sum(completions_B)
    return float(shape.layers * (2 * layer * sum(lengths_B) + attention) + output)


def layer_products(shape: Shape) -> list[tuple[int, int]]:
    """A layer's weight matrices, input by output width: queries, keys, values, output; gate, up, down."""
    hidden, wide = shape.hidden, shape.intermediate
    attention = [(hidden, shape.queries), (hidden, shape.keys), (hidden, shape.keys), (shape.queries, hidden)]
    return [*attention, (hidden, wide), (hidden, wide), (wide, hidden)]


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of one large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=result), device)


def copy_rate(device: torch.device) -> float:
    """Bytes per second read and written together by copying 256 MiB, the best of five."""
    source = torch.zeros(2**26, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def products_seconds(shape: Shape, tokens: int, predicted: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a model's matrix products at their own sizes, forward and backward, without attention; on the CPU.

    `predicted` of the `tokens` rows reach the vocabulary.
    """
    forward = backward = 0.0
    layers = [(tokens, *product, shape.layers) for product in layer_products(shape)]
    for rows, inner, columns, count in [*layers, (predicted, shape.hidden, shape.vocabulary, 1)]:
        forward += count * _product_seconds(rows, inner, columns, dtype)
        backward += count * _product_seconds(rows, columns, inner, dtype)  # by the input
        backward += count * _product_seconds(columns, rows, inner, dtype)  # by the weight
    return forward, backward


def _product_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    return _best_seconds(lambda: torch.mm(left, right), torch.device("cpu"), repetitions=2)


def settled() -> float:
    """The time, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _best_seconds(run: Callable[[], Tensor], device: torch.device, repetitions: int = 5) -> float:
    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(repetitions))
