"""Data sets to prompts: rows to questions and answers, templates to text, text to token ids.

Both stages and the evaluation render prompts here and nowhere else, so that V̂* and the training rollouts belong to
the same conditional distribution.
"""

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from common.config import Config, DataConfig
from common.errors import UserError
from common.grading import GraderPool, extract_gold
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """How a data set's rows become prompts."""

    prompt_field: str
    answer_field: str
    template: str
    answer_is_solution: bool
    """The answer field holds a worked solution, from which the grader extracts the reference answer."""
    answer_is_tests: bool = False
    """The answer field holds a list of unit tests, and TEST_SETUP_FIELDS what runs before them."""


TEST_SETUP_FIELDS = ("test_setup_code", "test_imports")
FORMATS = {
    "gsm8k": DataFormat(
        prompt_field="question", answer_field="answer", template="gsm8k", answer_is_solution=True
    ),
    "math": DataFormat(
        prompt_field="problem", answer_field="solution", template="math", answer_is_solution=True
    ),
    "openr1": DataFormat(
        prompt_field="problem", answer_field="answer", template="openr1", answer_is_solution=False
    ),
    "generic": DataFormat(
        prompt_field="prompt", answer_field="answer", template="plain", answer_is_solution=False
    ),
    "word_problems": DataFormat(
        prompt_field="question", answer_field="answer", template="line", answer_is_solution=True
    ),
    "mbpp": DataFormat(
        prompt_field="text",
        answer_field="test_list",
        template="mbpp",
        answer_is_solution=True,
        answer_is_tests=True,
    ),
}


class PromptRenderer:
    """Turns a question into what the model reads, and what the model wrote into text."""

    def __init__(self, folder: Path, data: DataConfig) -> None:
        """Load the tokenizer. Raises UserError if it cannot end a completion or knows no chat template."""
        self.tokenizer = load_tokenizer(folder)
        self.template = prompt_template(data)
        self.eos_token_ids = eos_token_ids(folder, self.tokenizer)
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f'{folder} has no chat template; set data.template to a text containing "{{prompt}}"'
            )
        self._bos = _leading_bos(self.tokenizer)

    def render(self, text: str) -> tuple[int, ...]:
        """The token ids of a question in its template, with the tokenizer's BOS if it uses one."""
        if self.template == "chat":
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        else:
            rendered = self.template.replace("{prompt}", text)
        ids = tuple(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def identity(self) -> dict[str, Any]:
        """What must be equal for two renderings to be the same."""
        template = self.tokenizer.chat_template if self.template == "chat" else self.template
        return {"template": template, "eos_token_ids": list(self.eos_token_ids)}


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local model folder. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises bare Exceptions for a damaged file.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError):
            raise
        raise UserError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def eos_token_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The ids that end a completion: the tokenizer's and those that the model's generation config adds."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    generation_config = folder / "generation_config.json"
    if generation_config.is_file():
        named = _read_json(generation_config).get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named] if named is not None else [])
    if not ids:
        raise UserError(
            f"{folder}: the tokenizer has no EOS token, so no completion could end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tuple(sorted(ids))


def prompt_template(data: DataConfig) -> str:
    """The text that a question is put into, in place of {prompt}; or "chat". Raises UserError for an unknown name."""
    name = data.template or FORMATS[data.format].template
    if name == "chat":
        return name
    template = TEMPLATES.get(name, name)
    if "{prompt}" not in template:
        known = ", ".join([*TEMPLATES, "chat"])
        raise UserError(f'data.template is "{name}": use one of {known}, or a text containing {{prompt}}')
    return template


def _leading_bos(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    ids = tuple(tokenizer("").input_ids)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else ()


def prompt_id(text: str, answer: str) -> str:
    """A content hash of a question and its answer."""
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:24]


def load_prompts(data: DataConfig, config: Config, renderer: PromptRenderer) -> list[Prompt]:
    """Read a data set as prompts, each once, in file order. Raises the UserErrors of its two steps."""
    return prompts_from_pairs(read_pairs(data, config), data, renderer)


def read_pairs(data: DataConfig, config: Config) -> list[tuple[str, str]]:
    """Read a data set's questions and reference answers, in file order; needs no tokenizer.

    Raises UserError if it is missing or empty, lacks a field, or holds an answer that the grader cannot use.
    """
    rows = _read_rows(data, config)
    fields = FORMATS[data.format]
    prompt_field = data.prompt_field or fields.prompt_field
    answer_field = data.answer_field or fields.answer_field
    if not rows:
        raise UserError(f"the data set {data.path or data.format} is empty")
    for field in (prompt_field, answer_field):
        if field not in rows[0]:
            raise UserError(
                f"the data set {data.path} has no field {field}, it has {', '.join(rows[0])}; "
                "set data.prompt_field and data.answer_field"
            )
    numbered = list(enumerate(rows, start=1))
    if data.limit is not None and data.limit < len(rows):
        chosen = random.Random(data.seed).sample(range(len(rows)), data.limit)
        numbered = [numbered[index] for index in sorted(chosen)]
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    for number, row in numbered:
        if fields.answer_is_tests:
            row = _with_tests_as_text(row, prompt_field, answer_field)
        text = _text_of(row, prompt_field, number, data)
        answer = _text_of(row, answer_field, number, data)
        if not text.strip():
            raise UserError(f"{data.path}, row {number}: {prompt_field} is empty; correct or remove the row")
        try:
            pairs.append(
                (text, extract_gold(config.grader.name, answer) if fields.answer_is_solution else answer)
            )
        except UserError as error:
            problems.append(f"row {number}: {error}")
    _refuse_bad_golds(problems, len(numbered), data)
    return pairs


def _with_tests_as_text(row: dict[str, Any], prompt_field: str, answer_field: str) -> dict[str, Any]:
    """The row with its tests as the grader "code" reads them, and the first one shown: it alone names the function."""
    question, tests = row.get(prompt_field), row.get(answer_field)
    if not question or not isinstance(tests, list) or not tests:
        return row
    found = [row.get(field) or [] for field in TEST_SETUP_FIELDS]
    setup = [str(line) for lines in found for line in ([lines] if isinstance(lines, str) else lines)]
    return {
        **row,
        prompt_field: f"{question}\nYour code must pass this test, and others:\n{tests[0]}",
        answer_field: json.dumps({"setup": "\n".join(setup), "tests": tests}),
    }


def _text_of(row: dict[str, Any], field: str, number: int, data: DataConfig) -> str:
    value = row.get(field)
    place = f"{data.path or data.format}, row {number}"
    if not isinstance(value, str | int | float):
        found = "is missing" if value is None else f"is a {type(value).__name__}, not a text"
        raise UserError(
            f"{place}: {field} {found}; correct the row, or set data.prompt_field and data.answer_field"
        )
    text = str(value)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"{place}: {field} holds half of a UTF-16 pair, which no file can store; correct the row"
        )
    return text


def usable_prompts(prompts: Sequence[Prompt], data: DataConfig, pool: GraderPool) -> list[Prompt]:
    """The prompts whose reference answer the grader can use, found before anything is generated for them.

    Raises UserError, naming the others, unless data.bad_golds says to drop them.
    """
    verdicts = pool.validate_golds([prompt.answer for prompt in prompts])
    judged = list(zip(prompts, verdicts, strict=True))
    _refuse_bad_golds(
        [f'"{prompt.text[:60]}…": {problem}' for prompt, problem in judged if problem is not None],
        len(prompts),
        data,
    )
    return [prompt for prompt, problem in judged if problem is None]


def _refuse_bad_golds(problems: Sequence[str], total: int, data: DataConfig) -> None:
    if problems and data.bad_golds == "error":
        shown = "; ".join([*problems[:3], *(["…"] if len(problems) > 3 else [])])
        raise UserError(
            f"{len(problems):,} of {total:,} reference answers of {data.path or data.format} cannot be used by the "
            f'grader: {shown}; correct them or set data.bad_golds = "drop"'
        )


