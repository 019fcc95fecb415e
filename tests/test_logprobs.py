"""Chunked log-probs against the textbook formula on full logits."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from stage2_train import logprobs
from stage2_train.batch import TokenBatch, TokenSequence, token_batches
from stage2_train.logprobs import LogprobModel, token_logprobs

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
        TokenSequence(place=place, prompt_token_ids=tokens(9), completion_token_ids=tokens(12))
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
    (batch,) = token_batches(sequences, 10**6, PAD)
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
        expected = [naive(model, sequences[place], temperature) for place in batch.places]
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
    values_K = torch.cat([naive(model, sequences[place], temperature)[0] for place in batch.places])
    expected = torch.autograd.grad((weights_K * values_K).sum(), list(parameters.values()))
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max()), name


def test_no_chunk_is_over_the_limit(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(4, model, monkeypatch)
    rows: list[int] = []

    def counted(hidden: torch.Tensor, *layer: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return torch.nn.functional.linear(hidden, *layer)

    monkeypatch.setattr(logprobs, "linear", counted)
    batch = one_batch(ragged(model.config.vocab_size))
    with torch.no_grad():
        token_logprobs(LogprobModel(model, 1.0), batch)
    assert max(rows) == 4
    assert sum(rows) == int(batch.is_completion_BT.sum()) > 4


def test_padding_and_neighbours_change_nothing(model: PreTrainedModel) -> None:
    module = LogprobModel(model, 1.0)
    sequences = ragged(model.config.vocab_size)
    together = one_batch(sequences)
    with torch.no_grad():
        found = token_logprobs(module, together)
        for row, place in enumerate(together.places):
            alone = token_logprobs(module, one_batch([replace(sequences[place], place=0)]))
            torch.testing.assert_close(
                found.logprobs_K[together.sequence_of_K == row], alone.logprobs_K, rtol=0, atol=2e-6
            )
        other_padding = TokenBatch(
            places=together.places,
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
