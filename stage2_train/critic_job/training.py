"""Training of V_φ: the binary cross-entropy of sigmoid(logit) with the Monte-Carlo values of a step's states.

The paper's Eq. 3.8 with the loss of Section 3.2. Shapes: _S state.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_train.critic import Critic
from stage2_train.critic_job.batches import StateBatch, share_of, state_batches
from stage2_train.critic_job.states import CriticData, Trajectory
from stage2_train.metrics import Metrics
from stage2_train.ranks import Ranks


def cross_entropy(logits_S: Tensor, values_S: Tensor, states: int) -> Tensor:
    """The share of a step's loss that these states have: their cross-entropies over the step's number of states."""
    return F.binary_cross_entropy_with_logits(logits_S, values_S, reduction="sum") / states


class CriticTraining:
    """The optimizer steps of the critic, each taken by all ranks together."""

    def __init__(
        self, critic: Critic, states: CriticData, tokens_per_batch: int, pad_token_id: int, ranks: Ranks
    ) -> None:
        self._critic = critic
        self._budget = tokens_per_batch
        self._pad_token_id = pad_token_id
        self._ranks = ranks
        values = states.table["value"].to_numpy()
        self._values_S = torch.tensor(values, dtype=torch.float32, device=ranks.device)

    def step(self, trajectories: Sequence[Trajectory]) -> Metrics:
        """One optimizer step on all states of these trajectories; the figures are those of the whole step."""
        learner = self._critic.learner
        states = sum(len(each.states) for each in trajectories)
        ours = self._cut(share_of(trajectories, self._ranks.rank, self._ranks.world_size))
        # Under ZeRO-3 a pass is collective: a rank without a micro-batch left adds 0 to the loss.
        filler = ours[-1] if ours else self._cut(trajectories[:1])[0]
        turns = self._ranks.largest(len(ours))
        loss = torch.zeros((), device=self._ranks.device)
        rate = learner.learning_rate
        for turn in range(turns):
            batch = ours[turn] if turn < len(ours) else filler
            logits_S = self._critic.values_at(batch.input_ids_BT, batch.is_state_BT)
            share = cross_entropy(logits_S, self._values_S[list(batch.states)], states)
            share = share if turn < len(ours) else share * 0.0
            learner.backward(share, last=turn == turns - 1)
            loss += share.detach()
        norm = learner.step()
        return {
            "loss/cross_entropy": float(self._ranks.sum(loss)),
            "train/gradient_norm": norm,
            "train/learning_rate": rate,
            "train/states": float(states),
        }

    @torch.no_grad()
    def logits(self, trajectories: Sequence[Trajectory]) -> dict[int, float]:
        """The logits of all states of these trajectories, by the state's number, on every rank."""
        if not trajectories:
            return {}
        ours = self._cut(share_of(trajectories, self._ranks.rank, self._ranks.world_size))
        filler = self._cut(trajectories[:1])[0]
        found: list[tuple[int, float]] = []
        with self._critic.learner.evaluating():
            for turn in range(self._ranks.largest(len(ours))):
                batch = ours[turn] if turn < len(ours) else filler
                logits_S = self._critic.values_at(batch.input_ids_BT, batch.is_state_BT)
                if turn < len(ours):
                    found += zip(batch.states, logits_S.tolist(), strict=True)
        return dict(self._ranks.gather(found))

    def _cut(self, trajectories: Sequence[Trajectory]) -> list[StateBatch]:
        return state_batches(trajectories, self._budget, self._pad_token_id, self._ranks.device)
