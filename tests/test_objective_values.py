"""Each objective's value and gradient on numbers worked out by hand; A*-PO's are in test_astar_po.py."""

import math

import pytest
import torch
from torch import Tensor

from stage2_train.batch import Batch
from stage2_train.objectives.centred_residual import CentredResidual
from stage2_train.objectives.direct_advantage import DirectAdvantage
from stage2_train.objectives.grpo import GRPO
from stage2_train.objectives.pmd_mean import PMDMean
from stage2_train.objectives.ppo import PPO, generalised_advantages
from stage2_train.objectives.protocol import Objective, Tally
from stage2_train.objectives.qrpo import QRPO
from stage2_train.objectives.rebel import REBEL
from stage2_train.objectives.spo import SPO
from tests.batches import batch_of, loss_and_gradient, policy, tensor

EXACT = 1e-12


def ratios(*values: float) -> Tensor:
    """Log-probs whose ratio to an old policy of log-prob 0 are these."""
    return tensor([math.log(value) for value in values])


def old(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


# GRPO: one prompt, a right completion of two tokens and a wrong one of one. std = √½, so A = ±a.
A = 0.5 / (math.sqrt(0.5) + 1e-4)


def grpo_batch(**columns: Tensor) -> Batch:
    return batch_of([2, 1], [1.0, 0.0], group_size=2, old_K=old(3), **columns)


def test_grpo_clips_what_would_go_further_and_stops_its_gradient() -> None:
    """Ratios 1.1 (free) and 1.5 (clipped to 1.2) with A > 0, and 0.5 (clipped to 0.8) with A < 0."""
    objective = GRPO(name="grpo", kl=0.0, entropy=0.0)
    loss, gradient_K = loss_and_gradient(objective, ratios(1.1, 1.5, 0.5), grpo_batch())
    assert loss == pytest.approx(((-1.1 * A - 1.2 * A) / 2 + 0.8 * A) / 2, abs=EXACT)
    assert gradient_K.tolist() == pytest.approx([-1.1 * A / 4, 0.0, 0.0], abs=EXACT)


def test_grpo_does_not_clip_what_comes_back() -> None:
    """A ratio of 0.5 with A > 0 and one of 1.5 with A < 0 are beyond the clip on the side that may return."""
    objective = GRPO(name="grpo", kl=0.0, entropy=0.0)
    _, gradient_K = loss_and_gradient(objective, ratios(0.5, 1.0, 1.5), grpo_batch())
    assert gradient_K.tolist() == pytest.approx([-0.5 * A / 4, -A / 4, 1.5 * A / 2], abs=EXACT)


def test_grpo_by_token_counts_each_token_alike() -> None:
    objective = GRPO(name="grpo", kl=0.0, entropy=0.0, average="token")
    loss, _ = loss_and_gradient(objective, ratios(1.1, 1.5, 0.5), grpo_batch())
    assert loss == pytest.approx((-1.1 * A - 1.2 * A + 0.8 * A) / 3, abs=EXACT)


def test_grpos_penalty_is_that_of_shao_and_its_bonus_the_mean_entropy_of_tokens() -> None:
    """At ratio 1 with π_ref = 2 π: k3 = 2 − ln 2 − 1, its derivative 1 − 2."""
    objective = GRPO(name="grpo", kl=0.5, entropy=0.25)
    batch = objective.credit(grpo_batch(reference_K=tensor([math.log(2.0)] * 3)))
    leaf_K, entropy_K = (value.requires_grad_() for value in (old(3), tensor([1.0, 2.0, 6.0])))
    loss = objective.loss(policy(leaf_K, entropy_K), batch)
    assert float(loss.share.detach()) == pytest.approx(0.5 * (1 - math.log(2)) - 0.25 * 3, abs=EXACT)
    by_logprob_K, by_entropy_K = torch.autograd.grad(loss.share, (leaf_K, entropy_K))
    assert by_logprob_K.tolist() == pytest.approx([(-A - 0.5) / 4] * 2 + [(A - 0.5) / 2], abs=EXACT)
    assert by_entropy_K.tolist() == pytest.approx([-0.25 / 3] * 3, abs=EXACT)
    assert loss.figures["kl"].tolist() == pytest.approx([1 - math.log(2)] * 2, abs=EXACT)


@pytest.mark.parametrize(
    ("scale", "divisor"),
    [("none", 1.0), ("batch", math.sqrt(0.25 * 4 / 3) + 1e-4), ("group", math.sqrt(0.5) + 1e-4)],
)
def test_grpos_advantages_are_scaled_by_what_it_is_told(scale: str, divisor: float) -> None:
    objective = GRPO.model_validate({"name": "grpo", "scale": scale})
    batch = batch_of([1] * 4, [1.0, 0.0, 0.0, 1.0], group_size=2)
    assert objective.credit(batch).advantages_B.tolist() == pytest.approx(
        [value / divisor for value in (0.5, -0.5, -0.5, 0.5)], abs=EXACT
    )


# The regressions: log-ratios of 0.2 and −0.4 to the anchor, of a right and a wrong completion.
PAIR_K = tensor([0.1, 0.1, -0.4])


def test_rebel_is_the_squared_difference_of_the_pair() -> None:
    """η = 2: (0.1 + 0.2 − (1 − 0))² = 0.49; by either log-ratio 2 · (−0.7) · ½, with opposite signs."""
    loss, gradient_K = loss_and_gradient(REBEL(name="rebel", eta=2.0), PAIR_K, grpo_batch())
    assert loss == pytest.approx(0.49, abs=EXACT)
    assert gradient_K.tolist() == pytest.approx([-0.7, -0.7, 0.7], abs=EXACT)


@pytest.mark.parametrize("anchor", ["old", "reference"])
def test_the_centred_residual_is_the_variance_of_the_groups_residuals(anchor: str) -> None:
    """β = ½ and log-ratios 0.2, −0.4, 0: e = −0.9, −0.2, 0; mean −1.1/3."""
    objective = CentredResidual.model_validate(
        {"name": "centred_residual", "beta": 0.5, "group_size": 3, "anchor": anchor}
    )
    batch = batch_of([2, 1, 1], [1.0, 0.0, 0.0], group_size=3, **{f"{anchor}_K": old(4)})
    loss, gradient_K = loss_and_gradient(objective, tensor([0.1, 0.1, -0.4, 0.0]), batch)
    mean = -1.1 / 3
    centred = [-0.9 - mean, -0.2 - mean, -mean]
    assert loss == pytest.approx(sum(value**2 for value in centred) / 2, abs=EXACT)
    assert gradient_K.tolist() == pytest.approx(
        [0.5 * value for value in (centred[0], centred[0], centred[1], centred[2])], abs=EXACT
    )


def test_rebel_is_twice_the_centred_residual_of_a_pair() -> None:
    rebel: Objective = REBEL(name="rebel", eta=2.0)
    centred: Objective = CentredResidual(name="centred_residual", beta=0.5, anchor="old")
    twice, once = (loss_and_gradient(objective, PAIR_K, grpo_batch()) for objective in (rebel, centred))
    assert twice[0] == pytest.approx(2 * once[0], abs=EXACT)
    torch.testing.assert_close(twice[1], 2 * once[1])


def test_the_centred_residuals_gradient_is_astar_pos_with_the_others_residual_as_the_value() -> None:
    """d/dℓ_i = (2β/K) (e_i − mean of the others' e) per prompt; A*-PO divides by sequences, of which there are K."""
    objective = CentredResidual(name="centred_residual", beta=0.5, group_size=3)
    lengths, rewards_B, logprobs_K = [1, 1, 1], tensor([1.0, 0.0, 0.5]), tensor([0.3, -0.2, 0.7])
    batch = batch_of(lengths, rewards_B, group_size=3, reference_K=old(3))
    _, gradient_K = loss_and_gradient(objective, logprobs_K, batch)
    residual_B = 0.5 * logprobs_K - rewards_B
    others_B = (residual_B.sum() - residual_B) / 2
    expected_B = 2 * 0.5 / 3 * (residual_B - others_B)
    torch.testing.assert_close(gradient_K, expected_B)


def test_pmd_mean_centres_the_reward_alone() -> None:
    """τ = ½: residuals 0.1 − ½ and −0.2 + ½; by a log-ratio τ times the residual, mean over two."""
    loss, gradient_K = loss_and_gradient(
        PMDMean(name="pmd_mean", tau=0.5, group_size=2), PAIR_K, grpo_batch()
    )
    assert loss == pytest.approx((0.16 + 0.09) / 2, abs=EXACT)
    assert gradient_K.tolist() == pytest.approx([-0.2, -0.2, 0.15], abs=EXACT)


def test_qrpos_constant_is_the_partition_function_of_a_uniform_quantile() -> None:
    """ln ∫₀¹ exp(q/β) dq by the midpoint rule."""
    for beta in (0.1, 0.5, 2.0):
        quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        log_z = float((quantiles / beta).logsumexp(0)) - math.log(100_000)
        batch = batch_of([1], [7.0], quantile_B=tensor([0.75]), reference_K=old(1))
        found = QRPO(name="qrpo", beta=beta).credit(batch).advantages_B
        assert float(found) == pytest.approx(0.75 - beta * log_z, abs=1e-6)


def test_qrpo_regresses_the_log_ratio_on_the_quantile() -> None:
    objective = QRPO(name="qrpo", beta=0.5)
    batch = batch_of([2, 1], [3.0, 1.0], quantile_B=tensor([1.0, 0.25]), reference_K=old(3))
    targets = objective.credit(batch).advantages_B.tolist()
    loss, gradient_K = loss_and_gradient(objective, PAIR_K, batch)
    residuals = [0.1 - targets[0], -0.2 - targets[1]]
    assert loss == pytest.approx((residuals[0] ** 2 + residuals[1] ** 2) / 2, abs=EXACT)
    assert gradient_K.tolist() == pytest.approx(
        [0.5 * residuals[0], 0.5 * residuals[0], 0.5 * residuals[1]], abs=EXACT
    )


# SPO.


def test_spos_advantage_is_the_reward_less_what_was_expected_whitened() -> None:
    """Differences 0.5, −0.5 and 0.3: mean 0.1, standard deviation √0.28."""
    batch = batch_of([1, 1, 1], [1.0, 0.0, 1.0], expected_B=tensor([0.5, 0.5, 0.7]))
    found = SPO(name="spo").credit(batch).advantages_B
    assert found.tolist() == pytest.approx([value / math.sqrt(0.28) for value in (0.4, -0.6, 0.2)], abs=1e-7)


def test_spos_history_begins_with_stage_one_and_forgets_by_the_policys_drift() -> None:
    objective = SPO(name="spo")
    tally = objective.first_tally([1.0, 1.0, 0.0, 0.0])
    assert tally == Tally(4.0, 4.0)
    assert tally.expected == 0.5
    # ρ = 2^(−D/0.06), within 0.875 and 0.96
    for drift, kept in ((0.0, 0.96), (0.06 * math.log2(1 / 0.9), 0.9), (1.0, 0.875)):
        found = objective.next_tally(tally, 1.0, drift)
        assert (found.solved, found.failed) == pytest.approx((4 * kept + 1, 4 * kept))
    assert objective.first_tally([]).expected == 0.5


# PPO: one completion of three tokens.
REWARDS_K = tensor([0.0, 0.5, 1.0])
VALUES_K = tensor([0.2, 0.4, 0.6])


def test_ppos_advantages_are_discounted_sums_of_errors() -> None:
    """γ = ½, λ = ½: δ = (0.2 − 0.2, 0.5 + 0.3 − 0.4, 1 − 0.6) = (0, 0.4, 0.4)."""
    found = generalised_advantages(REWARDS_K, VALUES_K, torch.tensor([3]), 0.5, 0.5)
    assert found.tolist() == pytest.approx([0.0 + 0.4 / 4 + 0.4 / 16, 0.4 + 0.4 / 4, 0.4], abs=EXACT)


def test_with_gamma_and_lambda_1_the_advantage_is_what_is_still_to_come_less_the_value() -> None:
    found = generalised_advantages(REWARDS_K, VALUES_K, torch.tensor([3]), 1.0, 1.0)
    assert found.tolist() == pytest.approx([1.5 - 0.2, 1.5 - 0.4, 1.0 - 0.6], abs=EXACT)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.9, 0.95), (0.5, 0.0), (0.0, 1.0)])
