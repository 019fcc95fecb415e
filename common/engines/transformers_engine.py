"""A rollout engine that calls transformers' `generate`: slower than vLLM, for machines and models without it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from common.config import RunConfig, SamplingParams
from common.data.rendering import PromptRenderer
from common.engines.drawing import drawn_tokens, numbers, streams
from common.engines.endings import Endings
from common.errors import UserError
from common.model.checkpoint_names import CheckpointNames
from common.model.files import model_numbers
from common.model.pretrained import load_causal_lm
from common.rollout import Completion, SampleRequest


class TransformersEngine:
    """Samples batch by batch; each completion has its own random stream."""

    def __init__(self, config: RunConfig, folder: Path, renderer: PromptRenderer) -> None:
        """Load the model."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._renderer = renderer
        self._batch_size = config.engine.max_num_seqs
        self._context = model_numbers(folder).get("max_position_embeddings")
        model: Any = load_causal_lm(folder, config.model.dtype)
        self._names = CheckpointNames(model)
        self._model = model.to(self._device).eval()
        # The model's own may contain a repetition penalty or a top-k, which `generate` would apply before our sampler.
        self._model.generation_config = GenerationConfig()

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Sample a batch at a time; yields its completions once the longest has ended."""
        for batch in self._batches(requests, sampling.max_completion_tokens):
            yield from self._generate_batch(batch, sampling)

    def _batches(self, requests: Iterable[SampleRequest], limit: int) -> Iterator[list[SampleRequest]]:
        """Requests that follow each other, as many as may run together."""
        batch: list[SampleRequest] = []
        for request in requests:
            if len(batch) == self._batch_size or (batch and not self._fits([*batch, request], limit)):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _fits(self, batch: Sequence[SampleRequest], limit: int) -> bool:
        """Whether the model's context is long enough for a batch: every row runs as far as the shortest prefix asks."""
        given = max(len(request.prompt_token_ids) + len(request.prefix) for request in batch)
        steps = limit - min(len(request.prefix) for request in batch)
        return self._context is None or given + steps <= self._context

    @torch.inference_mode()
    def _generate_batch(self, batch: list[SampleRequest], sampling: SamplingParams) -> list[Completion]:
        given = [(*request.prompt_token_ids, *request.prefix) for request in batch]
        longest = max(map(len, given))
        input_ids_BT = torch.full((len(batch), longest), self._renderer.pad_token_id)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, token_ids in enumerate(given):
            input_ids_BT[row, longest - len(token_ids) :] = torch.tensor(token_ids)
            attention_mask_BT[row, longest - len(token_ids) :] = 1
        endings = Endings(self._renderer, sampling)
        sampler = _SeededSampler([request.seed for request in batch], sampling, self._device)
        at_end = _AtEnd(endings, longest, [request.prefix for request in batch])
        output_BT = self._model.generate(
            input_ids=input_ids_BT.to(self._device),
            attention_mask=attention_mask_BT.to(self._device),
            max_new_tokens=sampling.max_completion_tokens - min(len(request.prefix) for request in batch),
            do_sample=False,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([at_end]),
            eos_token_id=list(self._renderer.eos_token_ids),
            pad_token_id=self._renderer.pad_token_id,
        )
        logprobs_BT = torch.stack(sampler.logprobs, dim=1).tolist()
        return [
            self._completion(
                request, output_BT[row, longest:].tolist(), logprobs_BT[row], endings, at_end.stopped[row]
            )
            for row, request in enumerate(batch)
        ]

    def _completion(
        self,
        request: SampleRequest,
        token_ids: list[int],
        logprobs: list[float],
        endings: Endings,
        stopped: int | None,
    ) -> Completion:
        """The completion up to the first EOS, the end of a stop string or its limit; what follows is not part of it."""
        eos = (place + 1 for place, token in enumerate(token_ids) if token in self._renderer.eos_token_ids)
        limit = endings.limit - len(request.prefix)
        ends = [end for end in (next(eos, None), stopped) if end is not None and end <= limit]
        kept = token_ids[: min(ends, default=limit)]
        return endings.completion(
            request,
            [*request.prefix, *kept],
            "stop" if ends else "length",
            logprobs[: len(kept)] if request.with_logprobs else None,
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place."""
        self._names.load(named_tensors)

    def sleep(self) -> None:
        """Does nothing: between batches the engine holds only its weights, which stay."""

    def close(self) -> None:
        """Free the model's memory."""
        del self._model, self._names


class _AtEnd(StoppingCriteria):
    """Ends a row at the token that completes a stop string, or at its own limit; records where a stop string ends."""

    def __init__(self, endings: Endings, start: int, prefixes: Sequence[Sequence[int]]) -> None:
        """New tokens begin at `start`; the prefixes are those of the rows' completions."""
        self._stop = endings.stop
        self._start = start
        self._prefixes = prefixes
        self._limits = [endings.limit - len(prefix) for prefix in prefixes]
        self.stopped: list[int | None] = [None] * len(prefixes)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        if self._stop:
            self._look_for_stop_strings(input_ids)
        length = input_ids.shape[1] - self._start
        is_done = [
            end is not None or length >= limit for end, limit in zip(self.stopped, self._limits, strict=True)
        ]
        return cast(torch.BoolTensor, torch.tensor(is_done, device=input_ids.device))

    def _look_for_stop_strings(self, input_ids_BT: torch.LongTensor) -> None:
        for row, token in enumerate(input_ids_BT[:, -1].tolist()):
            if self.stopped[row] is None and self._stop.may_complete(token):
                token_ids = input_ids_BT[row, self._start :].tolist()
                is_end = self._stop.end([*self._prefixes[row], *token_ids])
                self.stopped[row] = len(token_ids) if is_end else None


class _SeededSampler(LogitsProcessor):
    """Samples inside greedy `generate`: draws each row's token and gives all other tokens a score of -inf.

    `generate` itself draws a whole batch from one random stream. Here each row has its own, see
    common/engines/drawing.py.
    """

    def __init__(self, seeds: list[int], sampling: SamplingParams, device: torch.device) -> None:
        self._numbers_BT = numbers(streams(seeds, sampling.max_completion_tokens)).to(device)
        self._temperature = sampling.temperature
        warpers: dict[str, Any] = {  # in vLLM's order
            "min_p": MinPLogitsWarper,
            "top_k": TopKLogitsWarper,
            "top_p": TopPLogitsWarper,
        }
        self._warpers = [
            kind(sampling.cut_by[key]) for key, kind in warpers.items() if key in sampling.cut_by
        ]
        self.logprobs: list[torch.Tensor] = []
        """One tensor per step: the drawn tokens' log-probs under the sampling distribution, shape (B,)."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores_BV = scores.float()
        if not scores_BV.amax(-1).isfinite().all():  # the largest of a row with a NaN is NaN
            raise UserError(
                "the model's logits are not finite: if it is being trained, lower train.learning_rate or raise "
                "train.warmup_steps, and start again under another --run; if it is as given, set model.dtype = "
                '"float32"'
            )
        if self._temperature > 0:
            scores_BV = scores_BV / self._temperature
            for warp in self._warpers:
                scores_BV = warp(input_ids, scores_BV)
            numbers_B = self._numbers_BT[:, len(self.logprobs)]
            drawn_B = drawn_tokens(scores_BV.softmax(-1), numbers_B)[:, None]
        else:
            drawn_B = scores_BV.argmax(-1, keepdim=True)
        self.logprobs.append((scores_BV.gather(-1, drawn_B) - scores_BV.logsumexp(-1, keepdim=True))[:, 0])
        return cast(torch.FloatTensor, torch.full_like(scores, -torch.inf).scatter(-1, drawn_B, 0.0))
