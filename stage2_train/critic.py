"""The critic: the reference model's network with a scalar head, which learns the value of each state.

The state before a completion's token is the prompt with the tokens before it. The critic is a transformers model for
token classification with one label, so any code that loads such models loads a critic.

Shapes: _B sequence, _T position, _H hidden, _K completion token of the micro-batch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.model.pretrained import load_pretrained, token_classifier
from stage2_train.batch import TokenBatch
from stage2_train.config import Config
from stage2_train.learner import Learner
from stage2_train.lora import Adapter, keep_trained_weights
from stage2_train.ranks import Ranks


class ValueModel(nn.Module):
    """A model for token classification whose forward pass gives the values of a batch's states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: Tensor, is_completion_BT: Tensor) -> Tensor:
        """The value of the state before each completion token, in row order, shape (K,), in float32."""
        hidden_BTH = self.model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        values: Tensor = value_head(self.model)(hidden_BTH[:, :-1][is_completion_BT[:, 1:]])
        return values.squeeze(-1).float()


class Critic:
    """V: values of states, and the learner behind them. At the start every state has the value 0."""

    def __init__(self, folder: Path, config: Config, ranks: Ranks, *, learning_rate: float) -> None:
        """Start from the reference model in `folder`."""
        module = ValueModel(_load(folder, config))
        if config.train.lora is not None:
            Adapter(module.model, config)
            value_head(module.model).requires_grad_(True)
            module.register_state_dict_post_hook(keep_trained_weights)  # type: ignore[no-untyped-call]
        if config.train.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
        setting = "train.objective.critic_learning_rate"
        self.learner = Learner(module, config, ranks, learning_rate=learning_rate, setting=setting)

    def values(self, tokens: TokenBatch) -> Tensor:
        """V of the state before each completion token, with gradients."""
        values: Tensor = self.learner(tokens.input_ids_BT, tokens.is_completion_BT)
        return values


def value_head(model: Any) -> nn.Linear:
    """The layer from hidden states to a value."""
    head: nn.Linear = model.score if hasattr(model, "score") else model.classifier
    return head


def _load(folder: Path, config: Config) -> Any:
    model = load_pretrained(token_classifier(folder), folder, config.model.dtype, num_labels=1)
    head = value_head(model)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return model
