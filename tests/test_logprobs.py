"""Chunked log-probs against the textbook formula on full logits."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stage2_train import logprobs
from stage2_train.batch import TokenBatch, TokenSequence, token_batches
from stage2_train.logprobs import LogprobModel, VocabularyHead, token_logprobs

PAD = 0


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    # In double precision a wrong formula stands out from rounding.
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)


def ragged(vocabulary: int, count: int = 6) -> list[TokenSequence]:
    rng = random.Random(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(PAD + 1, vocabulary) for _ in range(rng.randint(1, most)))

    return [
        TokenSequence(row=place, prompt_token_ids=tokens(9), completion_token_ids=tokens(12))
        for place in range(count)
    ]


def naive(model: PreTrainedModel, sequence: TokenSequence, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a completion, alone, from full logits."""
    ids_T = torch.tensor(sequence.prompt_token_ids + sequence.completion_token_ids)
    logits_TV = model(input_ids=ids_T[None]).logits[0].float() / temperature
    # The logits before a token predict it.
    log_softmax_TV = logits_TV.log_softmax(-1)[len(sequence.prompt_token_ids) - 1 : -1]
    target_T = torch.tensor(sequence.completion_token_ids)
    entropy_T = -(log_softmax_TV.exp() * log_softmax_TV).sum(-1)
    return log_softmax_TV.gather(-1, target_T[:, None])[:, 0], entropy_T


def one_batch(sequences: list[TokenSequence]) -> TokenBatch:
    (batch,) = token_batches([sequences], 10**6, PAD)
    return batch


def chunks_of(tokens: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", tokens * model.config.vocab_size)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 10_000])
def test_values_and_entropies_are_the_textbook_ones(
    model: PreTrainedModel, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(chunk, model, monkeypatch)
    sequences = ragged(model.config.vocab_size)
    batch = one_batch(sequences)
    with torch.no_grad():
        found = token_logprobs(LogprobModel(model, temperature), batch)
        expected = [naive(model, sequences[place], temperature) for place in batch.rows]
    torch.testing.assert_close(
        found.logprobs_K, torch.cat([value for value, _ in expected]), rtol=0, atol=2e-6
    )
    torch.testing.assert_close(
        found.entropy_K, torch.cat([value for _, value in expected]), rtol=0, atol=5e-6
    )
    assert not found.entropy_K.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 10_000])
def test_gradients_are_the_textbook_ones(
    model: PreTrainedModel, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(chunk, model, monkeypatch)
    sequences = ragged(model.config.vocab_size)
    batch = one_batch(sequences)
    weights_K = torch.linspace(-1, 2, int(batch.is_completion_BT.sum()))
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(
        (weights_K * token_logprobs(LogprobModel(model, temperature), batch).logprobs_K).sum(),
        list(parameters.values()),
    )
    values_K = torch.cat([naive(model, sequences[place], temperature)[0] for place in batch.rows])
    expected = torch.autograd.grad((weights_K * values_K).sum(), list(parameters.values()))
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max()), name


