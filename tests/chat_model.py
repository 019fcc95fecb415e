"""A chat model as small as `tiny_model`: its template knows a system's turn, and thinking that can be switched off."""

from pathlib import Path

from benchmarks.tiny_model import save_tiny_model
from common.demo.base_model import build_tokenizer

TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
NO_THOUGHTS = "<think>\n\n</think>\n\n"


def save_chat_model(folder: Path) -> None:
    """Write it; a completion ends with the token that ends a turn."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = TEMPLATE
    save_tiny_model(folder, seed=0, tokenizer=tokenizer)
