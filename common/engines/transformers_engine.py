"""transformers' `generate` as the rollout engine: slower, for machines and models without vLLM."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TopPLogitsWarper

from common.config import RunConfig, SamplingParams
from common.data.rendering import PromptRenderer
from common.engines.endings import is_truncated
from common.model.checkpoint_names import CheckpointNames
from common.model.pretrained import load_causal_lm
from common.rollout import Completion, SampleRequest


class TransformersEngine:
    """Samples batch by batch, each sequence from a random stream of its own."""

    def __init__(self, config: RunConfig, folder: Path, renderer: PromptRenderer) -> None:
        """Load the model."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._renderer = renderer
        self._batch_size = config.engine.max_num_seqs
        model: Any = load_causal_lm(folder, config.model.dtype)
        self._names = CheckpointNames(model)
        self._model = model.to(self._device).eval()
        # The folder's own may hold a repetition penalty or a top-k, and `generate` would apply them before our sampler.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Sample a batch at a time; yields once the batch's longest completion has ended."""
        waiting = iter(requests)
        while batch := list(islice(waiting, self._batch_size)):
            yield from self._generate_batch(batch, sampling)

    @torch.inference_mode()
    def _generate_batch(self, batch: list[SampleRequest], sampling: SamplingParams) -> list[Completion]:
        longest = max(len(request.prompt_token_ids) for request in batch)
        input_ids_BT = torch.full((len(batch), longest), self._renderer.pad_token_id)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, request in enumerate(batch):
            length = len(request.prompt_token_ids)
            input_ids_BT[row, longest - length :] = torch.tensor(request.prompt_token_ids)
            attention_mask_BT[row, longest - length :] = 1
        sampler = _SeededSampler([request.seed for request in batch], sampling)
        output_BT = self._model.generate(
            input_ids=input_ids_BT.to(self._device),
            attention_mask=attention_mask_BT.to(self._device),
            max_new_tokens=sampling.max_completion_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            eos_token_id=list(self._renderer.eos_token_ids),
            pad_token_id=self._renderer.pad_token_id,
        )
        logprobs_TB = [column.tolist() for column in sampler.logprobs]
        return [
            self._completion(
                request,
                output_BT[row, longest:].tolist(),
                [column[row] for column in logprobs_TB],
                sampling.max_completion_tokens,
            )
            for row, request in enumerate(batch)
        ]

    def _completion(
        self, request: SampleRequest, token_ids: list[int], logprobs: list[float], limit: int
    ) -> Completion:
        ends = (place for place, token in enumerate(token_ids) if token in self._renderer.eos_token_ids)
        end = next(ends, None)
        kept = token_ids if end is None else token_ids[: end + 1]
        reason = "length" if end is None else "stop"
        return Completion(
            key=request.key,
            token_ids=tuple(kept),
            text=self._renderer.decode(kept),
            truncated=is_truncated(reason, kept, limit, self._renderer.eos_token_ids),
            sampled_logprobs=tuple(logprobs[: len(kept)]) if request.with_logprobs else None,
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place."""
        self._names.load(named_tensors)

    def sleep(self) -> None:
        """Between batches the engine holds its weights alone, which stay."""

    def close(self) -> None:
        """Free the model's memory."""
        del self._model, self._names


class _SeededSampler(LogitsProcessor):
    """Samples inside greedy `generate`: it leaves only the drawn token possible (the Gumbel-max trick).

    `generate` itself draws a whole batch from one random stream; here each row has its own, so that a sample does
    not depend on its neighbours.
    """

    def __init__(self, seeds: list[int], sampling: SamplingParams) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.logprobs: list[torch.Tensor] = []
        """A tensor a step: the drawn tokens' log-probs under the sampling distribution, shape (B,)."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores_BV = scores.float()
        if self._temperature > 0:
            scores_BV = scores_BV / self._temperature
            if self._top_p is not None:
                scores_BV = self._top_p(input_ids, scores_BV)
            vocabulary = scores_BV.shape[-1]
            noise_BV = torch.stack(
                [torch.empty(vocabulary).exponential_(generator=generator) for generator in self._generators]
            )
            drawn_B = (scores_BV - noise_BV.log().to(scores_BV.device)).argmax(-1, keepdim=True)
        else:
            drawn_B = scores_BV.argmax(-1, keepdim=True)
        self.logprobs.append(scores_BV.log_softmax(-1).gather(-1, drawn_B).squeeze(-1).cpu())
        return cast(torch.FloatTensor, torch.full_like(scores, -torch.inf).scatter(-1, drawn_B, 0.0))
