"""The critic: the reference model's network with a scalar head, which learns the value of each state.

The state at a token is the sequence up to it; that before a completion's token is the prompt with the tokens before
it. The critic is a transformers model for token classification with one label, so any code that loads such models loads
a critic.

Shapes: _B sequence, _T position, _K completion token of the micro-batch, _S state of the micro-batch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.model.checkpoint_names import CheckpointNames
from common.model.pretrained import load_pretrained, token_classifier
from stage2_train.batch import TokenBatch
from stage2_train.config import Config
from stage2_train.exported import broken_weight, refuse_broken, write_critic
from stage2_train.learner import Learner
from stage2_train.lora import Adapter, keep_trained_weights
from stage2_train.network import in_main_memory, named_weights
from stage2_train.ranks import Ranks
from stage2_train.value_model import ValueModel, value_head


class Critic:
    """V: values of states, and the learner behind them. At the start every state has the value 0."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        ranks: Ranks,
        *,
        learning_rate: float,
        setting: str = "train.objective.critic_learning_rate",
    ) -> None:
        """Start from the model in `folder`; `setting` is the key of the learning rate."""
        module = ValueModel(_load(folder, config))
        self._ranks = ranks
        self._setting = setting
        self._names = CheckpointNames(module.model)
        self._adapter = None
        if config.train.lora is not None:
            self._adapter = Adapter(module.model, config)
            value_head(module.model).requires_grad_(True)
            module.register_state_dict_post_hook(keep_trained_weights)  # type: ignore[no-untyped-call]
        if config.train.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.learner = Learner(module, config, ranks, learning_rate=learning_rate, setting=setting)

    def values(self, tokens: TokenBatch) -> Tensor:
        """V of the state before each completion token, shape (K,), with gradients."""
        is_state_BT = tokens.is_completion_BT.roll(-1, dims=1)
        is_state_BT[:, -1] = False
        return self.values_at(tokens.input_ids_BT, is_state_BT)

    def values_at(self, input_ids_BT: Tensor, is_state_BT: Tensor) -> Tensor:
        """V of the state at each marked position, shape (S,), with gradients."""
        values: Tensor = self.learner(input_ids_BT, is_state_BT)
        return values

    def weights(self) -> dict[str, Tensor]:
        """The weights by their names in a checkpoint, an adapter merged into them; empty but on the main rank.

        A collective operation. Raises UserError if a weight is not finite.
        """
        gather = self.learner.gathered if self.learner.is_partitioned else None
        model = self.learner.module.model
        weights = in_main_memory(named_weights(model, self._names, self._adapter, gather), self._ranks)
        refuse_broken(self._ranks.from_main(broken_weight(weights)), self._setting)
        return weights

    def write(self, folder: Path, weights: dict[str, Tensor], tokenizer: Path, dtype: str) -> None:
        """Write the critic with these weights, and the tokenizer of another folder, into `folder`."""
        write_critic(folder, weights, self.learner.module.model, tokenizer, dtype)


def _load(folder: Path, config: Config) -> Any:
    model = load_pretrained(token_classifier(folder), folder, config.model.dtype, num_labels=1)
    head = value_head(model)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return model
