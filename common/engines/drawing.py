"""How the transformers engine, and vLLM's first model runner on a GPU, draw a token: by its cumulative distribution.

Each request has its own stream of numbers from 0 to 1, which depends on its seed alone: a sample is the same whatever
else is in the batch. One number is looked up for each token.

For requests with seeds vLLM's first model runner draws noise for the whole vocabulary, row by row: on a GPU that is a
launch per request and step. Its second one, which vLLM 0.32 takes for all models on a GPU with Triton, has a kernel for
all rows, which it keeps. So has the first on a CPU.

Shapes: B row, T token of a completion, V vocabulary.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

STRIDE = 0x9E3779B97F4A7C15
"""Between the states of two consecutive numbers of a stream, modulo 2^64: that of SplitMix64."""
STATES = 2**64
_BITS = 53
"""Of a number: as many as float64 holds."""


def streams(seeds: Iterable[int], length: int) -> NDArray[np.uint64]:
    """The states of the first `length` numbers of each seed's stream, shape (B, T)."""
    seeds_B1 = np.array(list(seeds), np.uint64)[:, None]
    return seeds_B1 + np.arange(length, dtype=np.uint64) * np.uint64(STRIDE)


def numbers(states: NDArray[np.uint64]) -> torch.Tensor:
    """The numbers in [0, 1) of these states, in float64: SplitMix64 (Steele et al., 2014)."""
    mixed = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(64 - _BITS)).astype(np.float64) * 2.0**-_BITS)


def next_state(generator: torch.Generator) -> int:
    """The state of the next number of the stream of a generator's seed; moves the generator on.

    On a GPU the generator's offset counts the numbers, four for each: vLLM puts it back by four after a draw in vain.
    """
    seed = generator.initial_seed()
    if generator.device.type == "cpu":
        generator.manual_seed((seed + STRIDE) % STATES)
        return seed
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return (seed + offset // 4 * STRIDE) % STATES


def drawn_tokens(probs_BV: torch.Tensor, numbers_B: torch.Tensor) -> torch.Tensor:
    """Draw one token per row: the first whose cumulative probability exceeds the row's number in [0, 1).

    The sum is in float64, which is exact enough for the rarest tokens. A token of probability 0 is never drawn. A row
    with a NaN draws the last token: an id beyond the vocabulary would end the GPU's whole process.
    """
    sum_BV = probs_BV.to(torch.float64, copy=True).cumsum_(-1)
    total_B = sum_BV[:, -1]
    place_B = torch.minimum(numbers_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(sum_BV, place_B[:, None], right=True)[:, 0].clamp(max=probs_BV.shape[-1] - 1)
