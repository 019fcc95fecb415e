"""Log-probs of completion tokens from hidden states, forward and backward: methods beside each other, on this device.

The output layer alone, with Qwen2.5-1.5B's width and vocabulary and random weights, as benchmarks.logprobs measures it
on a CPU. Memory is the peak above the inputs and includes the weight's gradient.
"""

from pathlib import Path

import torch

from benchmarks.flops import matrix_rate, settled
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.watch import GIB
from benchmarks.logprobs import Layer, Logprobs, chosen_way, naive
from stage2_train import logprobs

HIDDEN, VOCABULARY = 1536, 151_936
TOKENS = 8192
WAYS = ("ours", "ours 2^24", "ours 2^28", "ours 2^30", "checkpointed", "torch", "naive")
BLOCKS = (20, 22, 24, 26)
"""Binary logarithms of LOGITS_PER_BLOCK."""
REPETITIONS = 3
PRODUCTS = 3
"""Of the hidden states or logits with the weight: forward, and two backward."""
GRADIENT_ERROR = 0.02


def measure(findings: Findings, folder: Path) -> None:
    """Each way in turn; those that do not fit are shown as such."""
    tokens, hidden, vocabulary = (32, 64, 4608) if findings.is_tiny else (TOKENS, HIDDEN, VOCABULARY)
    device = torch.device(findings.device)
    rate = matrix_rate(torch.bfloat16, device)
    torch.manual_seed(0)
    layer = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=torch.bfloat16, device=device)
    hidden_KH = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device, requires_grad=True)
    target_K = torch.randint(vocabulary, (tokens,), device=device)
    inputs = (layer, hidden_KH, target_K)
    least = PRODUCTS * 2 * tokens * hidden * vocabulary / rate
    norms: dict[str, float] = {}

    def row(way: str, block: int, compute: Logprobs) -> None:
        try:
            seconds, peak, norm = best_of(compute, *inputs)
        except torch.OutOfMemoryError:
            findings.row("Forward and backward", way=way, block=f"2^{block}", s=None)
            return
        except (ImportError, AttributeError):
            findings.remark(f"{way}: this torch does not have it")
            return
        norms[f"{way}, 2^{block}"] = norm
        findings.row(
            "Forward and backward",
            way=way,
            block=f"2^{block}",
            s=seconds,
            over_the_products=seconds / least,
            peak_GiB=peak / GIB,
            gradient_norm=norm,
        )

    default = logprobs.LOGITS_PER_BLOCK
    for way in WAYS:
        row(way, default.bit_length() - 1, chosen_way(way))
    for block in BLOCKS:
        logprobs.LOGITS_PER_BLOCK = 2**block
        row("ours", block, chosen_way("ours"))
    logprobs.LOGITS_PER_BLOCK = default
    few = slice(0, min(tokens, 512))
    # The naive way in float32 has the last word.
    exact = gradient_norm(naive, layer.float(), hidden_KH[few].detach().float(), target_K[few])
    layer.bfloat16()
    ours = gradient_norm(chosen_way("ours"), layer, hidden_KH[few].detach(), target_K[few])
    findings.at_most("gradient norm off that in float32, relative", abs(ours / exact - 1), GRADIENT_ERROR)
    findings.holds("all ways give one gradient norm", max(norms.values()) <= 1.02 * min(norms.values()))


def best_of(
    compute: Logprobs, layer: Layer, hidden_KH: torch.Tensor, target_K: torch.Tensor
) -> tuple[float, int, float]:
    """Seconds, bytes above the inputs, and the norm of the weight's gradient; the best of some, after one."""
    on_gpu = hidden_KH.is_cuda
    seconds = []
    held = peak = 0
    for _ in range(REPETITIONS + 1):
        layer.weight.grad = hidden_KH.grad = None
        if on_gpu:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = settled()
        logprobs_K, _ = compute(layer, hidden_KH, target_K)
        logprobs_K.sum().backward()
        seconds.append(settled() - began)
        peak = torch.cuda.max_memory_allocated() - held if on_gpu else 0
        del logprobs_K
    assert layer.weight.grad is not None
    return min(seconds[1:]), peak, float(layer.weight.grad.float().norm())


def gradient_norm(compute: Logprobs, layer: Layer, hidden_KH: torch.Tensor, target_K: torch.Tensor) -> float:
    """The norm of the weight's gradient."""
    layer.weight.grad = None
    compute(layer, hidden_KH.requires_grad_(), target_K)[0].sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    norm = float(gradient.float().norm())
    layer.weight.grad = None
    return norm
