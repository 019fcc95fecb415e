"""transformers' models: the only place that builds them, for the trainer, the rollout engine and the checks.

The classes are transformers' own, found by config.json's model_type. Code in the folder is not used, nor are classes
that another library has registered for that type, as vLLM does in the same process.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.utils import GENERATION_CONFIG_NAME, logging

from common.errors import UserError, cause
from common.model.checkpoint_names import note_conversions
from common.model.files import read_json
from common.model.weights import AGAIN, read_weights

RANDOM = re.compile("drop|jitter")
"""Settings of a config that add randomness during training."""


def load_causal_lm(folder: Path, dtype: str) -> PreTrainedModel:
    """The language model in `folder` with its weights in this dtype, on the host. Raises UserError for a bad folder."""
    return load_pretrained(model_class(read_config(folder), folder), folder, dtype)


def empty_causal_lm(folder: Path) -> PreTrainedModel:
    """The language model in `folder` without weights, on the meta device.

    Raises UserError for a bad folder, including weights whose headers show that they are not this model's.
    """
    config = read_config(folder)
    kind = model_class(config, folder)
    with refusing(folder), _quiet(), torch.device("meta"):
        model = kind(_own_config(kind, config))
    try:
        missing = note_conversions(model, read_weights(folder).shapes)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if missing:
        raise UserError(f"{folder}: the weights do not fit config.json: missing {_some(missing)}; {AGAIN}")
    return model


def load_pretrained(kind: type[PreTrainedModel], folder: Path, dtype: str, **options: Any) -> PreTrainedModel:
    """A model of this class with the weights in `folder`. Raises UserError unless the files hold all of its weights.

    Options of the class's config, such as `num_labels`, may add weights outside the body, which may be new.
    """
    config = _own_config(kind, read_config(folder, **options))
    read_weights(folder)  # names the file if one is damaged
    with refusing(folder), _quiet():
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            local_files_only=True,
        )
    model: PreTrainedModel
    loading: dict[str, Any]
    model, loading = loaded
    body = f"{model.base_model_prefix}."
    missing = sorted(name for name in loading["missing_keys"] if not options or name.startswith(body))
    wrong = [
        f"{name} of shape {list(found)} for {list(needed)}"
        for name, found, needed in loading["mismatched_keys"]
    ]
    if missing or wrong:
        raise UserError(
            f"{folder}: the weights do not fit config.json: "
            f"{f'missing {_some(missing)}' if missing else _some(wrong)}; {AGAIN}"
        )
    with torch.no_grad():
        for parameter in model.parameters():
            # DeepSpeed keeps a policy's in its dtype, also those that transformers keeps in float32.
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def read_config(folder: Path, **options: Any) -> Any:
    """A model's config.json as read by transformers. Raises UserError if transformers has no such model."""
    kind: Any = read_json(folder / "config.json").get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{folder}: transformers {transformers.__version__} has no models of type {kind!r}, and code that comes "
            "with a model is not run; use a model that transformers and vLLM have themselves"
        )
    with refusing(folder), _quiet():
        return getattr(transformers, CONFIG_MAPPING_NAMES[kind]).from_pretrained(folder, **options)


def model_class(config: Any, folder: Path) -> type[PreTrainedModel]:
    """The class of a config's language model. Raises UserError if there is none."""
    mapping: Any
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            kind: type[PreTrainedModel] = mapping[type(config)]
            return kind
    raise UserError(
        f"{folder}: models of type {config.model_type} do not continue texts; use a causal language model"
    )


def token_classifier(folder: Path) -> type[PreTrainedModel]:
    """The token classification class for the network in `folder`. Raises UserError if there is none."""
    config = read_config(folder)
    mapping: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise UserError(
            f"{folder}: for models of type {config.model_type} transformers has no token classifier, which a critic "
            "is; use another model, or an objective without a critic, such as grpo"
        )
    kind: type[PreTrainedModel] = mapping[type(config)]
    return kind


def refuse_generation_config(folder: Path) -> None:
    """Raise UserError for a generation_config.json that transformers cannot read, which would fail the model's load."""
    file = folder / GENERATION_CONFIG_NAME
    if not file.is_file():
        return
    try:
        with _quiet():
            GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(
            f"{file}: transformers cannot read it ({cause(error)}); correct it, or download the model again"
        ) from error


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """A context that turns errors of transformers into one line; for a bad folder it raises all kinds."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: transformers cannot load the model ({cause(error)}); download it again, or use another model"
        ) from error


def _own_config(kind: type[PreTrainedModel], config: Any) -> Any:
    """The part of a config that a class is built from: nested for the text part of a model that reads more than text.

    Randomness in training is switched off: completions are drawn from the model without dropout, and their log-probs
    are those of the same model. Attention is computed as the config says.
    """
    text = config.get_text_config()
    for part in (config, text):
        for name, value in vars(part).items():
            if RANDOM.search(name) and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(part, name, 0.0)
        if getattr(part, "attn_logit_softcapping", None):
            # torch's fused attention has no soft cap, and transformers silently leaves it out.
            part._attn_implementation = "eager"
    return text if kind.config_class is type(text) else config


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without progress bars, and without warnings about conditions that are errors here."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
