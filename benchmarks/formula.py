"""Algorithm 1's formula, written out in plain torch, and the steps that a trainer took, to compare with it."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.rollout import Rollout
from stage2_train.batch import Batch, Step
from stage2_train.checkpoint import POLICY
from stage2_train.config import TrainConfig
from stage2_train.objectives import AStarPO
from stage2_train.records import LOG_RATIO, Records, SequenceRecord
from stage2_train.train import Trainer
from stage2_train.update import Update

Sequences = Mapping[int, Mapping[str, Any]]
"""The completions of a step, as `TakenStep.of` gives them, by their place."""


@dataclass(frozen=True)
class ByFormula:
    """The formula's results: each step's loss, gradient norm and log-ratios by place; the weights after the last."""

    losses: list[float]
    norms: list[float]
    log_ratios: list[dict[int, float]]
    entropies: list[float]
    weights: dict[str, Tensor]


def by_formula(policy: Any, initial: Any, steps: Iterable[Sequences], train: TrainConfig) -> ByFormula:
    """Algorithm 1's line 10 as it is written: all logits of one sequence after the other, plain AdamW.

    `policy` is trained in place, where it has parameters that need a gradient; `initial` is π_ref. Both are models of
    transformers on one device.
    """
    assert isinstance(train.objective, AStarPO)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=train.learning_rate, betas=train.adam_betas, weight_decay=train.weight_decay
    )
    found = ByFormula([], [], [], [], policy.state_dict())
    for sequences in steps:
        losses, log_ratios, entropies = [], {}, []
        for place, sequence in sequences.items():
            prompt, completion = sequence["prompt"], sequence["completion"]
            logprobs, entropy = completion_logprobs(policy, prompt, completion)
            with torch.no_grad():
                initially, _ = completion_logprobs(initial, prompt, completion)
            log_ratio = (logprobs - initially).sum()
            losses.append((train.objective.beta2 * log_ratio - (sequence["reward"] - sequence["vstar"])) ** 2)
            log_ratios[place] = log_ratio.item()
            entropies.extend(entropy.tolist())
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)))
        optimizer.step()
        found.losses.append(loss.item())
        found.log_ratios.append(log_ratios)
        found.entropies.append(sum(entropies) / len(entropies))
    return found


def completion_logprobs(
    model: Any, prompt: Sequence[int], completion: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """ln π of each token of a completion and the entropy there."""
    token_ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(token_ids).logits[0, len(prompt) - 1 : -1]
    log_softmax = logits.float().log_softmax(-1)
    logprobs = log_softmax[torch.arange(len(completion)), token_ids[0, len(prompt) :]]
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1).detach()


@dataclass(frozen=True)
class TakenStep:
    """An optimizer step that was taken, and its records as they were after it."""

    step: Step
    norm: float
    records: list[SequenceRecord]

    def of(self, trainer: Trainer[Any], rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """This rank's number of slices, its sequences by place, and the gradient norm."""
        assert trainer.data.stage1 is not None
        return {
            "slices": len(self.step.slices),
            "norm": self.norm,
            "sequences": {
                trainer.places[row]: {
                    "prompt": list(rollouts[row].prompt.token_ids),
                    "completion": list(rollouts[row].completion.token_ids),
                    "reward": rollouts[row].reward,
                    "vstar": trainer.data.stage1.vstar[rollouts[row].prompt.id],
                    "loss": self.records[row].figures["loss/regression"],
                    "log_ratio": self.records[row].figures[LOG_RATIO],
                }
                for row in sorted(self.step.rows)
            },
        }


class WatchedUpdate(Update):
    """A trainer's update, and what it was given. Of judged completions only: their rows are those of the rollouts."""

    def __init__(self, trainer: Trainer[Any]) -> None:
        super().__init__(trainer.parts.update.parts, trainer.ranks)
        self.steps: list[TakenStep] = []
        trainer.parts = replace(trainer.parts, update=self)

    def __call__(self, step: Step, batch: Batch, records: Records) -> dict[str, float]:
        norms = super().__call__(step, batch, records)
        self.steps.append(TakenStep(step, norms[POLICY], deepcopy(records.all)))
        return norms
