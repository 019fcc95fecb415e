"""Turns data sets into prompts: renders each question once, and checks length, vocabulary and reference answer."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.config import DataConfig, RunConfig
from common.data.datasets import read_pairs, refuse_bad_golds
from common.data.rendering import PromptRenderer, quoted
from common.errors import UserError
from common.grading import GraderPool
from common.model.files import model_numbers
from common.rollout import Prompt


def prompt_id(text: str, answer: str) -> str:
    """A content hash of a question and its answer."""
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:24]


def token_hash(token_ids: "array[int]") -> str:
    """A hash of a prompt's tokens, by which tables recognise the tokens that they were made with."""
    return hashlib.sha256(token_ids.tobytes()).hexdigest()[:16]


def load_prompts(data: DataConfig, config: RunConfig, renderer: PromptRenderer) -> list[Prompt]:
    """Read a data set as prompts, each once, in file order. Raises the UserErrors of its two steps."""
    return prompts_from_pairs(read_pairs(data, config), data, renderer)


def usable_prompts(prompts: Sequence[Prompt], data: DataConfig, pool: GraderPool) -> list[Prompt]:
    """The prompts whose reference answer the grader can use, checked before anything is generated.

    Raises UserError that names the others, unless data.bad_golds says to drop them, and for a reward function that
    does not return a reward.
    """
    if prompts:
        pool.try_out(prompts[0].text, prompts[0].answer)
    verdicts = pool.validate_golds([prompt.answer for prompt in prompts])
    judged = list(zip(prompts, verdicts, strict=True))
    refuse_bad_golds(
        [f"{quoted(prompt.text)}: {problem}" for prompt, problem in judged if problem is not None],
        len(prompts),
        data,
    )
    return [prompt for prompt, problem in judged if problem is None]


def refuse_none_usable(prompts: Sequence[Prompt], data: DataConfig) -> None:
    """Raise UserError if no prompt is left."""
    if not prompts:
        raise UserError(
            f"no prompt of {data.title} is left: the grader can use none of the reference answers; "
            f"check {data.section}.answer_field and grader.name"
        )


def prompts_from_pairs(
    pairs: Iterable[tuple[str, str]], data: DataConfig, renderer: PromptRenderer
) -> list[Prompt]:
    """Render (question, answer) pairs; a pair that comes twice is one prompt.

    Raises UserError if a prompt is longer than data.max_prompt_tokens, or if none is left.
    """
    found = {prompt_id(text, answer): (text, answer) for text, answer in pairs}
    rendered = renderer.render_all((text for text, _ in found.values()), data.max_prompt_tokens)
    prompts: list[Prompt] = []
    too_long = 0
    for (identifier, (text, answer)), token_ids in zip(found.items(), rendered, strict=True):
        if token_ids is None or len(token_ids) > data.max_prompt_tokens:
            too_long += 1
            if data.long_prompts == "drop":
                continue
            length = "far more" if token_ids is None else len(token_ids)
            raise UserError(
                f"a prompt has {length} tokens, more than {data.section}.max_prompt_tokens = "
                f"{data.max_prompt_tokens}: {quoted(text)}; raise the limit or set "
                f'{data.section}.long_prompts = "drop"'
            )
        prompts.append(
            Prompt(
                id=identifier,
                text=text,
                answer=answer,
                token_ids=token_ids,
                token_hash=token_hash(token_ids),
            )
        )
    if too_long and not prompts:
        raise UserError(
            f"no prompt of {data.title} is left: all are longer than {data.section}.max_prompt_tokens = "
            f"{data.max_prompt_tokens}; raise the limit"
        )
    refuse_none_usable(prompts, data)
    return prompts


def longest_allowed_prompt(config: RunConfig) -> int:
    """The most tokens of a prompt, in training or held out: the engine makes room for them."""
    sections = [config.data, *([config.evaluate.data] if config.evaluate.data else [])]
    sections += [each.data for each in config.during_training.values()]
    return max(section.max_prompt_tokens for section in sections)


def longest_allowed_completion(config: RunConfig) -> int:
    """The most tokens of a completion, in training or of a benchmark that training evaluates."""
    samplings = [config.sampling, *map(config.sampling_of, config.during_training.values())]
    return max(sampling.max_completion_tokens for sampling in samplings)


def check_fit(
    prompts: Sequence[Prompt], config: RunConfig, folder: Path, data: DataConfig | None = None
) -> None:
    """Raise UserError if a prompt, of [data] or `data`, has unknown token ids or leaves no room for a completion."""
    section = (data or config.data).section
    numbers = model_numbers(folder)
    rows = numbers.get("vocab_size")
    for prompt in prompts:
        if rows is not None and max(prompt.token_ids) >= rows:
            raise UserError(
                f'{folder}: its tokenizer gives token id {max(prompt.token_ids)} for "{prompt.text[:60]}…", but the '
                f"model has {rows} of them; the tokenizer belongs to another model, or tokens have been added to it "
                "without resizing the embedding"
            )
    completion = config.sampling.max_completion_tokens
    longest = max(len(prompt.token_ids) for prompt in prompts)
    length = numbers.get("max_position_embeddings")
    if length is not None and longest + completion > length:
        raise UserError(
            f"the longest prompt of [{section}] ({longest} tokens) and sampling.max_completion_tokens ({completion}) "
            f"need {longest + completion} tokens, more than the model's context of {length}; lower "
            f'max_completion_tokens, or {section}.max_prompt_tokens with {section}.long_prompts = "drop"'
        )
