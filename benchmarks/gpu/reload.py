"""Sleep, wake and reload, in stage 2's order, with the traps that are known of vLLM on a GPU.

Greedy tokens and their log-probs after the same weights, others, and the first ones again; each compared with a plain
forward pass of the weights that the engine should have. Weights that are padded, tied, or read by captured CUDA graphs
are the ones that others have seen go wrong. On a CPU the engine does not sleep; the rest is the same.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.models import TINY, engine_values, settings, written_model
from benchmarks.gpu.watch import GIB, TimedEngine, free_bytes
from benchmarks.scale import qwen
from benchmarks.training import made_up_data
from common.config import SamplingParams
from common.engines.vllm_engine import VllmEngine
from common.parity import BOUNDS, Gap, engine_logprobs
from common.rollout import Completion, Prompt, SampleRequest
from stage2_train.ranks import join_ranks

PROMPTS, PROMPT, COMPLETION = 16, 40, 48
VOCABULARY = 32_000
ODD = 3
"""Added to a vocabulary that is a multiple of 64."""
SPREAD = 0.05
"""Of the weights: as they are made by default, all tokens would be almost equally likely."""
DTYPE = "bfloat16"
LEAST_FREED = 0.8
"""Of what the engine took, after it has fallen asleep; its CUDA context and graphs stay."""
SMALLEST_CHANGE = 0.1
"""Nats on average between the log-probs of two sets of weights, so that they cannot be taken for each other."""


def measure(
    findings: Findings, folder: Path, *, eager: bool, tied: bool, odd: bool, architecture: str = "qwen2"
) -> None:
    """One engine, through all of it."""
    model_folder = spread_model(
        folder, is_tiny=findings.is_tiny, tied=tied, odd=odd, architecture=architecture
    )
    config = settings(
        model_folder,
        {
            "model.dtype": DTYPE,
            "data.max_prompt_tokens": PROMPT,
            "sampling.max_completion_tokens": COMPLETION,
            **engine_values(is_tiny=findings.is_tiny, share=0.3),
            "engine.max_num_seqs": PROMPTS,
            "engine.enforce_eager": str(eager).lower(),
        },
    )
    ranks = join_ranks(config.seed)  # as in training: vLLM is the guest
    data = made_up_data(model_folder, config, [PROMPT] * PROMPTS)
    plain = Plain(model_folder, data.prompts, ranks.device)
    free = free_bytes()
    timed = TimedEngine(lambda: VllmEngine(config, model_folder, data.renderer, beside_trainer=True))
    taken = free - free_bytes()
    findings.row("Engine", what="start", s=timed.seconds["build"], GiB=taken / GIB)
    findings.remark(facts(timed.engine))
    original, changed = plain.weights(), plain.changed_weights()
    first = Greedy(timed, data.prompts)
    findings.row("Log-probs", after="start", **plain.gap(first, original))

    def again(name: str, weights: dict[str, Tensor]) -> Greedy:
        timed.load_weights(iter(weights.items()))
        found = Greedy(timed, data.prompts)
        gap = plain.gap(found, weights)
        findings.row("Log-probs", after=name, s=timed.seconds["load"], **gap)
        bound = BOUNDS[DTYPE]
        findings.at_most(f"{name}: engine and plain forward, nats on average", gap["mean"], bound.mean)
        findings.at_most(f"{name}: the same, at most", gap["largest"], bound.largest)
        return found

    for asleep in (False, True):
        when = "asleep before" if asleep else "awake"

        def rest(number: int, asleep: bool = asleep) -> None:
            if asleep:
                timed.sleep()
                if findings.device == "cuda":
                    share = timed.freed / taken
                    findings.row(
                        "Engine", what=f"sleep {number}", s=timed.seconds["sleep"], GiB=timed.freed / GIB
                    )
                    findings.at_least(
                        f"sleep {number}: share of its memory given back",
                        share,
                        LEAST_FREED,
                        of_the_hardware=True,
                    )
                gc.collect()  # as a trainer may while the engine sleeps
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

        rest(1)
        findings.holds(
            f"{when}, the same weights: the same tokens", again(f"{when}, same", original) == first
        )
        rest(2)
        other = again(f"{when}, changed", changed)
        findings.holds(f"{when}, changed weights: other tokens", other != first)
        rest(3)
        back = again(f"{when}, back", original)
        findings.holds(f"{when}, the first weights again: the first tokens", back == first)
        findings.at_most(f"{when}, back: distance from the first log-probs", back.distance(first), 1e-3)
    distance = plain.gap(first, changed)["mean"]
    findings.at_least("nats on average between the two sets of weights", distance, SMALLEST_CHANGE)
    timed.sleep()
    free = free_bytes()
    timed.close()
    findings.row(
        "Engine", what="closed while asleep, beyond what sleep gave back", GiB=(free_bytes() - free) / GIB
    )


def facts(engine: Any) -> str:
    """Which kernels and which of its model runners vLLM has chosen."""
    inside = engine.llm.llm_engine
    layers = inside.vllm_config.compilation_config.static_forward_context.values()
    found = {
        f"{type(layer.impl).__name__} version {getattr(layer.impl, 'vllm_flash_attn_version', None)}"
        for layer in layers
        if hasattr(layer, "impl")
    }
    runner = type(inside.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
    return f"attention: {', '.join(sorted(found))}; model runner: {runner.__module__}"


class Greedy:
    """The most likely completions of some prompts, with their log-probs."""

    def __init__(self, engine: TimedEngine, prompts: list[Prompt]) -> None:
        requests = [
            SampleRequest(key=key, prompt_token_ids=tuple(prompt.token_ids), seed=0, with_logprobs=True)
            for key, prompt in enumerate(prompts)
        ]
        sampling = SamplingParams(temperature=0.0, max_completion_tokens=COMPLETION)
        found = {each.key: each for each in engine.generate(requests, sampling)}
        self.completions: list[Completion] = [found[key] for key in range(len(prompts))]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Greedy)
        return [each.token_ids for each in self.completions] == [each.token_ids for each in other.completions]

    __hash__ = None  # type: ignore[assignment]

    @property
    def logprobs(self) -> list[list[float]]:
        """Of each completion's tokens."""
        return [list(engine_logprobs(each)) for each in self.completions]

    def distance(self, other: "Greedy") -> float:
        """The largest difference of log-probs; infinite if the tokens differ."""
        return Gap.between(self.logprobs, other.logprobs).largest if self == other else float("inf")


