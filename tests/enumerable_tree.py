"""A step-level decision problem small enough to enumerate, with exact values by dynamic programming.

A solution is a path through a tree: in each state the policy takes one of A steps, which leads to another state or ends
the solution with a reward. States are numbered so that a step leads to a higher number. Equations are those of Direct
Advantage Policy Optimization (Liu et al., 2024), whose β-values are relative to a reference policy.

Shapes: _S state, _A step; everything is float64, and policies are log-probs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.special import wrightomega
from torch import Tensor

END = -1


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The states with their steps. The reward is that of the step which ends the solution."""

    next_SA: Tensor
    """The state that a step leads to, or END."""
    rewards_SA: Tensor
    """0 where the solution goes on."""

    @property
    def states(self) -> int:
        return self.next_SA.shape[0]

    @property
    def ends_SA(self) -> Tensor:
        """Whether a step ends the solution."""
        return self.next_SA == END

    @cached_property
    def root_S(self) -> Tensor:
        """The distribution of first states that is all in the first one."""
        return torch.eye(self.states, dtype=torch.float64)[0]

    @cached_property
    def solutions(self) -> list[list[tuple[int, int]]]:
        """All solutions, as their (state, step)s."""
        found: list[list[tuple[int, int]]] = []

        def walk(state: int, path: list[tuple[int, int]]) -> None:
            for step, after in enumerate(self.next_SA[state].tolist()):
                here = [*path, (state, step)]
                if after == END:
                    found.append(here)
                else:
                    walk(after, here)

        walk(0, [])
        return found

    def solution_logprobs(self, policy_SA: Tensor) -> Tensor:
        """ln π of each solution, from the first state."""
        return torch.stack([sum_of(policy_SA, solution) for solution in self.solutions])

    @property
    def solution_rewards(self) -> Tensor:
        return torch.stack([sum_of(self.rewards_SA, solution) for solution in self.solutions])

    def after(self, values_S: Tensor) -> Tensor:
        """r(s, a) + V(f(s, a)), shape (S, A): Eq. 2.3."""
        return self.rewards_SA + torch.where(self.ends_SA, 0.0, values_S[self.next_SA.clamp(min=0)])

    def values(self, policy_SA: Tensor, reference_SA: Tensor | None = None, beta: float = 0.0) -> Tensor:
        """V_β^π of every state, shape (S,): Eq. 2.2. Without a reference, the expected reward."""
        cost_SA = 0.0 if reference_SA is None else beta * (policy_SA - reference_SA)
        values_S = torch.zeros(self.states, dtype=torch.float64)
        for state in reversed(range(self.states)):
            values_S[state] = (policy_SA.exp() * (self.after(values_S) - cost_SA))[state].sum()
        return values_S

    def advantages(self, policy_SA: Tensor) -> Tensor:
        """A^π = Q^π − V^π, shape (S, A), without a penalty."""
        values_S = self.values(policy_SA)
        return self.after(values_S) - values_S[:, None]

    def optimal(self, reference_SA: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """V*_β, shape (S,), and ln π*_β, shape (S, A): Lemma 2.1 and Theorem 2.3."""
        values_S = torch.zeros(self.states, dtype=torch.float64)
        for state in reversed(range(self.states)):
            tilted_A = reference_SA[state] + self.after(values_S)[state] / beta
            values_S[state] = beta * tilted_A.logsumexp(-1)
        return values_S, (reference_SA + self.after(values_S) / beta).log_softmax(-1)

    def visits(self, policy_SA: Tensor, start_S: Tensor) -> Tensor:
        """How often the policy is in each state, in expectation, for first states drawn from `start_S`."""
        visits_S = start_S.clone()
        for state in range(self.states):
            for step, after in enumerate(self.next_SA[state].tolist()):
                if after != END:
                    visits_S[after] += visits_S[state] * policy_SA[state, step].exp()
        return visits_S


def sum_of(numbers_SA: Tensor, solution: list[tuple[int, int]]) -> Tensor:
    return torch.stack([numbers_SA[state, step] for state, step in solution]).sum()


def random_tree(seed: int, *, steps: int = 3, depth: int = 3) -> Tree:
    """A tree of `depth` levels whose first step always ends the solution. Its rewards are 0 and 1, as many of each."""
    levels = [(steps - 1) ** level for level in range(depth)]
    inner = sum(levels[:-1])
    next_SA = torch.full((sum(levels), steps), END)
    next_SA[:inner, 1:] = torch.arange(1, sum(levels)).reshape(inner, steps - 1)
    generator = torch.Generator().manual_seed(seed)
    is_end = next_SA == END
    ends = int(is_end.sum())
    rewards = torch.arange(ends) % 2
    rewards_SA = torch.zeros(next_SA.shape, dtype=torch.float64)
    rewards_SA[is_end] = rewards[torch.randperm(ends, generator=generator)].double()
    return Tree(next_SA=next_SA, rewards_SA=rewards_SA)


def random_policy(tree: Tree, seed: int, *, scale: float = 1.0) -> Tensor:
    """ln π of a softmax of random logits."""
    return random(*tree.next_SA.shape, seed=seed).mul(scale).log_softmax(-1)


def kl(left_SA: Tensor, right_SA: Tensor) -> Tensor:
    """KL(left ‖ right) over the last axis."""
    return (left_SA.exp() * (left_SA - right_SA)).sum(-1)


def regression(policy_SA: Tensor, reference_SA: Tensor, advantages_SA: Tensor, nu_SA: Tensor) -> Tensor:
    """½ E_ν (A − ln π/π_ref)² of each state, shape (S,), for advantages that are already divided by β: Eq. 3.5."""
    return (nu_SA * (advantages_SA - (policy_SA - reference_SA)) ** 2).sum(-1) / 2


def multipliers(policy_SA: Tensor, reference_SA: Tensor, advantages_SA: Tensor, nu_SA: Tensor) -> Tensor:
    """λ from each step's own KKT condition (Eq. A.2), shape (S, A). At the minimiser a state's are all equal."""
    log_ratio_SA = policy_SA - reference_SA
    return (advantages_SA - log_ratio_SA) * nu_SA / policy_SA.exp()


def exact_minimiser(reference_SA: Tensor, advantages_SA: Tensor, nu_SA: Tensor) -> Tensor:
    """ln π⁺ of exact Direct Advantage PO (Eq. 3.9), from its KKT condition, for advantages divided by β.

    For a given λ, A − u = λ π_ref/ν e^u has the solution u = A − ω(A + ln(λ π_ref/ν)) with Wright's function ω. The
    probabilities' sum falls with λ, and λ ≥ 0 is found by bisection.
    """
    weights_SA = reference_SA - nu_SA.log()

    def policy(log_lambda_S: Tensor) -> Tensor:
        inner_SA = advantages_SA + log_lambda_S[:, None] + weights_SA
        return reference_SA + advantages_SA - torch.from_numpy(wrightomega(inner_SA.numpy()).real)

    low_S, high_S = torch.full((2, len(reference_SA)), 80.0, dtype=torch.float64) * torch.tensor(
        [[-1.0], [1.0]]
    )
    for _ in range(100):
        middle_S = (low_S + high_S) / 2
        is_more_S = policy(middle_S).logsumexp(-1) > 0
        low_S = torch.where(is_more_S, middle_S, low_S)
        high_S = torch.where(is_more_S, high_S, middle_S)
    return policy(high_S)
