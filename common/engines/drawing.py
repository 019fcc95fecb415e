"""How the transformers engine draws a token: by its cumulative distribution.

Each request has its own stream of numbers from 0 to 1, which depends on its seed alone: a sample is the same whatever
else is in the batch. One number is looked up for each token.

Shapes: B row, T token of a completion, V vocabulary.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

STRIDE = 0x9E3779B97F4A7C15
"""Between the states of two consecutive numbers of a stream, modulo 2^64: that of SplitMix64."""
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


def drawn_tokens(probs_BV: torch.Tensor, numbers_B: torch.Tensor) -> torch.Tensor:
    """Draw one token per row: the first whose cumulative probability exceeds the row's number in [0, 1).

    The sum is in float64, which is exact enough for the rarest tokens. A token of probability 0 is never drawn.
    """
    sum_BV = probs_BV.to(torch.float64, copy=True).cumsum_(-1)
    total_B = sum_BV[:, -1]
    place_B = torch.minimum(numbers_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(sum_BV, place_B[:, None], right=True)[:, 0]
