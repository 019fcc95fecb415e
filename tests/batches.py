"""Batches written out by hand, for the tests of objectives: no tokens, no model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage2_train.batch import Batch, TokenLogprobs, Totals
from stage2_train.objectives.protocol import Loss, Objective


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(
    lengths: Sequence[int], rewards: Tensor | Sequence[float], *, group_size: int = 1, **columns: Tensor
) -> Batch:
    """Completions of these lengths, group after group, as one whole step."""
    rewards_B = rewards if isinstance(rewards, Tensor) else tensor(rewards)
    return Batch(
        group_of_B=torch.arange(len(lengths)) // group_size,
        lengths_B=torch.tensor(lengths, dtype=torch.long),
        rewards_B=rewards_B,
        totals=Totals(sequences=len(lengths), groups=len(lengths) // group_size, tokens=sum(lengths)),
        **columns,  # type: ignore[arg-type]
    )


def policy(logprobs_K: Tensor, entropy_K: Tensor | None = None) -> TokenLogprobs:
    """The network's log-probs of the tokens."""
    return TokenLogprobs(logprobs_K, torch.zeros_like(logprobs_K) if entropy_K is None else entropy_K)


def loss_of(objective: Objective, logprobs_K: Tensor, batch: Batch) -> Loss:
    """The objective's loss of a batch that has no credit yet."""
    return objective.loss(policy(logprobs_K), objective.credit(batch))


def loss_and_gradient(objective: Objective, logprobs_K: Tensor, batch: Batch) -> tuple[float, Tensor]:
    """The loss and its gradient by each token's log-prob."""
    leaf_K = logprobs_K.detach().clone().requires_grad_()
    loss = loss_of(objective, leaf_K, batch).share
    (gradient_K,) = torch.autograd.grad(loss, leaf_K)
    return float(loss.detach()), gradient_K


def loss_and_gradient_in_slices(
    objective: Objective, logprobs_K: Tensor, batch: Batch, slices: Sequence[Sequence[int]]
) -> tuple[float, Tensor]:
    """The same, added up over slices of the batch's rows; credit comes first, over all of them."""
    credited = objective.credit(batch)
    leaf_K = logprobs_K.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in slices:
        places_K = batch.places_of(torch.tensor(rows, dtype=torch.long))
        total = total + objective.loss(policy(leaf_K[places_K]), credited.at(rows, batch.totals)).share
    (gradient_K,) = torch.autograd.grad(total, leaf_K)
    return float(total.detach()), gradient_K


def minimising_logits(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The logits that minimise a loss of them, of the same shape as `start`."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()
