"""The folder of a trained model: a copy of the reference's, with the trained weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from common.errors import UserError
from common.model.checkpoint_names import CheckpointNames
from common.model.files import read_json
from common.model.weights import stored_weights

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
)
"""Files that are copied from the reference, if it has them."""
DTYPE_KEYS = ("dtype", "torch_dtype")
"""The keys of config.json in this and in earlier versions of transformers."""


def write_model(
    folder: Path, weights: dict[str, Tensor], names: CheckpointNames, reference: Path, dtype: str
) -> None:
    """Write trained weights, named as in the reference's checkpoint, and the rest of its folder, into `folder`.

    Tensors of the checkpoint that are not weights of the trained model, such as buffers, are copied from the reference.
    """
    others = {name: tensor for name, tensor in stored_weights(reference) if not names.covers(name)}
    save_torch_state_dict(weights | others, folder, metadata={"format": "pt"})
    config = read_json(reference / "config.json")
    if not any(key in config for key in DTYPE_KEYS):
        config[DTYPE_KEYS[-1]] = None
    text = json.dumps(_with_dtype(config, dtype), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for pattern in COPIED:
        for file in filter(Path.is_file, reference.glob(pattern)):
            shutil.copy2(file, folder)


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config with this dtype, also in each part that states one."""
    if not isinstance(config, dict):
        return config
    return {key: dtype if key in DTYPE_KEYS else _with_dtype(value, dtype) for key, value in config.items()}


def broken_weight(weights: Mapping[str, Tensor]) -> str | None:
    """The name of a weight that is not finite, if there is one."""
    return next((name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())), None)


def refuse_broken(name: str | None) -> None:
    """Raise UserError if there is a weight that is not finite."""
    if name is not None:
        raise UserError(
            f"the trained model is not written: its weight {name} is not finite; lower train.learning_rate, and start "
            "again under another --run"
        )
