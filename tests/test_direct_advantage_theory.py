"""The claims of Direct Advantage PO (Liu et al., 2024; sections 3.1 to 3.3 and its appendix) on trees of steps.

All values are exact; the estimates that the pipeline uses are compared with them at the end. Equation numbers are the
paper's. Policies are log-probs of shape (S, A); advantages that are divided by β are called scaled.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from scipy.stats import binom
from torch import Tensor

from common.segments.files import standard_error
from stage2_train.objectives import AStarPO, ObjectiveConfig
from stage2_train.objectives.protocol import Objective
from tests.batches import batch_of, loss_of
from tests.enumerable_tree import (
    Tree,
    exact_minimiser,
    kl,
    multipliers,
    random,
    random_policy,
    random_tree,
    regression,
)

SEEDS = range(4)
BETAS = (0.05, 0.3, 1.0, 4.0)

EXPLORERS: dict[str, Callable[[Tree, Tensor], Tensor]] = {
    "uniform": lambda tree, _: torch.full(tree.next_SA.shape, 1 / tree.next_SA.shape[1], dtype=torch.float64),
    "the reference": lambda _, reference_SA: reference_SA.exp(),
    "a random softmax": lambda tree, _: random_policy(tree, 50).exp(),
    "a peaked softmax": lambda tree, _: random_policy(tree, 51, scale=4.0).exp(),
}
"""Distributions of training actions ν_A, by tree and reference. Each gives every step a probability."""


def problem(seed: int) -> tuple[Tree, Tensor]:
    tree = random_tree(seed)
    return tree, random_policy(tree, 100 + seed)


def improved(tree: Tree, reference_SA: Tensor, nu_SA: Tensor, beta: float) -> Tensor:
    """ln π⁺, the solution of exact Direct Advantage PO (Eq. 3.9)."""
    return exact_minimiser(reference_SA, tree.advantages(reference_SA) / beta, nu_SA)


def one_step_improvement(tree: Tree, policy_SA: Tensor, reference_SA: Tensor, beta: float) -> Tensor:
    """I_s(π, π_ref) of every state, shape (S,): Eq. 3.1."""
    return (policy_SA.exp() * (tree.advantages(reference_SA) - beta * (policy_SA - reference_SA))).sum(-1)


def steps_differ(tree: Tree, reference_SA: Tensor) -> Tensor:
    """The states whose steps differ in value, the first state among them; in the others nothing can improve."""
    differ_S = tree.advantages(reference_SA).abs().amax(-1) > 1e-9
    assert differ_S[0]
    return differ_S


def expected(values_S: Tensor, start_S: Tensor) -> float:
    return float(values_S @ start_S)


def starts(tree: Tree) -> list[Tensor]:
    """Distributions of first states: the first one alone, and all alike (Assumption 2.2)."""
    return [tree.root_S, torch.full_like(tree.root_S, 1 / tree.states)]


def descended(
    loss: Callable[[Tensor], Tensor], start_SA: Tensor, *, steps: int = 2000, tolerance: float = 1e-14
) -> Tensor:
    """The log-probs of the softmax policy that minimises a loss, by L-BFGS on its logits."""
    logits_SA = start_SA.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits_SA],
        max_iter=steps,
        tolerance_grad=tolerance,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits_SA.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return logits_SA.detach().log_softmax(-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_programming_agrees_with_adding_up_all_solutions(seed: int) -> None:
    tree, reference_SA = problem(seed)
    policy_SA = random_policy(tree, 200 + seed)
    probabilities = tree.solution_logprobs(policy_SA).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0)
    assert set(tree.rewards_SA.unique().tolist()) == {0.0, 1.0}
    expected_reward = float(probabilities @ tree.solution_rewards)
    assert float(tree.values(policy_SA)[0]) == pytest.approx(expected_reward, abs=1e-12)
    beta = 0.3
    ratios = tree.solution_logprobs(policy_SA) - tree.solution_logprobs(reference_SA)
    penalised = expected_reward - beta * float(probabilities @ ratios)
    assert float(tree.values(policy_SA, reference_SA, beta)[0]) == pytest.approx(penalised, abs=1e-12)
    assert float((reference_SA.exp() * tree.advantages(reference_SA)).sum(-1).abs().max()) < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_the_optimal_policy_is_the_tilted_reference_over_whole_solutions(beta: float) -> None:
    """Theorem 2.3, step by step, is Eq. 1.3 of whole solutions; no other policy has a higher value."""
    tree, reference_SA = problem(0)
    values_S, optimal_SA = tree.optimal(reference_SA, beta)
    reference = tree.solution_logprobs(reference_SA)
    tilted = (reference + tree.solution_rewards / beta).log_softmax(-1)
    torch.testing.assert_close(tree.solution_logprobs(optimal_SA), tilted, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.values(optimal_SA, reference_SA, beta), values_S, rtol=0, atol=1e-12)
    for seed in range(20):
        other_SA = optimal_SA + 0.3 * random(*optimal_SA.shape, seed=seed)
        assert (tree.values(other_SA.log_softmax(-1), reference_SA, beta) < values_S).all()


@pytest.mark.parametrize("start", [0, 1], ids=["first state", "any state"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_performance_difference_is_the_sum_of_one_step_improvements(seed: int, start: int) -> None:
    """Lemma 2.2 with Eq. 3.1, for any policy."""
    tree, reference_SA = problem(seed)
    policy_SA, start_S, beta = random_policy(tree, 200 + seed), starts(tree)[start], 0.3
    gain_S = tree.values(policy_SA, reference_SA, beta) - tree.values(reference_SA)
    steps_S = one_step_improvement(tree, policy_SA, reference_SA, beta)
    assert abs(expected(gain_S, start_S)) > 1e-3
    assert expected(gain_S, start_S) == pytest.approx(float(tree.visits(policy_SA, start_S) @ steps_S))


@pytest.mark.parametrize("explorer", EXPLORERS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_exact_direct_advantage_po_improves_on_its_reference(seed: int, beta: float, explorer: str) -> None:
    """Theorem 3.2: V_β rises by at least the sum of λ_s(ν_A) ≥ 0, and by more than nothing."""
    tree, reference_SA = problem(seed)
    nu_SA = EXPLORERS[explorer](tree, reference_SA)
    scaled_SA = tree.advantages(reference_SA) / beta
    policy_SA = exact_minimiser(reference_SA, scaled_SA, nu_SA)
    lambda_S = beta * multipliers(policy_SA, reference_SA, scaled_SA, nu_SA).sum(-1) / nu_SA.shape[1]
    steps_S = one_step_improvement(tree, policy_SA, reference_SA, beta)
    differ_S = steps_differ(tree, reference_SA)
    assert (lambda_S[differ_S] > 0).all()
    assert float(lambda_S.min()) >= -1e-12
    assert (steps_S >= lambda_S - 1e-12).all()
    gain_S = tree.values(policy_SA, reference_SA, beta) - tree.values(reference_SA)
    for start_S in starts(tree):
        bound = float(tree.visits(policy_SA, start_S) @ lambda_S)
        assert expected(gain_S, start_S) >= bound - 1e-12
        assert bound > 0
    assert (tree.values(policy_SA) > tree.values(reference_SA))[differ_S].all()


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("explorer", EXPLORERS)
def test_a_reference_that_is_optimal_stays_as_it_is(explorer: str, reward: float) -> None:
    """The equality of Theorem 3.2: π_ref = π*_β exactly if all solutions have the same reward."""
    tree, reference_SA = problem(0)
    same = Tree(next_SA=tree.next_SA, rewards_SA=torch.where(tree.ends_SA, reward, 0.0).double())
    optimal_SA = same.optimal(reference_SA, 0.3)[1]
    torch.testing.assert_close(optimal_SA, reference_SA, rtol=0, atol=1e-12)
    policy_SA = improved(same, reference_SA, EXPLORERS[explorer](same, reference_SA), 0.3)
    torch.testing.assert_close(policy_SA, reference_SA, rtol=0, atol=1e-9)


def test_a_state_whose_steps_are_alike_stays_as_it_is_while_others_improve() -> None:
    tree, reference_SA = problem(1)
    last = tree.states - 1
    rewards_SA = tree.rewards_SA.clone()
    rewards_SA[last] = 1.0
    tree = Tree(next_SA=tree.next_SA, rewards_SA=rewards_SA)
    policy_SA = improved(tree, reference_SA, EXPLORERS["uniform"](tree, reference_SA), 0.3)
    torch.testing.assert_close(policy_SA[last], reference_SA[last], rtol=0, atol=1e-9)
    assert float(kl(policy_SA, reference_SA)[0]) > 1e-3
    assert float(tree.values(policy_SA)[0]) > float(tree.values(reference_SA)[0])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_with_steps_of_the_reference_each_state_improves_by_at_least_a_kl(seed: int, beta: float) -> None:
    """Remark 3.2: λ_s(π_ref) = β KL(π_ref ‖ π⁺)."""
    tree, reference_SA = problem(seed)
    nu_SA, scaled_SA = reference_SA.exp(), tree.advantages(reference_SA) / beta
    policy_SA = exact_minimiser(reference_SA, scaled_SA, nu_SA)
    bound_S = beta * kl(reference_SA, policy_SA)
    lambda_S = beta * multipliers(policy_SA, reference_SA, scaled_SA, nu_SA)[:, 0]
    torch.testing.assert_close(lambda_S, bound_S, rtol=1e-6, atol=1e-12)
    assert (one_step_improvement(tree, policy_SA, reference_SA, beta) >= bound_S - 1e-12).all()
    assert (bound_S[steps_differ(tree, reference_SA)] > 0).all()


@pytest.mark.parametrize("explorer", EXPLORERS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_gradient_descent_finds_the_minimiser_of_the_kkt_condition(beta: float, explorer: str) -> None:
    """Eq. A.2, at the minimum that an optimizer finds without it."""
    tree, reference_SA = problem(2)
    nu_SA, scaled_SA = EXPLORERS[explorer](tree, reference_SA), tree.advantages(reference_SA) / beta

    def loss(policy_SA: Tensor) -> Tensor:
        return regression(policy_SA, reference_SA, scaled_SA, nu_SA).sum()

    found_SA = descended(loss, reference_SA)
    exact_SA = exact_minimiser(reference_SA, scaled_SA, nu_SA)
    assert float(kl(reference_SA, exact_SA).max()) > 1e-3
    assert float(kl(found_SA, exact_SA).max()) < 1e-9
    lambda_SA = multipliers(exact_SA, reference_SA, scaled_SA, nu_SA)
    torch.testing.assert_close(lambda_SA, lambda_SA[:, :1].expand_as(lambda_SA), rtol=1e-6, atol=1e-9)
    assert float(exact_SA.logsumexp(-1).abs().max()) < 1e-12
    for seed in range(20):
        other_SA = (exact_SA + 0.05 * random(*exact_SA.shape, seed=seed)).log_softmax(-1)
        other_lambda_SA = multipliers(other_SA, reference_SA, scaled_SA, nu_SA)
        assert float((other_lambda_SA.amax(-1) - other_lambda_SA.amin(-1)).min()) > 1e-5
        excess_S = regression(other_SA, reference_SA, scaled_SA, nu_SA) - regression(
            exact_SA, reference_SA, scaled_SA, nu_SA
        )
        assert float(excess_S.min()) > 0


@pytest.mark.parametrize("beta", BETAS)
def test_the_minimiser_is_not_the_reference_tilted_by_its_advantages(beta: float) -> None:
    """π_ref exp(A/β) sums to more than 1 (section 3.1), and scaled to sum to 1 it is still not the minimiser."""
    tree, reference_SA = problem(3)
    scaled_SA = tree.advantages(reference_SA) / beta
    sums_S = (reference_SA + scaled_SA).logsumexp(-1).exp()
    differ_S = steps_differ(tree, reference_SA)
    assert float(sums_S.min()) >= 1 - 1e-12
    assert (sums_S[differ_S] > 1).all()
    tilted_SA = (reference_SA + scaled_SA).log_softmax(-1)
    for explorer in EXPLORERS.values():
        nu_SA = explorer(tree, reference_SA)
        policy_SA = exact_minimiser(reference_SA, scaled_SA, nu_SA)
        ours_S, theirs_S = (
            regression(each_SA, reference_SA, scaled_SA, nu_SA) for each_SA in (policy_SA, tilted_SA)
        )
        assert (ours_S < theirs_S)[differ_S].all()


def test_with_its_own_steps_as_training_actions_the_minimiser_is_the_tilted_reference() -> None:
    """At ν_A = π⁺ the KKT condition says A/β − ln π⁺/π_ref = λ: the fixed point of training on-policy."""
    tree, reference_SA = problem(3)
    scaled_SA = tree.advantages(reference_SA) / 0.5
    tilted_SA = (reference_SA + scaled_SA).log_softmax(-1)
    policy_SA = reference_SA
    for _ in range(200):
        policy_SA = exact_minimiser(reference_SA, scaled_SA, policy_SA.exp())
    assert float(kl(reference_SA, tilted_SA).max()) > 1e-3
    assert float(kl(policy_SA, tilted_SA).max()) < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_the_improvement_is_that_of_the_on_policy_regression(seed: int) -> None:
    """Lemma 3.1, ∇I_s = −β ∇H_s at ν = π_θ, for logits and for features that the states share."""
    beta = 0.7
    tree, reference_SA = problem(seed)
    features = random(*tree.next_SA.shape, 5, seed=300 + seed)
    policies: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [
        (random(*tree.next_SA.shape, seed=seed), lambda theta: theta.log_softmax(-1)),
        (random(5, seed=seed), lambda theta: (features @ theta).log_softmax(-1)),
    ]
    for theta, policy_of in policies:
        theta = theta.requires_grad_()
        for state in range(tree.states):
            gain = one_step_improvement(tree, policy_of(theta), reference_SA, beta)[state]
            (ascent,) = torch.autograd.grad(gain, theta)
            policy_SA = policy_of(theta)
            scaled_SA = tree.advantages(reference_SA) / beta
            surrogate = regression(policy_SA, reference_SA, scaled_SA, policy_SA.detach().exp())[state]
            (gradient,) = torch.autograd.grad(surrogate, theta)
            assert float(ascent.abs().max()) > 1e-3
            torch.testing.assert_close(ascent, -beta * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 2, 5)], ids=["each step once", "some more often"])
def test_the_objective_reaches_the_exact_minimiser(counts: tuple[int, ...]) -> None:
    """The code of `train.objective.name = "direct_advantage"` on every state and step, drawn as often as `counts`."""
    pytest.importorskip("stage2_train.objectives.direct_advantage")
    beta, (tree, reference_SA) = 0.3, problem(2)
    objective: Objective = TypeAdapter(ObjectiveConfig).validate_python(
        {"name": "direct_advantage", "beta": beta}
    )
    advantages_SA = tree.advantages(reference_SA)
    states, steps = map(
        torch.tensor,
        zip(
            *(
                (state, step)
                for state in range(tree.states)
                for step, n in enumerate(counts)
                for _ in range(n)
            ),
            strict=True,
        ),
    )
    batch = batch_of(
        [1] * len(steps),
        advantages_SA[states, steps],
        group_size=sum(counts),
        reference_K=reference_SA[states, steps],
        advantages_B=advantages_SA[states, steps],
    )
    found_SA = descended(
        lambda policy_SA: loss_of(objective, policy_SA[states, steps], batch).share, reference_SA
    )
    nu_SA = torch.tensor(counts, dtype=torch.float64).expand(tree.next_SA.shape) / sum(counts)
    exact_SA = exact_minimiser(reference_SA, advantages_SA / beta, nu_SA)
    assert float(kl(reference_SA, exact_SA).max()) > 1e-3
    assert float(kl(exact_SA, found_SA).max()) < 1e-9
    assert float(kl(found_SA, exact_SA).max()) < 1e-9


@pytest.mark.parametrize("explorer", EXPLORERS)
def test_each_round_has_a_higher_value_and_the_rounds_approach_the_best_policy(explorer: str) -> None:
    """π⁺ is the next round's reference, as in iterative Direct Advantage PO; β stays."""
    tree, policy_SA = problem(0)
    values = [float(tree.values(policy_SA)[0])]
    for _ in range(60):
        policy_SA = improved(tree, policy_SA, EXPLORERS[explorer](tree, policy_SA), 0.3)
        values.append(float(tree.values(policy_SA)[0]))
    assert all(after > before for before, after in pairwise(values[:10]))
    assert all(after >= before - 1e-12 for before, after in pairwise(values))
    assert values[0] < 0.8
    assert values[-1] > 0.999


