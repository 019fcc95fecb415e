"""LoRA by peft: small trainable matrices beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

The frozen model without its adapter is the reference model, so no second one is held.

Shapes: _I a layer's inputs, _O its outputs, _R the adapter's rank.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.seeds import derive_seed
from stage2_train.adapted_layers import adapted_layers
from stage2_train.config import Config

ADAPTER = "default"
"""peft's name for a model's only adapter."""
WEIGHTS_FILE = "adapter_model.safetensors"
"""The file that PeftModel.from_pretrained looks for."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """ΔW = scale · B A, what an adapter adds to a layer's frozen weight W."""

    down_RI: nn.Parameter
    up_OR: nn.Parameter
    scale: float
    is_transposed: bool
    """Whether the layer keeps W as (I, O), as GPT-2's do."""

    def added_to(self, weight: Tensor) -> Tensor:
        """W + ΔW in W's shape and dtype: computed in float32 and rounded once."""
        up_OR, down_RI = self.up_OR.detach().float(), self.down_RI.detach().float()
        factors = (down_RI.T, up_OR.T) if self.is_transposed else (up_OR, down_RI)
        return torch.addmm(weight.detach().float(), *factors, alpha=self.scale).to(weight.dtype)


class Adapter:
    """The trainable part of a model whose own weights are frozen. It starts at ΔW = 0: B is zero."""

    def __init__(self, model: PreTrainedModel, config: Config) -> None:
        """Put an adapter into `model`, in place. Raises UserError for a layer that the model does not have."""
        lora = config.train.lora
        assert lora is not None, "an adapter was asked for"
        self._settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=adapted_layers(model, lora.target_modules),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
            revision=config.model.revision,
        )
        with torch.random.fork_rng(devices=[]):
            # Every rank draws the same A; under ZeRO-3 DeepSpeed keeps each rank's part of it.
            torch.manual_seed(derive_seed(config.seed, "lora"))
            self._model: PeftModel = get_peft_model(model, self._settings, autocast_adapter_dtype=False)
        if "{run}" not in config.model.path:
            # The hub's name of a model, if it has one, is more useful than a folder in this machine's cache.
            self._settings.base_model_name_or_path = config.model.path
        self._updates = {
            f"{name}.base_layer.weight": LowRankUpdate(
                layer.lora_A[ADAPTER].get_parameter("weight"),
                layer.lora_B[ADAPTER].get_parameter("weight"),
                layer.scaling[ADAPTER],
                is_transposed=bool(getattr(layer, "fan_in_fan_out", False)),
            )
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model is the one that training began with."""
        with self._model.disable_adapter():
            yield

    def merged_weights(self, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, LowRankUpdate | None]]:
        """The base model's weights under its own names, each with the update to add to it."""
        return {
            name.replace(".base_layer.", "."): (weight, self._updates.get(name))
            for name, weight in weights.items()
            if ".lora_" not in name
        }

    def state(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's weights, named as in the model, by the names that peft gives them."""
        state: dict[str, Tensor] = get_peft_model_state_dict(
            self._model,
            {f"base_model.model.{name}": weight for name, weight in weights.items()},
            save_embedding_layers=False,
        )
        return state

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the adapter's weights, named as in the model, for PeftModel.from_pretrained."""
        folder.mkdir()
        state = self.state(weights)
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self._settings.save_pretrained(str(folder))


def keep_trained_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """A hook on a module's state_dict that leaves frozen weights out of it, whatever they are called."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name.removeprefix(prefix) not in trained]:
        del state[name]
