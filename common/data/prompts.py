"""Questions to prompts: templates, tokens, what fits the model, what the grader can use."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from itertools import filterfalse, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import DataConfig, RunConfig
from common.data.datasets import read_pairs, refuse_bad_golds, template_name
from common.data.messages import turns_of
from common.errors import UserError, cause
from common.grading import GraderPool
from common.model.files import TOKENIZER_FILES, model_numbers
from common.model.reading import eos_token_ids
from common.model.weights import AGAIN, refuse_pointer
from common.rollout import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {
    "plain": "{prompt}",
    "line": "{prompt}\n",
    "gsm8k": '{prompt} Let\'s think step by step and output the final answer after "####".',
    "math": "{prompt} Let's think step by step and output the final answer within \\boxed{}.",
    "openr1": "<｜begin▁of▁sentence｜><｜User｜>{prompt}<｜Assistant｜><think>\n",
    "mbpp": "{prompt}\nWrite the code in a ```python block.",
}
"""Named templates; gsm8k, math and openr1 are the paper's (Table 4). "chat" is the tokenizer's own."""

PROBES = ("What is 1 + 2?", "How many apples has Tom?")
"""Questions that no template may render alike."""

SHOWN_CHARACTERS = 60

BATCH = 512
"""Prompts that are tokenised at a time."""

SHORTEST_BEGINNING = 4096
CHARACTERS_PER_TOKEN = 16
"""Of the limit: a text that is longer is tokenised by its beginning first. Few texts have so many to a token."""

MISTRALS_OWN = "tekken.json"

DATE = datetime(2024, 7, 26)
"""Today, for chat templates that write the date into a prompt; Llama 3's own where none is given."""

CONTROL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""The special tokens that say something to programs. Others, such as `<answer>`, are text."""


class PromptRenderer:
    """Turns a question into what the model reads, and what the model wrote into text."""

    def __init__(self, folder: Path, data: DataConfig) -> None:
        """Load the tokenizer. Raises UserError if it cannot end a completion, or its chat template is unusable."""
        self._folder, self._section = folder, data.section
        self.tokenizer = load_tokenizer(folder)
        self.template = prompt_template(data)
        self.eos_token_ids = eos_token_ids(folder, self.tokenizer.eos_token_id)
        if self.template == "chat":
            self._refuse_unusable_chat_template()
        self._bos = array("i", _leading_bos(self.tokenizer))
        self._is_plain = _is_plain(self.tokenizer)
        self._unseen = _control_token_ids(self.tokenizer, self.eos_token_ids)

    def render(self, text: str) -> tuple[int, ...]:
        """The token ids of a question in its template, with the tokenizer's BOS if it uses one. Raises UserError."""
        (ids,) = self.render_all([text])
        assert ids is not None, "there is no limit"
        return tuple(ids)

    def render_all(self, texts: Iterable[str], limit: int | None = None) -> Iterator["array[int] | None"]:
        """The same of many questions, in order; None for one that has far more tokens than the limit.

        A text of megabytes is given up after its beginning has been tokenised.
        """
        for some in batched(texts, BATCH):
            rendered = [self.in_template(text) for text in some]
            too_long = [limit is not None and self._is_far_longer(text, limit) for text in rendered]
            found = iter(
                self._token_ids([text for text, long in zip(rendered, too_long, strict=True) if not long])
            )
            for text, long in zip(rendered, too_long, strict=True):
                yield None if long else self._with_bos(next(found), text)

    def in_template(self, text: str) -> str:
        """What the model reads of a question, as a text. Raises UserError for a chat template that cannot take it."""
        return self._chat(text) if self.template == "chat" else self.template.replace("{prompt}", text)

    def _is_far_longer(self, rendered: str, limit: int) -> bool:
        """Whether a beginning of it has more than twice as many tokens, not counting those of a token that was cut."""
        size = max(SHORTEST_BEGINNING, CHARACTERS_PER_TOKEN * limit)
        while size < len(rendered):
            if len(self._token_ids([rendered[:size]])[0]) > 2 * limit + self._longest_token:
                return True
            size *= 4
        return False

    @cached_property
    def _longest_token(self) -> int:
        """In characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _token_ids(self, texts: list[str]) -> list["array[int]"]:
        """As `tokenizer(texts, add_special_tokens=False)`, without what it would wrap around them."""
        if not texts:
            return []
        if not self._is_plain:
            found = self.tokenizer(texts, add_special_tokens=False).input_ids
            return [array("i", ids) for ids in found]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [array("i", each.ids) for each in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _with_bos(self, ids: "array[int]", rendered: str) -> "array[int]":
        if not ids:
            raise UserError(
                f"{self._folder}: the tokenizer makes no token of {_quoted(rendered)}; correct "
                f"{self._section}.template or the question"
            )
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, in which tokens that only control programs, such as EOS, are left out."""
        shown = list(filterfalse(self._unseen.__contains__, token_ids))
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def _chat(self, text: str) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns_of(text),
                    add_generation_prompt=True,
                    tokenize=False,
                    strftime_now=DATE.strftime,  # a prompt is the same on every day
                )
            )
        except Exception as error:  # the template is a program that came with the model
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self._chat_error(f"cannot render a question ({reason})") from error

    def _refuse_unusable_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f'{self._folder} has no chat template; set {self._section}.template to a text containing "{{prompt}}"'
            )
        rendered = {self._chat(question) for question in PROBES}
        if len(rendered) < len(PROBES):
            raise self._chat_error(f"renders every question to the same text, {_quoted(rendered.pop())}")

    def _chat_error(self, what: str) -> UserError:
        files = (self._folder / name for name in ("chat_template.jinja", "chat_template.json"))
        file = next((file for file in files if file.is_file()), self._folder / "tokenizer_config.json")
        return UserError(
            f"{file}: the chat template {what}; correct it, or set {self._section}.template to a text containing "
            '"{prompt}"'
        )

    @property
    def pad_token_id(self) -> int:
        """Fills the rows of a batch up; any id that the model can read does, and the lowest EOS is one."""
        return self.eos_token_ids[0]

    def identity(self) -> dict[str, Any]:
        """What must be equal for two renderings to be the same."""
        template = self.tokenizer.chat_template if self.template == "chat" else self.template
        return {"template": template, "eos_token_ids": list(self.eos_token_ids)}


def batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """These texts in lists of so many."""
    rest = iter(texts)
    while some := list(islice(rest, size)):
        yield some


def _quoted(text: str) -> str:
    """The beginning of a text, in one line."""
    return json.dumps(
        text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…", ensure_ascii=False
    )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local model folder. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {}
    files = [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()]
    for file in files:
        refuse_pointer(file)
    if not files and not (folder / MISTRALS_OWN).is_file():
        raise UserError(f"{folder} has no tokenizer, such as a tokenizer.json; {AGAIN}")
    if (folder / MISTRALS_OWN).is_file():
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise UserError(
                f"{folder} has a tokenizer in Mistral's own format alone, {MISTRALS_OWN}; use the model with a "
                "tokenizer.json, in Hugging Face format"
            )
        options["mistral_format"] = False  # which transformers prefers where mistral-common is installed
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # of a damaged file the libraries raise anything
        raise UserError(f"{folder} has no usable tokenizer ({cause(error)}); {AGAIN}") from error


def _control_token_ids(tokenizer: "PreTrainedTokenizerBase", eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Those of EOS, BOS, padding and the like; an EOS id may also be that of a word, which is text."""
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    control = {getattr(tokenizer, f"{name}_token_id") for name in CONTROL_TOKENS}
    return frozenset(control.union(eos_token_ids) & special)


def prompt_template(data: DataConfig) -> str:
    """The text that a question is put into, in place of {prompt}; or "chat". Raises UserError for an unknown name.

    Where the format is to be recognised and the config has no template, it reads the data set's first rows.
    """
    name = template_name(data)
    if name == "chat":
        return name
    template = TEMPLATES.get(name, name)
    if "{prompt}" not in template:
        known = ", ".join([*TEMPLATES, "chat"])
        raise UserError(
            f'{data.section}.template is "{name}": use one of {known}, or a text containing {{prompt}}'
        )
    return template


def _leading_bos(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    ids = tuple(tokenizer("").input_ids)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else ()


def _is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether its Rust tokenizer does all of its work, as it does for any that has no calls of its own."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )


def prompt_id(text: str, answer: str) -> str:
    """A content hash of a question and its answer."""
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:24]


def load_prompts(data: DataConfig, config: RunConfig, renderer: PromptRenderer) -> list[Prompt]:
    """Read a data set as prompts, each once, in file order. Raises the UserErrors of its two steps."""
    return prompts_from_pairs(read_pairs(data, config), data, renderer)


def usable_prompts(prompts: Sequence[Prompt], data: DataConfig, pool: GraderPool) -> list[Prompt]:
    """The prompts whose reference answer the grader can use, found before anything is generated for them.

    Raises UserError, naming the others, unless data.bad_golds says to drop them; also for a grader of the user's own
    that returns no reward.
    """
    if prompts:
        pool.try_out(prompts[0].text, prompts[0].answer)
    verdicts = pool.validate_golds([prompt.answer for prompt in prompts])
    judged = list(zip(prompts, verdicts, strict=True))
    refuse_bad_golds(
        [f"{_quoted(prompt.text)}: {problem}" for prompt, problem in judged if problem is not None],
        len(prompts),
        data,
    )
    return [prompt for prompt, problem in judged if problem is None]


def refuse_none_usable(prompts: Sequence[Prompt], data: DataConfig) -> None:
    """Raise UserError where no prompt is left."""
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
                f"{data.max_prompt_tokens}: {_quoted(text)}; raise the limit or set "
                f'{data.section}.long_prompts = "drop"'
            )
        prompts.append(
            Prompt(
                id=identifier,
                text=text,
                answer=answer,
                token_ids=token_ids,
                token_hash=hashlib.sha256(token_ids.tobytes()).hexdigest()[:16],
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
    """The most tokens that a prompt may have, in training or held out: the engine makes room for them."""
    sections = [config.data] if config.evaluate.data is None else [config.data, config.evaluate.data]
    return max(section.max_prompt_tokens for section in sections)


def check_fit(
    prompts: Sequence[Prompt], config: RunConfig, folder: Path, data: DataConfig | None = None
) -> None:
    """Raise UserError unless the model can read each prompt, of [data] or `data`, and has room for its completion."""
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
