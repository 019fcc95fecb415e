"""Renders questions in a template as token ids, and decodes completions."""

import inspect
import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import filterfalse, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.config import DataConfig
from common.data.datasets import template_name
from common.data.framing import chat_turns, framing_identity, text_prompt
from common.data.messages import Turns
from common.errors import UserError, cause
from common.model.files import TOKENIZER_FILES
from common.model.reading import eos_token_ids
from common.model.weights import AGAIN, refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

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
"""Questions that a template must render differently."""

SHOWN_CHARACTERS = 60

BATCH = 512
"""The number of prompts that are tokenised at a time."""

SHORTEST_BEGINNING = 4096
CHARACTERS_PER_TOKEN = 16
"""A text with more characters than this per token of the limit is first tokenised in part; few texts have as many."""

MISTRALS_OWN = "tekken.json"

DATE = datetime(2024, 7, 26)
"""The date that chat templates write into prompts: the default in Llama 3's template."""

END_OF_THINKING = "</think>"

CONTROL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""The special tokens that only control programs. Others, such as `<answer>`, are text."""


class PromptRenderer:
    """Turns a question into the token ids that the model reads, and a completion's token ids into text."""

    def __init__(self, folder: Path, data: DataConfig) -> None:
        """Load the tokenizer.

        Raises UserError if it cannot end a completion, or if the chat template is unusable or ignores a setting.
        """
        self._folder, self._data, self._section = folder, data, data.section
        self.tokenizer = load_tokenizer(folder)
        self.template = prompt_template(data)
        self.eos_token_ids = eos_token_ids(folder, self.tokenizer.eos_token_id)
        if self.template == "chat":
            self._refuse_unusable_chat_template()
        self._bos = array("i", _leading_bos(self.tokenizer))
        self._is_plain = _is_plain(self.tokenizer)
        self._unseen = _control_token_ids(self.tokenizer, self.eos_token_ids)

    def render(self, text: str) -> tuple[int, ...]:
        """The token ids of a question in the template, with the tokenizer's BOS if it uses one. Raises UserError."""
        (ids,) = self.render_all([text])
        assert ids is not None, "there is no limit"
        return tuple(ids)

    def render_all(self, texts: Iterable[str], limit: int | None = None) -> Iterator["array[int] | None"]:
        """The token ids of many questions, in order; None for one that has far more tokens than the limit.

        Of a text of megabytes only the beginning is tokenised.
        """
        for some in batched(texts, BATCH):
            rendered = [self.in_template(text) for text in some]
            too_long = [limit is not None and self._is_far_longer(text, limit) for text in rendered]
            found = iter(
                self.token_ids([text for text, long in zip(rendered, too_long, strict=True) if not long])
            )
            for text, long in zip(rendered, too_long, strict=True):
                yield None if long else self._with_bos(next(found), text)

    def in_template(self, text: str) -> str:
        """The full prompt for a question, as a text. Raises UserError if the chat template cannot render it."""
        if self.template != "chat":
            return text_prompt(self.template, text, self._data)
        turns = chat_turns(text, self._data)
        return self._chat(turns, self._data.chat_template_kwargs) + (self._data.prefill or "")

    def _is_far_longer(self, rendered: str, limit: int) -> bool:
        """Whether its beginning alone has more than twice the limit, not counting those of a token that was cut."""
        size = max(SHORTEST_BEGINNING, CHARACTERS_PER_TOKEN * limit)
        while size < len(rendered):
            if len(self.token_ids([rendered[:size]])[0]) > 2 * limit + self._longest_token:
                return True
            size *= 4
        return False

    @cached_property
    def _longest_token(self) -> int:
        """The length of the longest token, in characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def token_ids(self, texts: list[str]) -> list["array[int]"]:
        """The token ids of texts as they are: `tokenizer(texts, add_special_tokens=False)`.

        Without the overhead of its Python wrapper where possible.
        """
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
                f"{self._folder}: the tokenizer makes no token of {quoted(rendered)}; correct "
                f"{self._section}.template or the question"
            )
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without tokens that only control programs, such as EOS."""
        shown = list(filterfalse(self._unseen.__contains__, token_ids))
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))

    def _chat(self, turns: Turns, told: Mapping[str, Any] | None, *, asks: bool = True) -> str:
        """Render turns in the chat template; with `asks`, add the beginning of the assistant's next turn."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    add_generation_prompt=asks,
                    tokenize=False,
                    strftime_now=DATE.strftime,  # so that a prompt is the same every day
                    **(told or {}),
                )
            )
        except Exception as error:  # the template is a program that comes with the model
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self._chat_error(f"cannot render a question ({reason})") from error

    def _probes(self, data: DataConfig) -> list[str]:
        return [self._chat(chat_turns(question, data), data.chat_template_kwargs) for question in PROBES]

    def _refuse_unusable_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise UserError(
                f'{self._folder} has no chat template; set {self._section}.template to a text containing "{{prompt}}"'
            )
        told = self._data.chat_template_kwargs or {}
        if ours := [key for key in told if key in _set_by_rendering(self.tokenizer)]:
            raise UserError(
                f"{self._section}.chat_template_kwargs sets {', '.join(ours)}, which is set already; leave it out"
            )
        rendered = self._probes(self._data)
        if len(set(rendered)) < len(PROBES):
            raise self._chat_error(f"renders every question to the same text, {quoted(rendered.pop())}")
        self._refuse_unread(rendered)

    def _refuse_unread(self, rendered: list[str]) -> None:
        """Raise UserError for a setting that the chat template ignores; `rendered` are the probes with all settings."""
        data, source = self._data, str(self.tokenizer.chat_template)
        told = data.chat_template_kwargs or {}
        without: dict[str, dict[str, Any]] = {
            key: {key: None} for key in ("system_prompt", "few_shot") if getattr(data, key)
        }
        for key in told:
            if key not in source:
                others = {name: value for name, value in told.items() if name != key}
                without[f"chat_template_kwargs.{key}"] = {"chat_template_kwargs": others}
        for name, change in without.items():
            if rendered == self._probes_or_none(data.model_copy(update=change)):
                raise UserError(
                    f"{self._section}.{name} would have no effect: the chat template {self._template_file()} does not "
                    "read it; leave it out"
                )

    def _probes_or_none(self, data: DataConfig) -> list[str] | None:
        """The rendered probes; None if the chat template fails on them."""
        try:
            return self._probes(data)
        except UserError:
            return None

    @property
    def lets_think(self) -> bool:
        """Whether the chat template supports thinking, and prompts do not end with the thinking already closed."""
        return (
            self.template == "chat"
            and END_OF_THINKING in str(self.tokenizer.chat_template)
            and not self.in_template(PROBES[0]).rstrip().endswith(END_OF_THINKING)
        )

    def hint(self) -> str | None:
        """A line for the user if an instruct model is prompted without its chat template."""
        if self.template == "chat" or not self.tokenizer.chat_template:
            return None
        added = set(self.tokenizer.all_special_ids) | self.tokenizer.added_tokens_decoder.keys()
        (ids,) = self.token_ids([self.in_template(PROBES[0])])
        end = self._end_of_turn(added)
        if end not in self.eos_token_ids or not added.isdisjoint(ids):
            return None
        return (
            "hint: this is an instruct model (its completions end with "
            f"{self.tokenizer.convert_ids_to_tokens(end)}, as the turns of its chat template do), but its prompts are "
            f'not in that template; set {self._section}.template = "chat" unless you mean this'
        )

    def _end_of_turn(self, added: Collection[int]) -> int | None:
        """The first added token after a turn of the assistant in the chat template."""
        turns = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": PROBES[1]}]
        try:
            _, found, rest = self._chat(turns, None, asks=False).rpartition(PROBES[1])
        except UserError:
            return None
        (ids,) = self.token_ids([rest]) if found and rest else ([],)
        return next((token for token in ids if token in added), None)

    def _chat_error(self, what: str) -> UserError:
        return UserError(
            f"{self._template_file()}: the chat template {what}; correct it, or set {self._section}.template to a text "
            'containing "{prompt}"'
        )

    def _template_file(self) -> Path:
        files = (self._folder / name for name in ("chat_template.jinja", "chat_template.json"))
        return next((file for file in files if file.is_file()), self._folder / "tokenizer_config.json")

    @property
    def pad_token_id(self) -> int:
        """The id that pads the rows of a batch. Any id that the model can read will do; this is the lowest EOS id."""
        return self.eos_token_ids[0]

    def identity(self) -> dict[str, Any]:
        """The settings that must be equal for two renderings to be the same."""
        template = self.tokenizer.chat_template if self.template == "chat" else self.template
        return {
            "template": template,
            "eos_token_ids": list(self.eos_token_ids),
            **framing_identity(self._data),
        }


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def quoted(text: str) -> str:
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
        options["mistral_format"] = False  # transformers prefers it if mistral-common is installed
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # for a damaged file the libraries raise any exception
        raise UserError(f"{folder} has no usable tokenizer ({cause(error)}); {AGAIN}") from error


def _control_token_ids(tokenizer: "PreTrainedTokenizerBase", eos_token_ids: Sequence[int]) -> frozenset[int]:
    """The ids of EOS, BOS, padding and the like. If an EOS id belongs to an ordinary word, it counts as text."""
    special = set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    control = {getattr(tokenizer, f"{name}_token_id") for name in CONTROL_TOKENS}
    return frozenset(control.union(eos_token_ids) & special)


def prompt_template(data: DataConfig) -> str:
    """The text template for a data set's questions, which contains {prompt}, or "chat".

    Raises UserError for an unknown name, and for a text template with settings that only a chat template reads. If the
    config sets no template and the format is "auto", the data set's first rows are read.
    """
    name = template_name(data)
    if name == "chat":
        return name
    if unread := [key for key in data.chat_only if getattr(data, key)]:
        raise UserError(
            f'{data.section}.{unread[0]} needs {data.section}.template = "chat", found {quoted(name)}: '
            + (
                "put the text into the template"
                if unread[0] == "system_prompt"
                else "only a chat template reads it; leave it out"
            )
        )
    template = TEMPLATES.get(name, name)
    if "{prompt}" not in template:
        known = ", ".join([*TEMPLATES, "chat"])
        raise UserError(
            f'{data.section}.template is "{name}": use one of {known}, or a text containing {{prompt}}'
        )
    return template


def _set_by_rendering(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The arguments of the chat template that rendering sets; users may set tools and documents."""
    options = inspect.signature(tokenizer.apply_chat_template).parameters
    return {*options, "messages", "strftime_now"} - {"tools", "documents"}


def _leading_bos(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    ids = tuple(tokenizer("").input_ids)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else ()


def _is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether its Rust tokenizer can be called directly: the class overrides no method that would add to it."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )
