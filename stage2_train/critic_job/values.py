"""The values that a trained critic gives: in one process, without DeepSpeed, on a GPU if there is one."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from scipy.special import expit

from common.model.files import model_numbers
from common.model.pretrained import load_pretrained, token_classifier
from common.segments.critic import refuse_longer, refuse_missing_critic
from stage2_train.config import Config
from stage2_train.critic_job.batches import state_batches
from stage2_train.critic_job.states import Trajectory
from stage2_train.value_model import ValueModel

TRAJECTORIES_AT_A_TIME = 4096
"""How many are sorted by length and cut together: bounds memory."""
PADDING = 0
"""Any token that the model can read will do: it comes after all states."""


def state_values(folder: Path, token_ids: Iterable[Sequence[int]], config: Config) -> list[float]:
    """The `TrainedCritic.values` of a critic for a single call."""
    return TrainedCritic(folder, config).values(token_ids)


class TrainedCritic:
    """A critic that has been trained."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Load it. Raises UserError if there is none."""
        refuse_missing_critic(folder)
        self._folder = folder
        self._budget = config.train.tokens_per_micro_batch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_pretrained(token_classifier(folder), folder, config.model.dtype)
        self._module = ValueModel(model).eval().requires_grad_(False).to(self._device)

    @property
    def context(self) -> int | None:
        """The most tokens of a sequence, None if the model sets no bound."""
        return model_numbers(self._folder).get("max_position_embeddings")

    def values(self, token_ids: Iterable[Sequence[int]]) -> list[float]:
        """V_φ at the last token of each sequence, between 0 and 1, in the order of the sequences.

        A sequence has the tokens of the prompt and of the steps so far. Micro-batches have at most
        `train.tokens_per_micro_batch` tokens; the critic is held in `model.dtype`. Raises UserError for a sequence that
        is longer than its context.
        """
        sequences = (
            Trajectory(token_ids=ids, ends=(len(ids),), states=(number,))
            for number, ids in enumerate(token_ids)
        )
        logits = self.logits(sequences)
        return [float(expit(logits[number])) for number in range(len(logits))]

    @torch.no_grad()
    def logits(self, trajectories: Iterable[Trajectory]) -> dict[int, float]:
        """The logits of all states, by the state's number. Raises UserError for one beyond the context."""
        found: dict[int, float] = {}
        rest = iter(trajectories)
        while some := list(islice(rest, TRAJECTORIES_AT_A_TIME)):
            refuse_longer(max(map(len, some)), self._folder)
            for batch in state_batches(some, self._budget, PADDING, self._device):
                logits_S = self._module(batch.input_ids_BT, batch.is_state_BT)
                found.update(zip(batch.states, logits_S.tolist(), strict=True))
        return found