def astar_po_loss(tree: Tree, policy_SA: Tensor, reference_SA: Tensor, vstar: Tensor, beta: float) -> float:
    """The loss of A*-PO's own code on every solution, each once."""
    solutions = tree.solutions

    def logprobs_K(policy_SA: Tensor) -> Tensor:
        return torch.cat([torch.stack([policy_SA[at] for at in solution]) for solution in solutions])

    batch = batch_of(
        [len(solution) for solution in solutions],
        tree.solution_rewards,
        vstar_B=vstar.expand(len(solutions)),
        reference_K=logprobs_K(reference_SA),
    )
    return float(loss_of(AStarPO(beta2=beta), logprobs_K(policy_SA), batch).share)


def test_rounds_of_astar_po_are_one_round_with_a_smaller_beta() -> None:
    """π_{k+1} ∝ π_k exp(r/β), so that K rounds give π_0 exp(K r/β): β divided by K."""
    beta, (tree, first_SA) = 1.5, problem(0)
    first = tree.solution_logprobs(first_SA)
    policy_SA, values, distances = first_SA, [float(tree.values(first_SA)[0])], [0.0]
    for rounds in range(1, 21):
        vstar_S, next_SA = tree.optimal(policy_SA, beta)
        assert astar_po_loss(tree, next_SA, policy_SA, vstar_S[0], beta) < 1e-20
        assert astar_po_loss(tree, policy_SA, policy_SA, vstar_S[0], beta) > 1e-20
        policy_SA = next_SA
        at_once_SA = tree.optimal(first_SA, beta / rounds)[1]
        torch.testing.assert_close(policy_SA, at_once_SA, rtol=0, atol=1e-9)
        values.append(float(tree.values(policy_SA)[0]))
        ours = tree.solution_logprobs(policy_SA)
        distances.append(float(kl(ours, first)))
        tilted = (first + rounds * tree.solution_rewards / beta).log_softmax(-1)
        assert distances[-1] == pytest.approx(float(kl(tilted, first)), abs=1e-9)
    assert all(after > before for before, after in pairwise(values))
    assert all(after > before for before, after in pairwise(distances))
    assert values[0] < 0.8
    assert values[-1] > 0.999
    solved = first[tree.solution_rewards == 1.0].logsumexp(-1)
    assert distances[-1] == pytest.approx(-float(solved), rel=1e-2)


