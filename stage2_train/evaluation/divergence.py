"""KL(π‖π_ref) of models on their stored completions, which were drawn from π as in training.

One model is in memory at a time, and a few thousand completions. Shapes: _S sample.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.parity import Gap, engine_logprobs, judged
from common.rollout import Completion, Prompt
from common.store import SampleStore
from common.terminal.console import Terminal
from common.terminal.progress import Advance
from stage2_train.batch import TokenSequence, token_batches
from stage2_train.config import Config
from stage2_train.logprobs import LogprobModel, load_model, token_logprobs

AT_A_TIME = 2048
"""Completions in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The completions of a model on a benchmark that KL is measured on."""

    store: SampleStore
    prompts: Sequence[Prompt]
    num_samples: int

    def sequences(self) -> Iterator[tuple[list[str], list[TokenSequence]]]:
        """Their tokens with their prompts' ids, some at a time, always in the same order.

        Raises UserError if they were stored without tokens.
        """
        prompts = {prompt.id: prompt for prompt in self.prompts}
        ids = list(prompts)
        step = max(1, AT_A_TIME // self.num_samples)
        columns = [pl.col(name) for name in ("prompt_id", "sample_index", "completion_ids")]
        for start in range(0, len(ids), step):
            rows = self.store.samples_of(ids[start : start + step], columns)
            rows = rows.filter(pl.col("sample_index") < self.num_samples).unique(
                ["prompt_id", "sample_index"], keep="first", maintain_order=True
            )
            rows = rows.sort("prompt_id", "sample_index", maintain_order=True)
            if rows["completion_ids"].has_nulls():
                raise UserError(
                    f"{self.store.folder} holds completions without their token ids, which an earlier version left out "
                    "and KL needs; remove that folder: they are drawn again"
                )
            yield (
                rows["prompt_id"].to_list(),
                [
                    TokenSequence(
                        row=row,
                        prompt_token_ids=tuple(prompts[name].token_ids),
                        completion_token_ids=tuple(token_ids),
                    )
                    for row, (name, token_ids) in enumerate(
                        rows.select("prompt_id", "completion_ids").iter_rows()
                    )
                ],
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(π‖π_ref) in nats: per completion with its standard error over prompts, and per token."""

    kl_sequence: float
    kl_sequence_se: float
    kl_token: float
    by_prompt: dict[str, float]


def divergence(drawn: Drawn, ours_S: NDArray[np.float64], theirs_S: NDArray[np.float64]) -> Divergence:
    """KL from the log-probs of completions under the model and under the reference."""
    ids: list[str] = []
    tokens = 0
    for names, sequences in drawn.sequences():
        ids += names
        tokens += sum(len(each.completion_token_ids) for each in sequences)
    log_ratio_S = ours_S - theirs_S
    by_prompt = (
        pl.DataFrame({"prompt_id": ids, "log_ratio": log_ratio_S})
        .group_by("prompt_id", maintain_order=True)
        .agg(pl.col("log_ratio").mean())
    )
    means_P = by_prompt["log_ratio"].to_numpy()
    return Divergence(
        kl_sequence=float(log_ratio_S.mean()),
        kl_sequence_se=float(means_P.std(ddof=1) / math.sqrt(len(means_P))) if len(means_P) > 1 else 0.0,
        kl_token=float(log_ratio_S.sum() / tokens),
        by_prompt=dict(by_prompt.iter_rows()),
    )


class Scoring:
    """A model in memory that gives completions their log-probs at the training temperature."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module: LogprobModel = load_model(folder, config).to(self._device).eval()

    def of(self, drawn: Drawn, console: Terminal) -> NDArray[np.float64]:
        """ln π of each completion, in the order of `drawn.sequences`."""
        total = len(drawn.prompts) * drawn.num_samples

        def state(done: int) -> str:
            return f"{self._folder}: log-probs of {done:,}/{total:,} completions"

        with Advance(console, total, state) as progress:
            sums = [
                logprobs_K.sum()
                for _, some in drawn.sequences()
                for logprobs_K in self.by_token(some, progress.by)
            ]
        return np.array(sums, dtype=np.float64)

    @torch.no_grad()
    def by_token(
        self, sequences: Sequence[TokenSequence], advance: Callable[[int], None] = lambda _: None
    ) -> list[NDArray[np.float64]]:
        """The log-probs of each completion's tokens, arrays of shape (K,); tells how many are done at a time."""
        found: dict[int, NDArray[np.float64]] = {}
        budget = self._config.train.tokens_per_micro_batch
        for batch in token_batches([[sequence] for sequence in sequences], budget, pad_token_id=0):
            logprobs_K = token_logprobs(self._module, batch.to(self._device)).logprobs_K.double().cpu()
            parts = logprobs_K.split([len(sequences[row].completion_token_ids) for row in batch.rows])
            found |= {row: part.numpy() for row, part in zip(batch.rows, parts, strict=True)}
            advance(len(batch.rows))
        return [found[row] for row in range(len(sequences))]

    def say_whether_engine_agrees(
        self, checked: Sequence[tuple[Prompt, Completion]], console: Terminal
    ) -> None:
        """Compare with the engine's log-probs of a few completions, and warn if they are of another network."""
        if not checked:
            return
        sequences = [
            TokenSequence(
                row=row,
                prompt_token_ids=tuple(prompt.token_ids),
                completion_token_ids=completion.token_ids,
            )
            for row, (prompt, completion) in enumerate(checked)
        ]
        gap = Gap.between(
            [engine_logprobs(completion) for _, completion in checked],
            [each.tolist() for each in self.by_token(sequences)],
        )
        sides = (
            f"the engine ({self._config.engine.backend}) and a forward pass by transformers of {self._folder}"
        )
        temperature = self._config.sampling.temperature
        agrees, line = judged(gap, sides, dtype=self._config.model.dtype, temperature=temperature)
        console.print(line if agrees else f"warning: {line}: its accuracy is of another network than its KL")
