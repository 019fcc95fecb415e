"""Check that an engine samples from the distribution that a plain forward pass of the same weights computes.

Both stages compare log-probs of the same completions. A difference beyond rounding means that one of the two reads the
model wrongly: V̂* and the gradient would be those of another policy, and no other figure would show it.

Shapes: _K completion token, _V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import RunConfig, SamplingParams
from common.errors import UserError
from common.provenance import Allowance
from common.rollout import Completion, Prompt, SampleRequest
from common.seeds import derive_seed

if TYPE_CHECKING:
    from common.engines import RolloutEngine

PARITY = "parity"
"""The name by which --allow-mismatch accepts a gap."""
COMPLETIONS = 4
"""Completions that are compared."""
TOKENS = 64
"""Tokens that are compared of each completion, at most."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest allowed gap of log-probs at temperature 1, in nats: of a token, and of the mean over tokens."""

    largest: float
    mean: float

    def at(self, temperature: float) -> "Bound":
        """The bound at a temperature: a temperature below 1 scales up the logits, and their rounding with them."""
        stretch = max(1.0, 1 / temperature)
        return Bound(largest=stretch * self.largest, mean=stretch * self.mean)


BOUNDS = {"float32": Bound(largest=1e-3, mean=1e-3), "bfloat16": Bound(largest=1.0, mean=0.05)}
"""Bounds by the model's dtype; docs/evidence/models.md has measured gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The difference between two lists of log-probs, in nats per token."""

    largest: float
    mean: float
    tokens: int

    @classmethod
    def between(cls, ours: Iterable[Sequence[float]], theirs: Iterable[Sequence[float]]) -> "Gap":
        """The gap between log-probs of the same tokens; a single nan makes both figures nan."""
        pairs = zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True)
        gaps = [abs(a - b) for a, b in pairs]
        if any(math.isnan(gap) for gap in gaps):
            return cls(largest=math.nan, mean=math.nan, tokens=len(gaps))
        return cls(largest=max(gaps, default=0.0), mean=sum(gaps) / max(len(gaps), 1), tokens=len(gaps))

    @classmethod
    def worst(cls, gaps: Sequence["Gap"]) -> "Gap":
        """The largest of several gaps, and their mean over all tokens."""
        tokens = sum(gap.tokens for gap in gaps)
        mean = sum(gap.mean * gap.tokens for gap in gaps) / max(tokens, 1)
        largest = max((gap.largest for gap in gaps), key=lambda gap: math.inf if math.isnan(gap) else gap)
        return cls(largest=largest, mean=mean, tokens=tokens)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.mean:.1e} nats apart on average, {self.largest:.1e} at most"

    def is_within(self, bound: Bound) -> bool:
        """False if a log-prob was nan."""
        return self.largest <= bound.largest and self.mean <= bound.mean


def accepted_gaps(lines: Iterable[str]) -> list[str]:
    """The accepted mismatches of a file that are gaps."""
    return [line for line in lines if line.startswith(f"{PARITY}:")]


def draw_compared(
    engine: "RolloutEngine", prompts: Sequence[Prompt], config: RunConfig, *, temperature: float
) -> list[tuple[Prompt, Completion]]:
    """Short completions of the first few prompts, with the engine's log-probs."""
    chosen = prompts[:COMPLETIONS]
    requests = [
        SampleRequest(
            key=number,
            prompt_token_ids=tuple(prompt.token_ids),
            seed=derive_seed(config.seed, "check", prompt.id),
            with_logprobs=True,
        )
        for number, prompt in enumerate(chosen)
    ]
    sampling = SamplingParams(
        temperature=temperature, max_completion_tokens=min(TOKENS, config.sampling.max_completion_tokens)
    )
    found = {each.key: each for each in engine.generate(requests, sampling)}
    return [(prompt, found[number]) for number, prompt in enumerate(chosen)]


def engine_logprobs(completion: Completion) -> Sequence[float]:
    """The engine's log-probs of a completion's tokens; nan if it has not given any."""
    return completion.sampled_logprobs or [math.nan] * len(completion.token_ids)


def judged(gap: Gap, sides: str, *, dtype: str, temperature: float) -> tuple[bool, str]:
    """Whether a gap is within the bound of the dtype, and one line on the result; `sides` names both sides."""
    bound = BOUNDS[dtype].at(temperature or 1.0)
    if gap.is_within(bound):
        return True, f"{sides} agree: {gap}"
    return False, (
        f"parity: {sides} give the same {gap.tokens} tokens log-probs that differ by {gap.mean:.2g} nats on average "
        f"and {gap.largest:.2g} at most, where {dtype} allows {bound.mean:g} and {bound.largest:g}"
    )


def refuse_gap(gap: Gap, sides: str, config: RunConfig, *, allowance: Allowance, remedy: str) -> str:
    """Raise UserError for a gap beyond the bound of the model's dtype, unless it is allowed.

    Returns one line on the result.
    """
    dtype = config.model.dtype
    agrees, line = judged(gap, sides, dtype=dtype, temperature=config.sampling.temperature)
    if agrees:
        return line
    if allowance.permits(PARITY, line):
        return f"accepted: {line}"
    backend = config.engine.backend
    other = "transformers" if backend == "vllm" else "vllm"
    finer = (
        ""
        if dtype == "float32"
        else ', or model.dtype = "float32", which tells rounding from a wrong network'
    )
    raise UserError(
        f"{line}: one of them computes another network than the checkpoint's, so rewards would be learnt for the wrong "
        f'policy. Try engine.backend = "{other}"{finer}; {remedy}. Please report it with this line and the model\'s '
        f"config.json. To continue anyway: --allow-mismatch {PARITY}"
    )


def plain_logprobs(
    folder: Path, dtype: str, temperature: float, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """Log-probs by the model's own forward pass in main memory; `sequences` are token ids of prompt and completion."""
    import torch

    from common.model.pretrained import load_causal_lm

    model = load_causal_lm(folder, dtype).eval()
    found = []
    with torch.inference_mode():
        for prompt, completion in sequences:
            ids = torch.tensor([[*prompt, *completion]])
            count = len(completion)
            logits_KV = model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1].float()
            log_probs_KV = (logits_KV / temperature).log_softmax(-1)
            found.append(log_probs_KV.gather(-1, ids[0, -count:, None])[:, 0].tolist())
    return found
