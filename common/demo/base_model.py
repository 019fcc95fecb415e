"""A small Qwen3 pre-trained in about a minute on the demonstrations of word_problems.py.

Like a real base model it can reason but does not do so reliably: nearly half of its samples guess at once, and the
others make mistakes now and then, so RL has something to improve. It is trained on completion tokens only, after the
prompt `PROMPT_TEMPLATE`, without a BOS token. torch and transformers are imported inside functions.

It is not a Qwen2, because transformers 5 gives every model of that type its own tokenizer class, which splits numbers
into digits, even if the folder names another class. A Qwen3 may name its class.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from common.demo.word_problems import MAX_CHANGES, PROMPT_TEMPLATE, demonstration, stream, vocabulary_text
from common.files import writing_to
from common.remote.copies import published_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

# A word takes the space before it, and the one after it too when a number follows: ` buys `, `3`, ` more`, `.`
WORD_PATTERN = r"(?: ?\p{L}+| ?[^\s\p{L}\p{N}]+)(?: (?=\p{N}))?|\p{N}{1,3}|\s+"

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining:
    """The recipe of the base model; with the defaults it takes a minute on two cores.

    Training starts with clean worked solutions, of one or two changes and then more; the remaining steps use the
    demonstrations that guess and make mistakes. `rope_theta` suits texts of a hundred tokens: at 10,000 the model
    learns later to find the next number.
    """

    steps: int = 800
    textbook_steps: int = 450
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    mlp_size: int = 256
    rope_theta: float = 100.0


def build_base_model(
    path: Path,
    *,
    seed: int,
    recipe: Pretraining | None = None,
    progress: Callable[[str], None] = print,
) -> None:
    """Write a Hugging Face folder at `path`, which appears only when whole; same seed, same weights.

    Raises UserError if it cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: remove it to build the base model again")
    from transformers.utils import logging

    recipe = recipe or Pretraining()
    tokenizer = build_tokenizer()
    model = _pretrain(tokenizer, recipe, seed, progress)
    logging.disable_progress_bar()
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.chmod(0o755)
            with published_folder(unfinished, path):
                os.rename(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    progress(f"base model written to {path}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE in which each word of the task and each number is one token.

    Special tokens exist by id only: `<|endoftext|>` in a prompt is ordinary text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, PADDING],
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabulary_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _pretrain(
    tokenizer: PreTrainedTokenizerFast, recipe: Pretraining, seed: int, progress: Callable[[str], None]
) -> Qwen3ForCausalLM:
    """Next-token prediction on fresh problems of the training split, each seen once."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(tokenizer, recipe)
    model.train()
    progress(f"base model: {sum(p.numel() for p in model.parameters()):,} parameters, {recipe.steps} steps")
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_share(step, recipe))
    for step, (tokens_BT, targets_BT) in enumerate(_batches(tokenizer, recipe, seed), start=1):
        loss = _loss(model, tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == recipe.steps:
            progress(f"base model: step {step}/{recipe.steps}, loss {loss.item():.3f} nats per token")
    return model


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Pretraining) -> Qwen3ForCausalLM:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def _learning_rate_share(step: int, recipe: Pretraining) -> float:
    """Linear warm-up, a plateau, and from the middle on a line down to zero."""
    return min(1.0, (step + 1) / recipe.warmup_steps, 2 * (recipe.steps - step) / recipe.steps)


def _loss(model: Qwen3ForCausalLM, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over completion tokens; padding is on the right, so causal attention needs no mask."""
    import torch

    hidden_BTD = model.model(tokens_BT, use_cache=False).last_hidden_state
    learnt_BT = targets_BT != IGNORED
    logits = model.lm_head(hidden_BTD[learnt_BT])
    return torch.nn.functional.cross_entropy(logits, targets_BT[learnt_BT])


def _batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Pretraining, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`recipe.steps` pairs of tokens and next-token targets, in pools sorted by prompt length to pad little."""
    import torch

    rng = random.Random(f"demonstrations {seed}")
    pool_steps = 25
    for first in range(0, recipe.steps, pool_steps):
        steps = min(pool_steps, recipe.steps - first)
        lesson = min(MAX_CHANGES, 2 + first * MAX_CHANGES // max(1, recipe.textbook_steps))
        pool = list(islice(stream("train", rng, lesson), steps * recipe.batch_size))
        prompts = [PROMPT_TEMPLATE.format(question=problem.question) for problem in pool]
        if first < recipe.textbook_steps:
            completions = [problem.worked_solution for problem in pool]
        else:
            completions = [demonstration(problem, rng) for problem in pool]
        encoded = zip(_encode(tokenizer, prompts), _encode(tokenizer, completions), strict=True)
        sequences = [(prompt, [*completion, tokenizer.eos_token_id]) for prompt, completion in encoded]
        # By prompt alone: by completion length, a batch would be all guesses or none.
        sequences.sort(key=lambda pair: len(pair[0]))
        starts = [step * recipe.batch_size for step in range(steps)]
        rng.shuffle(starts)
        for start in starts:
            batch = sequences[start : start + recipe.batch_size]
            longest = max(len(prompt) + len(completion) for prompt, completion in batch)
            tokens_BT = torch.full((len(batch), longest), tokenizer.pad_token_id)
            targets_BT = torch.full((len(batch), longest), IGNORED)
            for row, (prompt, completion) in enumerate(batch):
                tokens_BT[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
                end = len(prompt) + len(completion) - 1
                targets_BT[row, len(prompt) - 1 : end] = torch.tensor(completion)
            yield tokens_BT, targets_BT


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]
