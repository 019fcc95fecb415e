"""Log-probs of completion tokens, forward and backward: time, memory and padding compared with other methods.

    python -m benchmarks.logprobs

Measures the output layer alone, with random weights and Qwen2.5's vocabulary. Each method and repetition runs in a
process of its own, to separate the peaks of resident memory; repetitions are interleaved. Seconds are a single thread's
processor time, which other jobs disturb least. Memory is that of a process above its inputs, including the weight's
gradient.

"naive" is autograd on full logits; "checkpointed" the same in chunks of positions whose logits are recomputed in the
backward pass; "torch" is torch's `linear_cross_entropy` in chunks of as many logits as ours (without entropy). A number
of elements after "ours" replaces `LOGITS_PER_CHUNK`.

Then measures the share of padding in micro-batches, for log-normal completion lengths cut off at 1,024: as
`token_batches` cuts them, and with the fewest micro-batches.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from benchmarks.processes import alone, forget_peak, peak_mib, resident_mib, rotations
from benchmarks.tables import markdown
from stage2_train import logprobs
from stage2_train.batch import TokenSequence, token_batches

WAYS = ("naive", "checkpointed", "torch", "ours", "ours 2^24", "ours 2^28")
TEMPERATURE = 0.7

Layer = torch.nn.Linear
Logprobs = Callable[[Layer, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the layer, hidden states and targets to log-probs and entropies (torch's way: zeros)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One forward and backward pass."""

    forward_seconds: float
    backward_seconds: float
    peak_mib: float
    """Memory above what the process held before."""
    checksum: float
    """Norm of the gradients, to see that the methods agree."""


