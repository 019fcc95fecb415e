"""How a language model computes logits from hidden states: by its output layer, and its class's function of these.

Shapes: _R position, _H hidden, _C of a slice of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import UserError

LogitTransform = Callable[[Tensor], Tensor]
"""A model's elementwise function of the output layer's logits; shape (R, C) to (R, C)."""

PROBE_POSITIONS, PROBE_LOGITS = 3, 6
PROBE_SCALE = 30.0
"""Approximate size of the probe's logits: a soft cap that does not change these changes no softmax."""


def text_trunk(model: PreTrainedModel) -> nn.Module:
    """The part of a language model that turns tokens into hidden states; the text part if others read images."""
    is_composite = model.config.get_text_config() is not model.config
    trunk: nn.Module = model.get_decoder() if is_composite else model.base_model
    return trunk


def freeze_all_but_text(model: PreTrainedModel) -> None:
    """Freeze the parts that text does not pass through, such as those that read images."""
    trained = {*text_trunk(model).parameters(), *output_layer(model).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer to the vocabulary. Raises UserError if the model has none of its own."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or layer not in model.children() or model.base_model is model:
        raise _refusal(model, "it has no output layer that is a linear layer after its body")
    return layer


def logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """The function that a model's class applies to the output layer's logits, such as a soft cap; None for identity.

    It is probed by the class's own forward pass, with random hidden states and a small random output layer in place of
    the model's: no weights are read. Raises UserError if the logits do not follow from the output layer's, one by one.
    """
    layer = output_layer(model)
    random = torch.Generator().manual_seed(0)
    probe = nn.Linear(
        layer.in_features, PROBE_LOGITS, bias=layer.bias is not None, device="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(PROBE_SCALE * torch.randn(parameter.shape, generator=random))
        hidden_RH = torch.randn(PROBE_POSITIONS, layer.in_features, generator=random) / layer.in_features**0.5
        linear_RC = probe(hidden_RH)
        try:
            own_RC = _forward(model, probe, hidden_RH)
            if _equal(own_RC, linear_RC):
                return None
            transform = _transform(model)
            found_RC = transform(linear_RC)
            pieces_RC = [
                torch.cat([transform(half) for half in row.chunk(2, -1)], -1) for row in linear_RC.split(1)
            ]
        except Exception as error:
            raise _refusal(
                model, f"its forward pass cannot be followed ({type(error).__name__}: {error})"
            ) from error
    if _equal(found_RC, own_RC) and _equal(torch.cat(pieces_RC), own_RC):
        return transform
    raise _refusal(model, "its logits do not follow from its output layer one by one")


def _transform(model: PreTrainedModel) -> LogitTransform:
    return lambda logits_RC: _forward(model, _Identity(), logits_RC)


def _forward(model: PreTrainedModel, layer: nn.Module, hidden_RH: Tensor) -> Tensor:
    """The logits that the model's class computes of these hidden states with another output layer."""
    (name,) = (name for name, child in model.named_children() if child is model.get_output_embeddings())
    shell = object.__new__(type(model))
    shell.__dict__.update(model.__dict__)
    shell.__dict__["_modules"] = {
        **model._modules,
        model.base_model_prefix: _Given(model.base_model, hidden_RH[None]),
        name: layer,
    }
    ids = torch.zeros((1, len(hidden_RH)), dtype=torch.long, device=hidden_RH.device)
    logits: Tensor = type(model).forward(shell, input_ids=ids).logits[0]
    return logits


class _Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)
        self.bias = None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Given:
    """Replaces a model's body: returns the given hidden states for any input; its attributes are the body's."""

    def __init__(self, body: nn.Module, hidden: Tensor) -> None:
        self._body, self._output = body, _Output(hidden)

    def __call__(self, *_: Any, **__: Any) -> "_Output":
        return self._output

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._body, name)
        # OPT's forward pass calls a part of its body, the decoder.
        return _Given(found, self._output.last_hidden_state) if isinstance(found, nn.Module) else found


class _Output:
    """The output of a model's body, as a record or a tuple, with only hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(torch.allclose(ours.float(), theirs, rtol=1e-5, atol=1e-5))


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    kind = f"{model.config.model_type} ({type(model).__name__})"
    return UserError(f"models of type {kind} cannot be trained: {reason}; use another model")
