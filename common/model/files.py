"""A model's folder: its location, its configuration, and its identity."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import UserError
from common.files import hash_files
from common.model.weights import read_weights, weights_hash
from common.remote.copies import fetched
from common.remote.places import here
from common.runs import OWN, run_paths
from common.settings import makes_base_model

ADAPTER = "adapter_config.json"
QUANTISATION_FILE = "hf_quant_config.json"
"""Where older versions of ModelOpt say how weights are quantised; vLLM reads it if config.json says nothing."""


def resolve_model(path: str, revision: str | None, *, advice: str = "check model.path") -> Path:
    """The local folder of a model: a given folder, or a hub model's snapshot (downloaded if need be).

    Raises UserError, with the advice, if there is no such model.
    """
    if not path.strip():
        raise UserError("the path of a model is empty; give a folder, or a name on the Hugging Face hub")
    folder = fetched(here(path), whole=True)
    if folder.is_dir():
        if (folder / ADAPTER).is_file():
            raise UserError(
                f"{path} holds a PEFT adapter ({ADAPTER}), which is loaded or left out depending on the library: merge "
                "it into its base model first (merge_and_unload, then save_pretrained)"
            )
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} is not a model in Hugging Face format: it has no config.json")
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise UserError(f"there is no model at {path}; {advice}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no model {path}: it is neither a local folder nor available from the Hugging Face hub "
            f"({reason}); check model.path"
        ) from error


def reference_model(config: RunConfig) -> Path:
    """The local folder of a run's reference model; {run} in its path stands for the run's own folder."""
    path = config.model.path.replace(OWN, str(run_paths(config.run).root))
    if config.model.revision is not None and Path(path).is_dir():
        raise UserError(
            f'model.revision = "{config.model.revision}" would have no effect: {path} is a folder on this machine, not '
            "a model of the hub; leave it out"
        )
    advice = "make it with `python cli.py base-model`" if makes_base_model(config) else "check model.path"
    return resolve_model(path, config.model.revision, advice=advice)


TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
WITHOUT_EFFECT = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    ),
}
"""Keys of config.json that do not change a model's output; the end tokens are part of the prompts' identity."""


def model_identity(folder: Path, memory: Path | None = None) -> dict[str, Any]:
    """The identity of a model: hashes of its weights, its tokenizer, and the network described by its config.

    Hashes of the weights are cached in `memory`, see `weights_hash`.
    """
    weights = read_weights(folder)
    network = network_hash(folder)
    if weights.unread:
        # The hash of the weights covers all files; it does not tell which of them are loaded.
        loaded = [file.name for file in weights.files]
        network = hashlib.sha256(json.dumps([network, loaded]).encode()).hexdigest()[:32]
    return {
        "weights": weights_hash(weights, memory),
        "tokenizer": hash_files(folder, TOKENIZER_FILES),
        "config": network,
    }


def network_hash(folder: Path) -> str:
    """A hash of the network described by a model's config.json: of all keys except `WITHOUT_EFFECT`.

    A file that says how its weights are quantised counts too.
    """
    config = _without_effectless(read_json(folder / "config.json"))
    if (file := folder / QUANTISATION_FILE).is_file():
        config[file.name] = read_json(file)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:32]


def _without_effectless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_effectless(inner) for key, inner in value.items() if key not in WITHOUT_EFFECT}


OTHER_NAMES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
}
"""The names of these keys in GPT-2 and similar models."""


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """The part of a model's config.json about its language model.

    A number is checked only when it is read: some kinds of models have a list or nothing in its place.
    """

    path: Path
    document: dict[str, Any]

    def get(self, name: str) -> int | None:
        """A number, or None if the file gives none. Raises UserError for anything but a whole number above 0."""
        value = self.document.get(name, self.document.get(OTHER_NAMES.get(name, "")))
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(
                f"{self.path}: {name} is {json.dumps(value)}, not a whole number above 0; download the model again, or "
                "use another one"
            )
        return value

    def need(self, name: str) -> int:
        """A number. Raises UserError if the file gives none."""
        if (value := self.get(name)) is None:
            raise UserError(f"{self.path} has no {name}; download the model again, or use another one")
        return value

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.document.get("tie_word_embeddings", False))


def model_numbers(folder: Path) -> ModelNumbers:
    """Read a model's config.json; for a model that reads more than text, its `text_config`.

    Raises UserError if there is none.
    """
    path = folder / "config.json"
    document = read_json(path)
    nested = document.get("text_config", {})
    if not isinstance(nested, dict):
        raise UserError(f"{path}: text_config holds no JSON object; download the model again")
    return ModelNumbers(path, document | nested)


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