def naive(
    layer: Layer, hidden_KH: Tensor, target_K: Tensor, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    logits_KV = linear(hidden_KH, layer.weight).float() / temperature
    normaliser_K = logits_KV.logsumexp(-1)
    logprobs_K = logits_KV.gather(-1, target_K[:, None])[:, 0] - normaliser_K
    with torch.no_grad():
        probabilities_KV = (logits_KV - normaliser_K[:, None]).exp()
        entropy_K = normaliser_K - (probabilities_KV * logits_KV).sum(-1)
    return logprobs_K, entropy_K


def checkpointed(layer: Layer, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
    size = logprobs.LOGITS_PER_CHUNK // layer.out_features
    if len(target_K) <= size:
        return naive(layer, hidden_KH, target_K)
    parts = [
        checkpoint(naive, layer, hidden, target, use_reentrant=False)
        for hidden, target in zip(hidden_KH.split(size), target_K.split(size), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def of_torch(layer: Layer, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import linear_cross_entropy  # not in every release

    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=logprobs.LOGITS_PER_CHUNK // layer.out_features, chunking_method=None
    )
    scaled_KH = hidden_KH / TEMPERATURE
    losses_K = linear_cross_entropy(scaled_KH, layer.weight, target_K, reduction="none", options=options)
    return -losses_K.float(), torch.zeros(len(target_K))


def ours(layer: Layer, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = logprobs.VocabularyHead(layer, TEMPERATURE)(hidden_KH, target_K)
    return found


def chosen_way(way: str) -> Logprobs:
    """The function of one of WAYS; sets how many logits ours has at a time, for the rest of the process."""
    name, _, elements = way.partition(" 2^")
    logprobs.LOGITS_PER_CHUNK = 2 ** int(elements or 26)
    return {"naive": naive, "checkpointed": checkpointed, "torch": of_torch, "ours": ours}[name]


def measure(way: str, dtype: str, tokens: int, hidden: int, vocabulary: int) -> Result:
    """One forward and backward pass, after one on a few tokens."""
    compute = chosen_way(way)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype))
    hidden_KH = torch.randn(tokens, hidden, dtype=layer.weight.dtype, requires_grad=True)
    target_K = torch.randint(vocabulary, (tokens,))
    weights_K = torch.randn(tokens)
    small = torch.nn.Linear(hidden, 1000, bias=False, dtype=layer.weight.dtype)
    compute(small, hidden_KH[:8].detach().requires_grad_(), target_K[:8] % 1000)[0].sum().backward()
    # The peak so far is of drawing the weights; what matters is the one to come.
    held = resident_mib()
    forget_peak()
    began = time.process_time()
    logprobs_K, _ = compute(layer, hidden_KH, target_K)
    middle = time.process_time()
    (weights_K * logprobs_K).sum().backward()
    ended = time.process_time()
    assert layer.weight.grad is not None
    return Result(
        forward_seconds=middle - began,
        backward_seconds=ended - middle,
        peak_mib=peak_mib() - held,
        checksum=float(layer.weight.grad[target_K].double().norm()),
    )


def padding_table(budgets: Sequence[int], sequences: int) -> str:
    """The share of padding in the micro-batches of one optimizer step."""
    rng = np.random.default_rng(0)
    completions = np.minimum(rng.lognormal(5.0, 1.0, sequences).astype(int) + 1, 1024)
    prompts = np.clip(rng.lognormal(4.6, 0.5, sequences).astype(int), 20, 512)
    units = [
        [TokenSequence(row=row, prompt_token_ids=(0,) * prompt, completion_token_ids=(0,) * completion)]
        for row, (prompt, completion) in enumerate(zip(prompts.tolist(), completions.tolist(), strict=True))
    ]
    lengths = sorted((prompts + completions).tolist(), reverse=True)
    real = sum(lengths)

    def cell(padded: Sequence[int]) -> str:
        return f"{len(padded)} micro-batches, {sum(padded) / real - 1:.1%} more tokens"

    rows = [
        [
            f"{budget:,}",
            cell(fewest_micro_batches(lengths, budget)),
            cell([tokens.input_ids_BT.numel() for tokens in token_batches(units, budget, 0)]),
        ]
        for budget in budgets
    ]
    return (
        f"{sequences} sequences, prompts {np.median(prompts):.0f} and completions {np.median(completions):.0f} "
        f"tokens in the median, {completions.max()} at most; {lengths[0] * sequences / real - 1:.0%} more tokens than "
        "real ones in one padded batch\n\n"
        + markdown(["tokens_per_micro_batch", "fewest micro-batches", "as `token_batches` cuts"], rows)
    )


def fewest_micro_batches(lengths: Sequence[int], budget: int) -> list[int]:
    """The padded tokens of each micro-batch, if each takes as many of the longest remaining sequences as fit."""
    padded = []
    first = 0
    while first < len(lengths):
        count = min(max(1, budget // lengths[first]), len(lengths) - first)
        padded.append(count * lengths[first])
        first += count
    return padded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    chosen = parser.parse_args()
    shape = (chosen.dtype, chosen.tokens, chosen.hidden, chosen.vocabulary)
    results: dict[str, list[Result]] = {way: [] for way in WAYS}
    for _, way in rotations(WAYS, chosen.repetitions):
        results[way].append(alone(measure, way, *shape))
    print(
        f"{chosen.tokens:,} tokens, hidden {chosen.hidden:,}, vocabulary {chosen.vocabulary:,}, "
        f"{chosen.dtype}; medians of {chosen.repetitions}; ratios of each repetition to its naive one\n"
    )
    rows = []
    for way, found in results.items():
        ratio = statistics.median(
            (one.forward_seconds + one.backward_seconds) / (base.forward_seconds + base.backward_seconds)
            for one, base in zip(found, results["naive"], strict=True)
        )
        forward, backward, peak = (
            statistics.median(getattr(one, field) for one in found)
            for field in ("forward_seconds", "backward_seconds", "peak_mib")
        )
        cells = [f"{forward:.2f}", f"{backward:.2f}", f"{ratio:.2f}", f"{peak:,.0f}"]
        rows.append([way, *cells, f"{found[0].checksum:.4f}"])
    print(markdown(["way", "forward, s", "backward, s", "time ratio", "peak, MiB", "gradient norm"], rows))
    print(f"\n{padding_table([2048, 4096, 16384], 128)}")


if __name__ == "__main__":
    main()
