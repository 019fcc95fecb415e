"""Read a model's folder before anything expensive: describe it, find its end tokens, refuse unusable models.

Reads config.json, generation_config.json and the headers of the weights; loads no torch and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.model.files import QUANTISATION_FILE, ModelNumbers, model_numbers, read_json
from common.model.weights import Weights, read_weights

GENERATION_CONFIG = "generation_config.json"
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings")
"""Names of the layer that turns token ids into vectors."""
LOGIT_TRANSFORMS = (
    *("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier"),
    *("logits_mup_width_multiplier", "mup_width_scale", "output_multiplier"),
)
"""Settings by which models change the logits after the output layer; used only for the description."""
QUANTISED_FORMATS = ("F4", "F6", "F8", "I4", "U4", "I8", "U8")
"""Prefixes of safetensors' names of the formats of quantised weights."""
QUANTISATION = ("quantization_config", "compression_config")
"""Keys of config.json that say that weights are quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReading:
    """The description of a model, from its folder."""

    folder: Path
    numbers: ModelNumbers
    weights: Weights
    embedding_rows: int | None
    """Upper bound of the token ids that it can read."""
    quantisation: str | None
    """What its files say of quantised weights; None if they say nothing."""

    @property
    def kind(self) -> str:
        """The model class that its config names, else the type."""
        classes = self.numbers.document.get("architectures")
        return str(
            classes[0] if isinstance(classes, list) and classes else self.numbers.document["model_type"]
        )

    @property
    def parameters(self) -> int:
        return self.weights.count(tied=self.numbers.is_tied)

    def document(self) -> dict[str, Any]:
        """The description that an artifact keeps for the reader."""
        named = {name: self.numbers.document.get(name) for name in LOGIT_TRANSFORMS}
        return {
            "class": self.kind,
            "parameters": self.parameters,
            "stored_as": sorted(set(self.weights.formats.values())),
            "layers": self.numbers.get("num_hidden_layers"),
            "hidden_size": self.numbers.get("hidden_size"),
            "vocabulary": self.embedding_rows,
            "context": self.numbers.get("max_position_embeddings"),
            "logit_transforms": {name: value for name, value in named.items() if value not in (None, 1, 1.0)},
            "unread_files": [file.name for file in self.weights.unread],
        }


def read_model(folder: Path, *, may_be_quantised: bool = False) -> ModelReading:
    """Read the folder. Raises UserError for a model that cannot be trained: damaged, quantised, or no decoder."""
    numbers = model_numbers(folder)
    _refuse_other_kinds(folder, numbers.document)
    weights = read_weights(folder)
    quantisation = quantisation_of(folder)
    if quantisation is not None and not may_be_quantised:
        raise _quantised(folder, quantisation)
    if quantisation is None and (formats := _quantised_formats(weights)):
        raise _quantised(folder, f"weights stored as {', '.join(formats)}")
    return ModelReading(
        folder=folder,
        numbers=numbers,
        weights=weights,
        embedding_rows=_embedding_rows(folder, numbers, weights),
        quantisation=quantisation,
    )


def quantisation_of(folder: Path) -> str | None:
    """What a model's config, or that of its text part, says of quantised weights, or ModelOpt's file beside it."""
    for document in (read_json(folder / "config.json"), model_numbers(folder).document):
        for key in QUANTISATION:
            if quantisation := document.get(key):
                method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else "?"
                return f"{key} {method}"
    return QUANTISATION_FILE if (folder / QUANTISATION_FILE).is_file() else None


def _quantised_formats(weights: Weights) -> list[str]:
    return sorted(
        {
            form
            for name, form in weights.formats.items()
            if form.startswith(QUANTISED_FORMATS) and name.endswith("weight")
        }
    )


def _quantised(folder: Path, found: str) -> UserError:
    return UserError(
        f"{folder} is quantised ({found}): it cannot be trained, and V̂* of another model than the trained one is "
        "worth nothing; use the model in bfloat16 or float32, without quantization_config"
    )


def describe_model(document: dict[str, Any], ends: Sequence[str]) -> str:
    """A reading's `document` in one line; `ends` are the tokens that end a completion."""
    sizes = [
        f"{document['parameters']:,} parameters ({', '.join(document['stored_as'])})",
        *([f"{document['layers']} layers of width {document['hidden_size']}"] if document["layers"] else []),
        *([f"{document['vocabulary']:,} token ids"] if document["vocabulary"] else []),
        *([f"a context of {document['context']:,}"] if document["context"] else []),
        *(f"{name} {value}" for name, value in document["logit_transforms"].items()),
    ]
    return f"{document['class']}: {', '.join(sizes)}; a completion ends at token {' or '.join(ends)}"


def _refuse_other_kinds(folder: Path, document: dict[str, Any]) -> None:
    if not isinstance(document.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'} has no model_type; download the model again")
    if document.get("is_encoder_decoder"):
        raise UserError(
            f"{folder} is an encoder-decoder ({document['model_type']}), which cannot be trained here; use a "
            "causal language model"
        )


def _embedding_rows(folder: Path, numbers: ModelNumbers, weights: Weights) -> int | None:
    said = numbers.get("vocab_size")
    rows = {
        shape[0]
        for name, shape in weights.shapes.items()
        if name.endswith(tuple(f"{layer}.weight" for layer in EMBEDDINGS)) and len(shape) == 2
    }
    if said is not None and rows and said not in rows:
        raise UserError(
            f"{folder / 'config.json'} says vocab_size {said}, but the weights' embedding has {max(rows)} rows; they "
            "belong to different models: download the model again"
        )
    return said if said is not None else max(rows, default=None)


def eos_token_ids(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """The ids that end a completion, in ascending order: those at which vLLM and transformers stop.

    These are the tokenizer's own and those of generation_config.json; if that names none, or is missing, those of
    config.json. Raises UserError if there are none, or for an id that is not a token id of the model.
    """
    numbers = model_numbers(folder)
    path, found = folder / GENERATION_CONFIG, None
    if path.is_file():
        found = read_json(path).get("eos_token_id")
    if found is None:
        path = numbers.path
        own, of_text = read_json(path), numbers.document
        found = next(
            (each["eos_token_id"] for each in (own, of_text) if each.get("eos_token_id") is not None), None
        )
    ids = found if isinstance(found, list) else [] if found is None else [found]
    ids = [*ids, *([] if tokenizer_eos is None else [tokenizer_eos])]
    if wrong := [each for each in ids if type(each) is not int or each < 0]:
        raise UserError(
            f"{path}: eos_token_id is {wrong[0]!r}, which is not a token id; download the model again"
        )
    if not ids:
        raise UserError(
            f"{folder}: neither the tokenizer nor {GENERATION_CONFIG} nor config.json names an EOS token, so no "
            "completion could end; set eos_token in its tokenizer_config.json"
        )
    rows = numbers.get("vocab_size")
    if rows is not None and min(ids) >= rows:
        raise UserError(
            f"{folder}: the EOS token has id {min(ids)}, but the model has {rows} token ids, so no completion could "
            "end; the tokenizer belongs to another model, or eos_token has been added to it: correct "
            "tokenizer_config.json"
        )
    return tuple(sorted(set(ids)))