def first_step_estimates(tree: Tree, policy_SA: Tensor, completions: int, repeats: int) -> np.ndarray:
    """The squared error of Â, mean over the completions, for each repeat: Monte-Carlo values of the first steps."""
    steps = np.array([solution[0][1] for solution in tree.solutions])
    rewards = tree.solution_rewards.numpy()
    drawn = np.random.default_rng(0).multinomial(
        completions, tree.solution_logprobs(policy_SA).exp().numpy(), size=repeats
    )
    total = drawn @ rewards
    error = np.zeros(repeats)
    for step, exact in enumerate(tree.advantages(policy_SA)[0].tolist()):
        begin = drawn[:, steps == step].sum(-1)
        solved = drawn[:, steps == step] @ rewards[steps == step]
        estimate = solved / np.maximum(begin, 1) - total / completions
        error += begin * (estimate - exact) ** 2 / completions
    return error


def test_the_error_of_estimated_advantages_falls_with_the_root_of_the_completions() -> None:
    tree, policy_SA = problem(0)
    completions = np.array([16, 64, 256, 1024, 4096])
    errors = np.array(
        [np.sqrt(first_step_estimates(tree, policy_SA, int(count), 4000).mean()) for count in completions]
    )
    slope, _ = np.polyfit(np.log(completions), np.log(errors), 1)
    assert errors[-1] < 0.02
    assert slope == pytest.approx(-0.5, abs=0.03)


