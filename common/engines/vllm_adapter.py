"""An adapter inside vLLM: the model's weights stay as they are, and the adapter's product is added in each layer."""

import json
import shutil
from collections.abc import Iterable
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from common.engines.protocol import LowRank
from common.engines.weight_files import new_folder_in_memory
from common.errors import UserError


def lora_options(adapter: LowRank) -> dict[str, Any]:
    """vLLM's options for one adapter at a time. Raises UserError for a rank that it does not know."""
    from vllm.config.lora import MaxLoRARanks

    known: tuple[int, ...] = get_args(MaxLoRARanks)
    ranks = [rank for rank in known if rank >= adapter.rank]
    if not ranks:
        raise UserError(
            f"train.lora.rank {adapter.rank} is more than vLLM's adapters may have ({max(known)}); "
            'choose a lower one, or set train.lora.in_engine = "merged"'
        )
    return {"enable_lora": True, "max_lora_rank": min(ranks), "max_loras": 1, "max_cpu_loras": 2}


class VllmAdapter:
    """The adapter that an engine samples with; none at first."""

    def __init__(self, shape: LowRank) -> None:
        self._shape = shape
        self._number = 0
        self.request: Any = None
        """For the engine's requests."""

    def replace(self, engine: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take another adapter, by the names of peft, through a folder in peft's format."""
        from vllm.lora.request import LoRARequest

        folder = new_folder_in_memory("adapter")
        try:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}
            save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            settings = {
                "peft_type": "LORA",
                "r": self._shape.rank,
                "lora_alpha": self._shape.alpha,
                "bias": "none",
                "target_modules": sorted({name.split(".")[-3] for name in state}),
            }
            (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
            before = self._number
            self._number += 1
            request = LoRARequest(f"policy-{self._number}", self._number, str(folder))
            engine.add_lora(request)
            if before:
                engine.remove_lora(before)
            self.request = request
        finally:
            shutil.rmtree(folder, ignore_errors=True)
