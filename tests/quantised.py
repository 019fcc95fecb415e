"""Makes models whose linear layers have 8-bit weights, in a format that vLLM samples from on a CPU too."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fakes import change_json


def save_quantised(model: Path, folder: Path) -> Path:
    """A copy of a model as llm-compressor writes it with scheme W8A8: one scale per row, activations quantised too."""
    shutil.copytree(model, folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def eight_bits(**options: Any) -> dict[str, Any]:
        return {"num_bits": 8, "type": "int", "symmetric": True, **options}

    change_json(
        folder / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": eight_bits(strategy="channel", dynamic=False),
                    "input_activations": eight_bits(strategy="token", dynamic=True),
                }
            },
        },
    )
    return folder
