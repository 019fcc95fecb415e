"""The command line with the draws of the transformers engine as they were until it took one number for each token.

`python -m tests.golden_train train …`: of the same distribution, but other samples of the same seed.
"""

from typing import cast

import torch
from transformers import LogitsProcessor

import cli
from common.config import SamplingParams
from common.engines import transformers_engine


class GumbelSampler(LogitsProcessor):
    """Noise for the whole vocabulary, from each row's own random stream."""

    def __init__(self, seeds: list[int], sampling: SamplingParams, device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores_BV = scores.float() / (self._temperature or 1.0)
        noise_BV = torch.zeros_like(scores_BV)
        if self._temperature > 0:
            vocabulary = scores_BV.shape[-1]
            rows = [torch.empty(vocabulary).exponential_(generator=each) for each in self._generators]
            noise_BV = torch.stack(rows).log()
        drawn_B = (scores_BV - noise_BV).argmax(-1, keepdim=True)
        self.logprobs.append(scores_BV.log_softmax(-1).gather(-1, drawn_B).squeeze(-1))
        return cast(torch.FloatTensor, torch.full_like(scores, -torch.inf).scatter(-1, drawn_B, 0.0))


if __name__ == "__main__":
    transformers_engine._SeededSampler = GumbelSampler  # type: ignore[assignment, misc]
    cli.main()