def test_gae_agrees_with_a_slow_reference(discount: float, gae_lambda: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 0, 7, 2]
    count = sum(lengths)
    rewards_K, values_K = (torch.randn(count, dtype=torch.float64, generator=generator) for _ in range(2))
    found = generalised_advantages(rewards_K, values_K, torch.tensor(lengths), discount, gae_lambda)
    expected, start = [], 0
    for length in lengths:
        rewards, values = (column[start : start + length].tolist() for column in (rewards_K, values_K))
        start += length
        errors = [
            rewards[t] + (discount * values[t + 1] if t + 1 < length else 0.0) - values[t]
            for t in range(length)
        ]
        for t in range(length):
            expected.append(sum((discount * gae_lambda) ** k * errors[t + k] for k in range(length - t)))
    assert found.tolist() == pytest.approx(expected, abs=EXACT)


def test_ppo_pays_for_kl_by_the_token_and_whitens_after_the_returns_are_taken() -> None:
    """γ_KL = ½ and ln π_old/π_ref = 0.2 at the first token: its reward is −0.1."""
    objective = PPO(name="ppo", kl=0.5)
    batch = batch_of(
        [3],
        [1.5],
        rewards_K=REWARDS_K,
        values_K=VALUES_K,
        old_K=tensor([0.2, 0.0, 0.0]),
        reference_K=old(3),
    )
    credited = objective.credit(batch)
    assert credited.returns_K.tolist() == pytest.approx([1.4, 1.5, 1.0], abs=EXACT)
    raw = [1.2, 1.1, 0.4]
    mean = sum(raw) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in raw) / 2)
    assert credited.advantages_K.tolist() == pytest.approx(
        [(value - mean) / deviation for value in raw], abs=1e-7
    )


