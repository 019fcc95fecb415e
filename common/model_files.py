"""A model's folder: where it is, what it says of itself, what makes it this model."""

import json
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import UserError
from common.files import hash_files
from common.runs import run_paths


def resolve_model(path: str, revision: str | None) -> Path:
    """The local folder of a model: a given folder, or a hub model's snapshot (downloaded if need be).

    Raises UserError if there is no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} is no model in Hugging Face format: it has no config.json")
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise UserError(
            f"there is no model at {path}; check model.path; the demo's is built by `make base-model`"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no model {path}: it is neither a local folder nor to be had from the Hugging Face hub "
            f"({reason}); check model.path"
        ) from error


def reference_model(config: RunConfig) -> Path:
    """The local folder of a run's reference model; {run} in its path stands for the run's own folder."""
    path = config.model.path.replace("{run}", str(run_paths(config.run).root))
    return resolve_model(path, config.model.revision)


def model_identity(folder: Path) -> dict[str, Any]:
    """What makes a model this model: hashes of its weights and of its tokenizer."""
    weights = hash_files(folder, ("*.safetensors",))
    if not weights:
        raise UserError(f"{folder} holds no *.safetensors weights; convert the model to safetensors first")
    return {
        "weights": weights,
        "tokenizer": hash_files(
            folder, ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
        ),
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {str(error).splitlines()[0]}; download the model again"
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object; download the model again")
    return document
