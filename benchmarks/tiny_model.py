"""A model small enough to load in seconds that needs no training: its samples look like answers."""

import json
from pathlib import Path
from typing import Any

from common.demo.base_model import build_tokenizer


def save_tiny_model(
    folder: Path, *, seed: int, context: int = 512, tied: bool = False, tokenizer: Any = None
) -> None:
    """Write a Qwen2 folder; another seed gives other weights.

    Its samples are such as `7 #### 3`, `#### 2`, now and then junk: the next token depends on the class of the last one
    (anything, `####`, a number) and, weakly and at random, on all before it. After `####` comes 1, 2, 3 or 4, so a
    prompt whose answer is one of these is solved now and then. If it is tied, its samples are noise.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer or build_tokenizer()
    width = 64
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)

        def ids(*texts: str) -> list[int]:
            encoded = [tokenizer.encode(text) for text in texts]
            return [tokens[0] for tokens in encoded]

        numbers = ids(*(str(number) for number in range(100)))
        marker = ids(" #### 1")[0]
        end = tokenizer.eos_token_id
        classes = torch.zeros(len(tokenizer), dtype=torch.long)
        classes[marker], classes[numbers] = 1, 2
        share = torch.full((len(tokenizer), 3), 6e-6)
        share[marker, 0], share[numbers[5:10], 0] = 0.7, 0.06
        share[numbers[1:5], 1] = 0.25
        share[end, 2], share[marker, 2], share[numbers[7], 2] = 0.6, 0.3, 0.1
        if not tied:
            model.model.embed_tokens.weight[torch.arange(len(tokenizer)), classes] += 1.0
            # The final norm turns a one-hot row into one of length sqrt(width).
            model.lm_head.weight[:, :3] += share.log() / width**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_questions(path: Path, count: int, *, first: int = 0) -> None:
    """A .jsonl of questions whose answers, 1 to 4, the model gives now and then."""
    rows = (
        {
            "prompt": f"Tom has {number} apples." + " Tom buys more." * (number % 3),
            "answer": f"{number % 4 + 1}",
        }
        for number in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
