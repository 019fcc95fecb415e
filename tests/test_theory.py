"""The claims of the paper's sections 3 and 5 on policies small enough to enumerate, with the objective's own code.

The policies are trees: a completion is one or two tokens, each drawn from a softmax of its own, and all seven
completions of each prompt can be written down. So π*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β) and V* are exact.

Shapes: _P prompt, _Y completion, _B sequence, _K completion token, _D parameter of a log-linear policy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stage2_train.batch import Batch
from stage2_train.objectives import AStarPO
from tests.batches import batch_of, loss_of

PROMPTS = 3
# The tree's nodes are the prefixes "", "a" and "b"; its tokens are end, a and b. A completion is its (node, token)s.
COMPLETIONS = [
    [(0, 0)],
    [(0, 1), (1, 0)],
    [(0, 1), (1, 1)],
    [(0, 1), (1, 2)],
    [(0, 2), (2, 0)],
    [(0, 2), (2, 1)],
    [(0, 2), (2, 2)],
]
BETA = 0.5

Sampler = Callable[[Tensor], Tensor]
"""From the policy's probabilities, shape (P, Y), to those that completions are drawn from."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_logprobs(logits: Tensor, prompt: int, completion: int) -> Tensor:
    """ln π of each token of a completion; logits of shape (P, 3 nodes, 3 tokens)."""
    logprobs = logits[prompt].log_softmax(-1)
    return torch.stack([logprobs[node, token] for node, token in COMPLETIONS[completion]])


def sequence_logprobs(logits: Tensor) -> Tensor:
    """ln π(y|x), shape (P, Y)."""
    rows = [
        torch.stack([token_logprobs(logits, prompt, y).sum() for y in range(len(COMPLETIONS))])
        for prompt in range(PROMPTS)
    ]
    return torch.stack(rows)


def kl(left_PY: Tensor, right_PY: Tensor) -> float:
    """KL between two sets of log-probs, mean over the prompts."""
    return float((left_PY.exp() * (left_PY - right_PY)).sum(-1).mean())