def test_with_exact_values_of_next_steps_the_estimates_error_is_that_of_the_mean() -> None:
    """Eq. 3.7 with V_φ = V^π_ref: all of a state's advantages are off by the same number, V less the mean."""
    tree, policy_SA = problem(0)
    values_A = tree.after(tree.values(policy_SA))[0].numpy()
    generator, deviations = np.random.default_rng(0), []
    for completions in (16, 256, 4096):
        drawn = generator.multinomial(completions, policy_SA[0].exp().numpy(), size=4000)
        shift = tree.values(policy_SA)[0].item() - drawn @ values_A / completions
        deviations.append(shift.std())
    assert deviations[1] / deviations[0] == pytest.approx(1 / 4, rel=0.1)
    assert deviations[2] / deviations[1] == pytest.approx(1 / 4, rel=0.1)


SHARES = np.linspace(0.005, 0.995, 199)
"""Success probabilities from 0 to 1."""


def coverage(completions: int) -> np.ndarray:
    """How often the mean of `completions` rewards is within 1.96 standard errors of each success probability."""
    solved = np.arange(completions + 1)
    errors = np.array([standard_error(float(count), completions) for count in solved])
    is_within = np.abs(solved / completions - SHARES[:, None]) <= 1.96 * errors
    probabilities: np.ndarray = binom.pmf(solved, completions, SHARES[:, None])
    return np.asarray((probabilities * is_within).sum(-1))


@pytest.mark.parametrize("completions", [16, 32, 64, 128, 256])
def test_standard_errors_cover_the_value_about_as_often_as_they_say(completions: int) -> None:
    """Exactly, from binomial probabilities: on average over the values, at their middle, and 73 % at the worst one.

    A value near 0 or 1 has few likely outcomes, so its coverage jumps; tables of many states show the average.
    """
    covered = coverage(completions)
    middle = np.abs(SHARES - 0.5) <= 0.3
    assert 0.90 < covered.mean() < 0.96
    assert 0.90 < covered[middle].mean() < 0.96
    assert covered.min() > 0.72


@pytest.mark.parametrize("completions", [2, 16, 128])
def test_a_standard_error_is_that_of_the_mean_and_not_0_where_all_rewards_are_alike(completions: int) -> None:
    for solved in range(completions + 1):
        share = solved / completions
        plain = (share * (1 - share) / completions) ** 0.5
        assert standard_error(float(solved), completions) > 0
        assert standard_error(float(solved), completions) == pytest.approx(plain, abs=1 / completions)
    assert standard_error(float(completions), completions) < 0.9 / completions