def prompts_from_pairs(
    pairs: Iterable[tuple[str, str]], data: DataConfig, renderer: PromptRenderer
) -> list[Prompt]:
    """Render (question, answer) pairs; a pair that comes twice is one prompt.

    Raises UserError if a prompt is longer than data.max_prompt_tokens, or if none is left.
    """
    prompts: dict[str, Prompt] = {}
    for text, answer in pairs:
        identifier = prompt_id(text, answer)
        if identifier in prompts:
            continue
        token_ids = renderer.render(text)
        if len(token_ids) > data.max_prompt_tokens:
            if data.long_prompts == "drop":
                continue
            raise UserError(
                f"a prompt has {len(token_ids)} tokens, more than data.max_prompt_tokens = {data.max_prompt_tokens}: "
                f'"{text[:60]}…"; raise the limit or set data.long_prompts = "drop"'
            )
        compact = array("i", token_ids)
        prompts[identifier] = Prompt(
            id=identifier,
            text=text,
            answer=answer,
            token_ids=compact,
            token_hash=hashlib.sha256(compact.tobytes()).hexdigest()[:16],
        )
    if not prompts:
        raise UserError(
            f"no prompt of {data.path or data.format} is left: all are longer than data.max_prompt_tokens "
            "or have a reference answer that the grader cannot use"
        )
    return list(prompts.values())


def longest_allowed_prompt(config: Config) -> int:
    """The most tokens that a prompt may have, in training or held out: the engine makes room for them."""
    sections = [config.data] if config.evaluate.data is None else [config.data, config.evaluate.data]
    return max(section.max_prompt_tokens for section in sections)


def check_context(prompts: Sequence[Prompt], config: Config, folder: Path) -> None:
    """Raise UserError unless every prompt and its completion fit the model's context."""
    completion = config.sampling.max_completion_tokens
    longest = max(len(prompt.token_ids) for prompt in prompts)
    length = _read_json(folder / "config.json").get("max_position_embeddings")
    if length is not None and longest + completion > length:
        raise UserError(
            f"the longest prompt ({longest} tokens) and sampling.max_completion_tokens ({completion}) need "
            f"{longest + completion} tokens, more than the model's context of {length}; lower max_completion_tokens, "
            'or data.max_prompt_tokens with data.long_prompts = "drop"'
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path}: {str(error).splitlines()[0]}; download the model again"
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object; download the model again")
    return document


def _read_rows(data: DataConfig, config: Config) -> list[dict[str, Any]]:
    if data.format == "word_problems":
        from common.demo import word_problems

        return word_problems.generate(
            "test" if data.split == "test" else "train", data.limit or 1024, config.seed
        )
    path = Path(data.path)
    if not data.path:
        raise UserError(
            "data.path is missing: give a .jsonl, .json or .parquet file, or a hub data set's name"
        )
    if path.suffix in (".jsonl", ".json", ".parquet"):
        return _read_file(path)
    return _read_hub(data)


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no data file {path}; check data.path")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path, glob=False).to_dicts()
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError, pl.exceptions.ComputeError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a list of objects with a prompt and an answer each")
    return rows


def _read_hub(data: DataConfig) -> list[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, data.name, split=data.split)
        wanted = [data.prompt_field or FORMATS[data.format].prompt_field]
        wanted.append(data.answer_field or FORMATS[data.format].answer_field)
        wanted += TEST_SETUP_FIELDS
        return list(
            rows.select_columns([name for name in rows.column_names if name in wanted] or rows.column_names)
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load the data set {data.path} ({data.split}) from the hub: {str(error).splitlines()[0]}; "
            "for a local file give a path ending in .jsonl, .json or .parquet"
        ) from error


def sampling_identity(
    config: Config, renderer: PromptRenderer, model: dict[str, Any], grader: str
) -> dict[str, Any]:
    """All that V̂* depends on besides the prompts: stage 1 records it, stage 2 refuses to train on another."""
    return {
        "model": model,
        "prompt": renderer.identity(),
        "sampling": config.sampling.model_dump(),
        "grader": grader,
    }