@dataclass(frozen=True)
class Problem:
    """Rewards and a reference policy, and what follows from them."""

    rewards_PY: Tensor
    reference: Tensor

    @property
    def vstar_P(self) -> Tensor:
        """V*(x) = β ln E_ref exp(r/β), paper Eq. 1."""
        return BETA * (sequence_logprobs(self.reference) + self.rewards_PY / BETA).logsumexp(-1)

    @property
    def optimal_PY(self) -> Tensor:
        """ln π*(y|x)."""
        return (sequence_logprobs(self.reference) + self.rewards_PY / BETA).log_softmax(-1)

    def batch(self, pairs: list[tuple[int, int]]) -> Batch:
        """The (prompt, completion) pairs as the trainer would hand them to the objective."""
        at = tuple(torch.tensor(pairs).T)
        return batch_of(
            [len(COMPLETIONS[completion]) for _, completion in pairs],
            self.rewards_PY[at],
            vstar_B=self.vstar_P[at[0]],
            reference_K=torch.cat([token_logprobs(self.reference, *pair) for pair in pairs]),
        )

    def loss(self, logits: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
        logprobs_K = torch.cat([token_logprobs(logits, *pair) for pair in pairs])
        return loss_of(AStarPO(beta2=BETA), logprobs_K, self.batch(pairs)).share


@pytest.fixture
def problem() -> Problem:
    """Binary rewards; each prompt can be solved and can be failed."""
    rewards_PY = torch.zeros(PROMPTS, len(COMPLETIONS), dtype=torch.float64)
    rewards_PY[0, 0] = rewards_PY[1, 3] = rewards_PY[1, 4] = rewards_PY[2, [1, 2, 6]] = 1.0
    return Problem(rewards_PY, random(PROMPTS, 3, 3, seed=0))


def descend(problem: Problem, sampler: Sampler, *, steps: int, samples: int = 4) -> Tensor:
    """SGD on fresh samples of every prompt, from the reference policy; returns the final logits."""
    logits = problem.reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=4.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            drawn = torch.multinomial(
                sampler(sequence_logprobs(logits).exp()), samples, replacement=True, generator=generator
            )
        pairs = [(prompt, int(y)) for prompt in range(PROMPTS) for y in drawn[prompt]]
        optimizer.zero_grad()
        problem.loss(logits, pairs).backward()
        optimizer.step()
    return logits.detach()


def test_the_optimal_policy_has_no_loss_on_any_completion(problem: Problem) -> None:
    tree = torch.zeros(PROMPTS, 3, 3, dtype=torch.float64)
    optimal_PY = problem.optimal_PY
    for prompt in range(PROMPTS):
        mass: dict[tuple[int, int], float] = {}
        for steps, logprob in zip(COMPLETIONS, optimal_PY[prompt], strict=True):
            for step in steps:
                mass[step] = mass.get(step, 0.0) + float(logprob.exp())
        for (node, token), value in mass.items():
            tree[prompt, node, token] = torch.tensor(value, dtype=torch.float64).log()
    assert kl(optimal_PY, sequence_logprobs(tree)) == pytest.approx(0.0, abs=1e-12)
    for prompt in range(PROMPTS):
        for completion in range(len(COMPLETIONS)):
            assert float(problem.loss(tree, [(prompt, completion)])) < 1e-24


@pytest.mark.parametrize(
    "sampler",
    [lambda policy_PY: policy_PY, torch.ones_like],
    ids=["on-policy", "uniform, off-policy"],
)
def test_sgd_drives_the_policy_to_the_optimal_one(problem: Problem, sampler: Sampler) -> None:
    before = kl(sequence_logprobs(problem.reference), problem.optimal_PY)
    logits = descend(problem, sampler, steps=600)
    assert before > 0.1
    assert kl(sequence_logprobs(logits), problem.optimal_PY) < 1e-6
    assert kl(problem.optimal_PY, sequence_logprobs(logits)) < 1e-6


def test_samples_of_the_reference_have_the_same_minimiser(problem: Problem) -> None:
    reference_PY = sequence_logprobs(problem.reference).exp()
    logits = descend(problem, lambda _: reference_PY, steps=600)
    assert kl(sequence_logprobs(logits), problem.optimal_PY) < 1e-6


def test_the_on_policy_gradient_is_that_of_kl_regularised_reward(problem: Problem) -> None:
    """E_π ∇ℓ = −2β ∇(E_π r − β KL(π‖π_ref)), at any policy."""
    logits = random(PROMPTS, 3, 3, seed=2).requires_grad_()
    expected_loss = torch.zeros((), dtype=torch.float64)
    weight_PY = sequence_logprobs(logits.detach()).exp()
    for prompt in range(PROMPTS):
        for completion in range(len(COMPLETIONS)):
            share = problem.loss(logits, [(prompt, completion)])
            expected_loss = expected_loss + weight_PY[prompt, completion] * share
    (gradient,) = torch.autograd.grad(expected_loss, logits)
    policy_PY = sequence_logprobs(logits)
    log_ratio_PY = policy_PY - sequence_logprobs(problem.reference)
    value = (policy_PY.exp() * (problem.rewards_PY - BETA * log_ratio_PY)).sum()
    (ascent,) = torch.autograd.grad(value, logits)
    assert float(gradient.abs().max()) > 1e-2
    torch.testing.assert_close(gradient, -2 * BETA * ascent, rtol=1e-10, atol=1e-12)


def test_a_log_linear_policy_learns_the_optimal_one_on_its_own_samples() -> None:
    """Theorem 2's setting: parameters shared by the prompts, real rewards that the features can express."""
    completions, size = 6, 4
    features_PYD = random(PROMPTS, completions, size, seed=3)
    reference_D, tilt_D = random(size, seed=4), random(size, seed=5)
    rewards_PY = BETA * features_PYD @ tilt_D
    reference_PY = (features_PYD @ reference_D).log_softmax(-1)
    vstar_P = BETA * (reference_PY + rewards_PY / BETA).logsumexp(-1)
    optimal_PY = (features_PYD @ (reference_D + tilt_D)).log_softmax(-1)

    objective = AStarPO(beta2=BETA)
    theta_D = reference_D.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta_D], lr=0.3)
    generator = torch.Generator().manual_seed(6)
    distances = []
    for _ in range(800):
        policy_PY = (features_PYD @ theta_D).log_softmax(-1)
        distances.append(kl(policy_PY.detach(), optimal_PY))
        drawn_P = torch.multinomial(policy_PY.detach().exp(), 1, generator=generator)[:, 0]
        at = (torch.arange(PROMPTS), drawn_P)
        batch = batch_of([1] * PROMPTS, rewards_PY[at], vstar_B=vstar_P, reference_K=reference_PY[at])
        optimizer.zero_grad()
        loss_of(objective, policy_PY[at], batch).share.backward()
        optimizer.step()
    assert distances[0] > 0.25
    assert distances[400] < distances[0] / 10
    assert distances[-1] < 1e-4
