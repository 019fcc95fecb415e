"""Data sets to rows of question and reference answer: files and the hub, the formats that are known."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from common.config import DataConfig, RunConfig
from common.errors import UserError
from common.grading import extract_gold


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


def read_pairs(data: DataConfig, config: RunConfig) -> list[tuple[str, str]]:
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
    refuse_bad_golds(problems, len(numbered), data)
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


def refuse_bad_golds(problems: Sequence[str], total: int, data: DataConfig) -> None:
    if problems and data.bad_golds == "error":
        shown = "; ".join([*problems[:3], *(["…"] if len(problems) > 3 else [])])
        raise UserError(
            f"{len(problems):,} of {total:,} reference answers of {data.path or data.format} cannot be used by the "
            f'grader: {shown}; correct them or set data.bad_golds = "drop"'
        )


def _read_rows(data: DataConfig, config: RunConfig) -> list[dict[str, Any]]:
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
