"""Which layers of a model get an adapter, and which weights cannot have one. Needs no peft: stage 1 uses it too."""

import re
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import UserError
from common.model.checkpoint_names import CheckpointNames
from common.model.output_layer import text_trunk
from common.model.pretrained import empty_causal_lm
from stage2_train.config import LoraConfig

EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.weight$")
"""A weight of one expert, as checkpoints have it."""


def refuse_unknown_layers(folder: Path, lora: LoraConfig) -> None:
    """Raise UserError unless the model in `folder` has the layers to adapt; its weights are not read."""
    adapted_layers(empty_causal_lm(folder), lora.target_modules)


def adapted_layers(model: PreTrainedModel, chosen: tuple[str, ...] | str) -> list[str] | str:
    """peft's target: names of layers, or a pattern if other parts of the model have layers of the same names.

    The output layer is excluded: log-probs read its weight directly.
    """
    trunk, without = text_trunk(model), unadapted(model)
    linear = linear_layers(model) - without
    names = linear if isinstance(chosen, str) else set(chosen)
    choice = f'choose from {", ".join(sorted(linear))}, or "all-linear"'
    if refused := sorted(names & without):
        raise UserError(
            f"train.lora.target_modules: no adapter can be put beside this model's {', '.join(refused)}: the names of "
            f"weights that transformers keeps for all experts together, or that kernels read directly; {choice}"
        )
    if unknown := sorted(names - linear):
        raise UserError(
            f"train.lora.target_modules: the model has no linear layers called {', '.join(unknown)} before its output "
            f"layer; {choice}"
        )
    if trunk is model.base_model:
        return sorted(names)
    place = next(name for name, module in model.named_modules() if module is trunk)
    return rf"{re.escape(place)}\.(?:.*\.)?({'|'.join(map(re.escape, sorted(names)))})"


def linear_layers(model: PreTrainedModel) -> set[str]:
    """The names of the linear layers before the output layer."""
    modules = text_trunk(model).named_modules()
    return {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


def unadapted(model: PreTrainedModel) -> set[str]:
    """The names of weights that cannot have an adapter.

    transformers keeps the weights of all experts of a layer in one tensor. peft takes the names of these weights in a
    checkpoint for that tensor, even if an ordinary layer has the same name. The kernels of a state-space layer read the
    weight of its output projection directly, past an adapter.
    """
    experts = {found[1] for name in CheckpointNames(model).shapes if (found := EXPERT.search(name))}
    whole = {
        name.split(".")[-1]
        for name, weight in text_trunk(model).named_parameters()
        if weight.ndim == 3 and ".experts." in name
    }
    state_space = any(hasattr(module, "A_log") and hasattr(module, "D") for module in model.modules())
    return experts | whole | ({"out_proj"} if state_space else set())