def test_ppos_critic_is_held_near_its_old_values() -> None:
    """c = 0.5, old values 0, return 1: a value of 0.2 errs by 0.8; one of 0.9 is held to 0.5 and learns nothing."""
    objective = PPO(name="ppo")
    batch = batch_of([2], [1.0], values_K=old(2), returns_K=tensor([1.0, 1.0]))
    values_K = tensor([0.2, 0.9]).requires_grad_()
    loss = objective.critic_loss(values_K, batch)
    assert float(loss.share.detach()) == pytest.approx(0.5 * (0.64 + 0.25) / 2, abs=EXACT)
    (gradient_K,) = torch.autograd.grad(loss.share, values_K)
    assert gradient_K.tolist() == pytest.approx([-0.8 / 2, 0.0], abs=EXACT)


def test_ppos_surrogate_is_a_mean_over_tokens() -> None:
    objective = PPO(name="ppo", entropy=0.0)
    batch = batch_of([2, 1], [1.0, 0.0], old_K=old(3), advantages_K=tensor([1.0, 1.0, -1.0]))
    loss = objective.loss(policy(ratios(1.1, 1.5, 0.5)), batch)
    assert float(loss.share) == pytest.approx((-1.1 - 1.2 + 0.8) / 3, abs=EXACT)
    assert loss.figures["clipped"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("value", [0.3, 0.1, 0.7])
def test_equal_values_are_whitened_to_zero(value: float) -> None:
    """In float32 a sum of 4,096 of them is off by more than the deviation's floor."""
    rewards_B = torch.full((4096,), value)
    batch = batch_of([1] * 4096, rewards_B, expected_B=torch.zeros(4096))
    assert SPO(name="spo").credit(batch).advantages_B.abs().max() < 1e-3


def test_spo_keeps_no_less_than_it_keeps_most() -> None:
    with pytest.raises(ValueError, match=r"least_kept 0\.99 is above most_kept 0\.96"):
        SPO(name="spo", least_kept=0.99)


# Direct Advantage: a step of two tokens and one of one.


def test_direct_advantage_regresses_the_log_ratio_on_the_advantage_over_beta() -> None:
    """Residuals 3 − (0.5 − 1.0) and −2 − 0.25; each token's gradient is minus its step's, over two steps."""
    objective = DirectAdvantage(name="direct_advantage", beta=0.1)
    batch = batch_of(
        [2, 1], [math.nan, math.nan], reference_K=tensor([-1.5, 0.0, -0.5]), advantages_B=tensor([0.3, -0.2])
    )
    loss, gradient_K = loss_and_gradient(objective, tensor([-1.0, -1.0, -0.25]), batch)
    assert loss == pytest.approx((3.5**2 + 2.25**2) / 4, abs=EXACT)
    assert gradient_K.tolist() == pytest.approx([-3.5 / 2, -3.5 / 2, 2.25 / 2], abs=EXACT)


def test_direct_advantage_needs_the_paper_s_beta_and_no_completions() -> None:
    objective = DirectAdvantage(name="direct_advantage")
    assert (objective.beta, objective.state_wise, objective.group_size) == (0.01, True, 0)
    assert objective.needs(4) == {"advantage", "reference"}