@pytest.mark.parametrize("chunk", [3, 10_000])
def test_gradients_of_a_layer_with_a_bias_are_the_textbook_ones(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch.nn.Linear(8, 50).double()
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", chunk * 50)
    monkeypatch.setattr(logprobs, "LOGITS_PER_BLOCK", 7)
    hidden_KH = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    target_K, weights_K = torch.arange(0, 40, 2), torch.linspace(-1, 2, 20)
    leaves = [hidden_KH, layer.weight, layer.bias]
    found = torch.autograd.grad(
        (weights_K * VocabularyHead(layer, 0.7)(hidden_KH, target_K)[0]).sum(), leaves
    )
    values_K = (layer(hidden_KH) / 0.7).log_softmax(-1).gather(-1, target_K[:, None])[:, 0]
    for ours, theirs in zip(found, torch.autograd.grad((weights_K * values_K).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def relative_errors(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How far the output layer is from double precision on the same weights, by the Euclidean norm."""
    vocabulary, hidden, positions = 1000, 64, 300
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", chunk * vocabulary)
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)
    layer.weight.data.normal_(std=0.3, generator=generator)
    hidden_KH = torch.randn(positions, hidden, generator=generator).to(dtype).requires_grad_()
    target_K = torch.randint(0, vocabulary, (positions,), generator=generator)
    weights_K = torch.randn(positions, generator=generator)
    logprobs_K, entropy_K = VocabularyHead(layer, 0.7)(hidden_KH, target_K)
    assert logprobs_K.dtype == entropy_K.dtype == torch.float32
    gradients = torch.autograd.grad((weights_K * logprobs_K).sum(), [hidden_KH, layer.weight])
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_KH, layer.weight)]
    log_softmax_KV = (exact[0] @ exact[1].T / 0.7).log_softmax(-1)
    exact_logprobs_K = log_softmax_KV.gather(-1, target_K[:, None])[:, 0]
    exact_entropy_K = -(log_softmax_KV.exp() * log_softmax_KV).sum(-1)
    exact_gradients = torch.autograd.grad((weights_K * exact_logprobs_K).sum(), exact)
    pairs = {
        "log-probs": (logprobs_K, exact_logprobs_K),
        "entropy": (entropy_K, exact_entropy_K),
        "hidden": (gradients[0], exact_gradients[0]),
        "weight": (gradients[1], exact_gradients[1]),
    }
    return {
        name: float(((ours - theirs).norm() / theirs.norm()).detach())
        for name, (ours, theirs) in pairs.items()
    }


@pytest.mark.parametrize("chunk", [3, 40, 300])
def test_float32_is_exact_to_its_rounding_however_the_vocabulary_is_cut(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, error in relative_errors(torch.float32, chunk, monkeypatch).items():
        assert error < 2e-6, name  # measured: 5e-7


@pytest.mark.parametrize("chunk", [3, 40, 300])
def test_bfloat16_is_exact_to_its_rounding_however_the_vocabulary_is_cut(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What autograd's own gradient is off by, in one piece: the logits are rounded to 8 bits.
    limits = {"log-probs": 2e-3, "entropy": 8e-3, "hidden": 8e-3, "weight": 8e-3}
    for name, error in relative_errors(torch.bfloat16, chunk, monkeypatch).items():
        assert error < limits[name], name


@pytest.mark.parametrize("chunk", [4, 10_000])
def test_logits_stay_under_the_limit_and_the_last_are_computed_once(
    model: PreTrainedModel, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(chunk, model, monkeypatch)
    widths: list[int] = []
    batch = one_batch(ragged(model.config.vocab_size))
    positions, compute = int(batch.is_completion_BT.sum()), logprobs._logits

    def watched(*arguments: Any) -> Tensor:
        logits_KC = compute(*arguments)
        assert len(logits_KC) == positions
        widths.append(logits_KC.shape[1])
        return logits_KC

    monkeypatch.setattr(logprobs, "_logits", watched)
    token_logprobs(LogprobModel(model, 1.0), batch).logprobs_K.sum().backward()
    assert max(widths) * positions <= chunk * model.config.vocab_size
    slices = (len(widths) + 1) // 2
    assert (slices > 1) == (chunk == 4)
    assert sum(widths[:slices]) == model.config.vocab_size
    assert widths[slices:] == widths[: slices - 1][::-1]


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    layer = torch.nn.Linear(8, 50).requires_grad_(False)
    hidden_KH = torch.randn(20, 8, requires_grad=True)
    VocabularyHead(layer, 1.0)(hidden_KH, torch.arange(20))[0].sum().backward()
    assert layer.weight.grad is None
    assert hidden_KH.grad is not None
    assert float(hidden_KH.grad.abs().max()) > 0


def test_a_second_backward_pass_is_refused() -> None:
    layer = torch.nn.Linear(8, 50)
    loss = VocabularyHead(layer, 1.0)(torch.randn(20, 8), torch.arange(20))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_padding_and_neighbours_change_nothing(model: PreTrainedModel) -> None:
    module = LogprobModel(model, 1.0)
    sequences = ragged(model.config.vocab_size)
    together = one_batch(sequences)
    with torch.no_grad():
        found = token_logprobs(module, together)
        for row, of in enumerate(together.rows):
            alone = token_logprobs(module, one_batch([replace(sequences[of], row=0)]))
            torch.testing.assert_close(
                found.logprobs_K[together.sequence_of_K == row], alone.logprobs_K, rtol=0, atol=2e-6
            )
        other_padding = TokenBatch(
            rows=together.rows,
            input_ids_BT=torch.nn.functional.pad(
                torch.where(together.input_ids_BT == PAD, 7, together.input_ids_BT), (0, 5), value=7
            ),
            is_completion_BT=torch.nn.functional.pad(together.is_completion_BT, (0, 5), value=False),
        )
        again = token_logprobs(module, other_padding)
    torch.testing.assert_close(again.logprobs_K, found.logprobs_K, rtol=0, atol=2e-6)


def test_a_uniform_policy_has_the_entropy_of_its_vocabulary(model: PreTrainedModel) -> None:
    vocabulary = model.config.vocab_size
    batch = one_batch(ragged(vocabulary))
    head = model.lm_head.weight.detach().clone()
    try:
        model.lm_head.weight.data.zero_()
        with torch.no_grad():
            found = token_logprobs(LogprobModel(model, 0.7), batch)
    finally:
        model.lm_head.weight.data.copy_(head)
    uniform = float(torch.tensor(float(vocabulary)).log())
    assert found.entropy_K.tolist() == pytest.approx([uniform] * len(found.entropy_K), abs=1e-5)
    assert found.logprobs_K.tolist() == pytest.approx([-uniform] * len(found.logprobs_K), abs=1e-5)
