"""Check that a model can be sampled from, or also trained, before a model loads or a token is drawn."""

from pathlib import Path

from common.config import RunConfig
from common.errors import UserError
from common.model.reading import ModelReading, read_model
from common.packages import is_installed

VLLM_REFUSES = {
    "gpt_oss": "vLLM's own class does not take over new weights for experts while it runs",
    "cohere2": "vLLM's sliding window is one token longer than transformers'",
}
"""Types of models for which vLLM 0.32 samples from another distribution than the trained one, and why."""


def read_trainable(folder: Path, config: RunConfig) -> ModelReading:
    """The description of the model in `folder`. Raises UserError unless both stages can use it."""
    model = read_model(folder)
    refuse_untrainable(folder, config)
    return model


def read_sampled(folder: Path, config: RunConfig) -> ModelReading:
    """The description of a model that is sampled from alone, which vLLM can do if it is quantised.

    Raises UserError for other models that cannot be trained.
    """
    from common.model.pretrained import refuse_generation_config

    model = read_model(folder, may_be_quantised=True)
    if model.quantisation is None:
        refuse_untrainable(folder, config)
    elif config.engine.backend != "vllm":
        raise UserError(
            f"{folder} is quantised ({model.quantisation}), which only vLLM samples from here; set engine.backend = "
            '"vllm", or use the model in bfloat16 or float32'
        )
    else:
        refuse_generation_config(folder)
    return model


def refuse_untrainable(folder: Path, config: RunConfig) -> None:
    """Raise UserError unless the configured engine and the trainer both can use the model in `folder`.

    The model is built without weights; only the headers of the weights' files are read.
    """
    import torch

    from common.model.checkpoint_names import CheckpointNames, refuse_other_names
    from common.model.output_layer import logit_transform
    from common.model.pretrained import empty_causal_lm, refuse_generation_config

    model = empty_causal_lm(folder)
    refuse_generation_config(folder)
    logit_transform(model)
    refuse_other_names(CheckpointNames(model), folder)
    if config.engine.backend != "vllm":
        return
    kind = model.config.model_type
    reason = VLLM_REFUSES.get(kind)
    text = model.config.get_text_config()
    reads_images, is_gated_delta = text is not model.config, hasattr(text, "linear_num_value_heads")
    if reads_images and not is_installed("torchvision"):
        reason = "it reads images too, for which vLLM needs torchvision, which is not installed"
    if is_gated_delta and config.model.dtype == "float32" and not torch.cuda.is_available():
        reason = "vLLM computes gated delta rules on a CPU in bfloat16 only"
    if reason:
        raise UserError(f'{folder}: models of type {kind}: {reason}; set engine.backend = "transformers"')
