"""The engines' draw: a number from 0 to 1 looked up in the cumulative sum of a row's distribution."""

from typing import Any

import pytest
import torch

from common.config import SamplingParams
from common.engines.drawing import STATES, STRIDE, drawn_tokens, next_state, numbers, streams
from common.engines.transformers_engine import _SeededSampler
from common.engines.vllm_repairs import draw_one_number_per_token
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


def test_a_row_that_is_no_distribution_draws_a_token_of_the_vocabulary() -> None:
    """vLLM looks its log-prob up, which is NaN too: agreement with the trainer says so."""
    assert drawn([float("nan"), 0.5, 0.5], 0.0, 0.9) == [2, 2]


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
    found = numbers(streams([(1234567 + STRIDE) % STATES], 4))[0]
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


class OffsetGenerator:
    """A generator of a GPU: it counts what is drawn."""

    device = torch.device("meta")

    def __init__(self, seed: int) -> None:
        self._seed, self._offset = seed, 0

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = offset


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, STATES - 1])
def test_a_generator_goes_through_the_stream_of_its_seed_on_every_device(seed: int) -> None:
    expected = streams([seed], 5)[0].tolist()
    generator = torch.Generator().manual_seed(seed)
    assert [next_state(generator) for _ in range(5)] == expected
    on_gpu: Any = OffsetGenerator(seed)
    assert [next_state(on_gpu) for _ in range(3)] == expected[:3]
    on_gpu.set_offset(on_gpu.get_offset() - 4)  # as vLLM does after a part of a prompt
    assert [next_state(on_gpu) for _ in range(3)] == expected[2:]


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


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:(torch|vllm)\..*")
def test_vllms_first_model_runner_draws_on_a_gpu_what_the_transformers_engine_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its method for GPUs, on a CPU. Where a request has no seed it draws as ever."""
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    original: Any = topk_topp_sampler.random_sample
    monkeypatch.setattr(topk_topp_sampler, "random_sample", original)  # put back at the end
    draw_one_number_per_token()
    draw_one_number_per_token()  # once is enough
    scores_TBV = torch.randn(6, 3, 1000, generator=torch.Generator().manual_seed(1))
    generators = {row: torch.Generator().manual_seed(seed) for row, seed in enumerate([3, 4, 5])}
    sampler: Any = TopKTopPSampler("processed_logprobs")
    top_k, top_p = torch.tensor([50] * 3), torch.tensor([0.9] * 3)
    ours = _SeededSampler(
        [3, 4, 5], SamplingParams(max_completion_tokens=6, top_k=50, top_p=0.9), torch.device("cpu")
    )
    for scores_BV in scores_TBV:
        drawn_B, logprobs_BV = sampler.forward_native(scores_BV.clone(), generators, top_k, top_p)
        assert torch.equal(drawn_B, ours(None, scores_BV).argmax(-1))  # type: ignore[arg-type]
        gathered_B = logprobs_BV.gather(-1, drawn_B[:, None])[:, 0]
        torch.testing.assert_close(gathered_B, ours.logprobs[-1])
    before = [each.initial_seed() for each in generators.values()]
    del generators[1]
    drawn_B, _ = sampler.forward_native(scores_TBV[0].clone(), generators, None, None)
    assert drawn_B.shape == (3,)
    assert [each.initial_seed() for each in generators.values()] == before[::2]
