"""The transformers engine's draw: a number from 0 to 1 looked up in the cumulative sum of a row's distribution."""

import pytest
import torch

from common.config import SamplingParams
from common.engines.drawing import STRIDE, drawn_tokens, numbers, streams
from common.engines.transformers_engine import _SeededSampler
from common.errors import UserError

HIGHEST = 1 - 2**-53
VOCABULARY = 151_936


def drawn(probabilities: list[float], *places: float) -> list[int]:
    probs_BV = torch.tensor([probabilities] * len(places))
    return drawn_tokens(probs_BV, torch.tensor(places, dtype=torch.float64)).tolist()


def test_a_number_draws_the_token_whose_share_it_falls_into() -> None:
    assert drawn([0.25, 0.5, 0.25], 0.0, 0.2499, 0.2501, 0.7499, 0.7501, HIGHEST) == [0, 0, 1, 1, 2, 2]


def test_a_token_without_a_probability_is_never_drawn() -> None:
    assert drawn([0.0, 0.5, 0.0, 0.5, 0.0], 0.0, 0.4999, 0.5001, HIGHEST) == [1, 1, 3, 3]
    assert drawn([0.0, 1.0, 0.0], 0.0, 0.5, HIGHEST) == [1, 1, 1]


def test_the_probabilities_stay_as_they_are() -> None:
    probs_BV = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    drawn_tokens(probs_BV, torch.tensor([0.6], dtype=torch.float64))
    assert probs_BV.tolist() == [[0.5, 0.25, 0.25]]


def test_the_rarest_tokens_of_a_large_vocabulary_keep_their_share() -> None:
    """Behind a token of nearly all the probability each other one has 1e-9, which a sum in float32 would lose."""
    probs_V = torch.full((VOCABULARY,), 1e-9)
    probs_V[0] = 1.0
    total = 1 + 1e-9 * (VOCABULARY - 1)
    for token in (1, 2, 1000, VOCABULARY - 1):
        number = torch.tensor([(1 + (token - 0.5) * 1e-9) / total], dtype=torch.float64)
        assert abs(int(drawn_tokens(probs_V[None], number)) - token) <= 1 + token // 1000


def test_streams_are_those_of_splitmix64() -> None:
    """Its published outputs for the seed 1234567, whose first state is already moved on."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = numbers(streams([(1234567 + STRIDE) % 2**64], 4))[0]
    assert found.tolist() == [(output >> 11) / 2**53 for output in published]


def test_numbers_are_uniform_and_streams_of_neighbouring_seeds_independent() -> None:
    found_BT = numbers(streams(range(200), 1000))
    assert float(found_BT.min()) >= 0
    assert float(found_BT.max()) < 1
    counts = torch.histc(found_BT, 100, 0, 1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert 50 < chi_square < 170  # of 99 degrees of freedom
    correlations = torch.corrcoef(found_BT) - torch.eye(200, dtype=torch.float64)
    assert float(correlations.abs().max()) < 0.17  # the largest of 19,900, of a standard deviation of 0.032
    assert (
        abs(float(torch.corrcoef(torch.stack([found_BT[:, :-1].flatten(), found_BT[:, 1:].flatten()]))[0, 1]))
        < 0.01
    )


def test_a_rows_draws_depend_on_its_seed_alone_whatever_its_neighbours_and_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_TV = torch.randn(9, 1000, generator=generator)

    def draws(seeds: list[int], limit: int) -> torch.Tensor:
        sampler = _SeededSampler(seeds, SamplingParams(max_completion_tokens=limit), torch.device("cpu"))
        rows = [sampler(None, scores_V.expand(len(seeds), -1)).argmax(-1) for scores_V in scores_TV]  # type: ignore[arg-type]
        return torch.stack(rows, dim=1)

    together = draws([3, 4, 5], 9)
    assert len({tuple(row.tolist()) for row in together}) == 3
    for row, seed in enumerate((3, 4, 5)):
        assert torch.equal(draws([seed], 9)[0], together[row])
        assert torch.equal(draws([9, seed], 500)[1], together[row])


@pytest.mark.parametrize(
    ("cut", "left"), [({"top_k": 2}, 2), ({"min_p": 0.4}, 3), ({"top_p": 0.6}, 2), ({}, 4)]
)
def test_log_probs_of_the_tokens_that_are_left_sum_to_one(cut: dict[str, float], left: int) -> None:
    scores_V = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    seeds = list(range(200))
    sampler = _SeededSampler(
        seeds, SamplingParams.model_validate({"max_completion_tokens": 1, **cut}), torch.device("cpu")
    )
    tokens = sampler(None, scores_V.expand(len(seeds), -1)).argmax(-1).tolist()  # type: ignore[arg-type]
    chances = dict(zip(tokens, sampler.logprobs[0].exp().tolist(), strict=True))
    assert sorted(chances) == list(range(left))
    assert sum(chances.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_the_users_to_know_of(broken: float, temperature: float) -> None:
    scores_BV = torch.zeros(2, 5)
    sampling = SamplingParams(max_completion_tokens=1, temperature=temperature)
    sampler = _SeededSampler([1, 2], sampling, torch.device("cpu"))
    scores_BV[0, 3] = -torch.inf  # a token that the model rules out
    sampler(None, scores_BV)  # type: ignore[arg-type]
    scores_BV[1, 3] = broken
    with pytest.raises(UserError, match=r"logits are not finite: .*lower train\.learning_rate"):
        sampler(None, scores_BV)  # type: ignore[arg-type]
