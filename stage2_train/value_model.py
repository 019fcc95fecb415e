"""A critic's network: a model for token classification with one label. Needs no DeepSpeed.

Shapes: _B sequence, _T position, _H hidden, _S state of the micro-batch.
"""

from typing import Any

from torch import Tensor, nn


class ValueModel(nn.Module):
    """A model for token classification whose forward pass gives the values of a batch's states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BT: Tensor, is_state_BT: Tensor) -> Tensor:
        """The value of the state at each marked position, in row order, shape (S,), in float32."""
        hidden_BTH = self.model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        values: Tensor = value_head(self.model)(hidden_BTH[is_state_BT])
        return values.squeeze(-1).float()


def value_head(model: Any) -> nn.Linear:
    """The layer from hidden states to a value."""
    head: nn.Linear = model.score if hasattr(model, "score") else model.classifier
    return head