class Plain:
    """The model of transformers, to compare with."""

    def __init__(self, folder: Path, prompts: list[Prompt], device: torch.device) -> None:
        from common.model.pretrained import load_causal_lm

        model: Any = load_causal_lm(folder, DTYPE)
        self._model = model.to(device).eval()
        self._prompts = prompts

    def weights(self) -> dict[str, Tensor]:
        """Copies of its weights by the names of a checkpoint, tied ones once, as the trainer gives them."""
        return {name: weight.detach().clone() for name, weight in self._model.named_parameters()}

    def changed_weights(self) -> dict[str, Tensor]:
        """Other weights of the same size; the norms' stay."""
        generator = torch.Generator().manual_seed(1)

        def noisy(weight: Tensor) -> Tensor:
            noise = torch.randn(weight.shape, generator=generator)
            return (weight.float() + 0.3 * weight.float().std() * noise.to(weight.device)).to(weight.dtype)

        return {name: noisy(weight) if weight.ndim > 1 else weight for name, weight in self.weights().items()}

    @torch.inference_mode()
    def gap(self, found: Greedy, weights: dict[str, Tensor]) -> dict[str, float]:
        """The engine's log-probs against those of these weights: nats on average, and at most."""
        own = dict(self._model.named_parameters())
        for name, weight in weights.items():
            own[name].copy_(weight)
        gap = Gap.between(found.logprobs, list(self._logprobs(found)))
        return {"mean": gap.mean, "largest": gap.largest}

    def _logprobs(self, found: Greedy) -> Iterator[list[float]]:
        for prompt, completion in zip(self._prompts, found.completions, strict=True):
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]], device=self._model.device)
            count = len(completion.token_ids)
            logits_KV = self._model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1].float()
            yield logits_KV.log_softmax(-1).gather(-1, ids[0, -count:, None])[:, 0].tolist()


def spread_model(
    folder: Path, *, is_tiny: bool, tied: bool, odd: bool, dtype: str = DTYPE, architecture: str = "qwen2"
) -> Path:
    """A model of a hundred million weights, or of fewer, whose next tokens are not equally likely."""
    document = TINY if is_tiny else qwen(768, 12, 2048, 12, 4, VOCABULARY, tied=tied)
    vocabulary = document["vocab_size"] + (ODD if odd else 0)
    kind = f"{architecture}-{'tied' if tied else 'untied'}"
    name = f"spread-{'tiny-' if is_tiny else ''}{kind}-{vocabulary}-{dtype}"
    changes = {
        "model_type": architecture,
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "head_dim": document["hidden_size"] // document["num_attention_heads"],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "initializer_range": SPREAD,
        "dtype": dtype,
    }
    return written_model(folder, name, document | changes)
