"""The folder of a trained model: a copy of the reference's, with the trained weights; and that of a critic."""

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
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
CRITIC_LABEL = "correct"
"""The name of a critic's label: its probability is that of a correct solution."""
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
    copy_tokenizer(reference, folder)


def write_critic(folder: Path, weights: dict[str, Tensor], model: Any, tokenizer: Path, dtype: str) -> None:
    """Write a token classifier with one label, which is `model` with these weights, and a tokenizer into `folder`.

    The sigmoid of its logit is a value, so its problem is one of independent labels.
    """
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.problem_type = "multi_label_classification"
    config.id2label, config.label2id = {0: CRITIC_LABEL}, {CRITIC_LABEL: 0}
    config.to_json_file(folder / "config.json")
    copy_tokenizer(tokenizer, folder)


def copy_tokenizer(reference: Path, folder: Path) -> None:
    """Copy the files of the reference besides its network, such as the tokenizer's."""
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


def refuse_broken(name: str | None, setting: str) -> None:
    """Raise UserError if there is a weight that is not finite; `setting` is the key of its learning rate."""
    if name is not None:
        raise UserError(
            f"the trained model is not written: its weight {name} is not finite; lower {setting}, and start again "
            "under another --run"
        )
