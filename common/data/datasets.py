"""Data sets to rows of question and reference answer: files and the hub, the formats that are known."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from common.config import LOCAL_FILES, DataConfig, RunConfig
from common.data.cells import number_of, rows_of, text_of
from common.errors import UserError, first_line
from common.grading import find_grader


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


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data set: its number, from 1 on, and the texts of its question and of its answer field."""

    number: int
    question: str
    answer: str


def read_pairs(data: DataConfig, config: RunConfig) -> list[tuple[str, str]]:
    """Read a data set's questions and reference answers, in file order; needs no tokenizer.

    Raises UserError if it is missing or empty, lacks a field, or holds an answer that the grader cannot use.
    """
    rows = read_rows(data, config)
    if not FORMATS[data.format].answer_is_solution:
        return [(row.question, row.answer) for row in rows]
    grader = find_grader(config.grader.name)
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    for row in rows:
        try:
            pairs.append((row.question, grader.extract_gold(row.answer)))
        except UserError as error:
            problems.append(f"row {row.number}: {error}")
    refuse_bad_golds(problems, len(rows), data)
    return pairs


def read_rows(data: DataConfig, config: RunConfig) -> list[Row]:
    """Read a data set's rows, or as many as its limit takes, in file order.

    Raises UserError if it is missing or empty, lacks a field, or holds a cell that is no text.
    """
    rows = _read_dicts(data, config)
    fields = FORMATS[data.format]
    prompt_field = data.prompt_field or fields.prompt_field
    answer_field = data.answer_field or fields.answer_field
    if not rows:
        raise UserError(f"the data set {data.title} is empty; check {data.section}.path")
    for field in (prompt_field, answer_field):
        if field not in rows[0]:
            raise UserError(
                f"the data set {data.title} has no field {field}, it has {', '.join(rows[0])}; "
                f"set {data.section}.prompt_field and {data.section}.answer_field"
            )
    numbered = list(enumerate(rows, start=1))
    if data.limit is not None and data.limit < len(rows):
        chosen = random.Random(data.seed).sample(range(len(rows)), data.limit)
        numbered = [numbered[index] for index in sorted(chosen)]
    found: list[Row] = []
    for number, row in numbered:
        if fields.answer_is_tests:
            row = _with_tests_as_text(row, prompt_field, answer_field)
        question, answer = (_text_of(row, field, number, data) for field in (prompt_field, answer_field))
        if not question.strip():
            raise UserError(f"{data.title}, row {number}: {prompt_field} is empty; correct or remove the row")
        found.append(Row(number, question, answer))
    return found


def _with_tests_as_text(row: dict[str, Any], prompt_field: str, answer_field: str) -> dict[str, Any]:
    """The row with its tests as the grader "code" reads them, and the first one shown: it alone names the function."""
    question, tests = row.get(prompt_field), row.get(answer_field)
    if (
        not question
        or not isinstance(tests, list)
        or not tests
        or not all(isinstance(test, str) for test in tests)
    ):
        return row
    found = [row.get(field) or [] for field in TEST_SETUP_FIELDS]
    setup = [str(line) for lines in found for line in ([lines] if isinstance(lines, str) else lines)]
    return {
        **row,
        prompt_field: f"{question}\nYour code must pass this test, and others:\n{tests[0]}",
        answer_field: json.dumps({"setup": "\n".join(setup), "tests": tests}),
    }


def _text_of(row: dict[str, Any], field: str, number: int, data: DataConfig) -> str:
    try:
        return text_of(row.get(field))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{data.title}, row {number}: {field} {error}; correct the row, or set {data.section}.prompt_field "
            f"and {data.section}.answer_field"
        ) from error


def refuse_bad_golds(problems: Sequence[str], total: int, data: DataConfig) -> None:
    if problems and data.bad_golds == "error":
        shown = "; ".join([*problems[:3], *(["…"] if len(problems) > 3 else [])])
        raise UserError(
            f"{len(problems):,} of {total:,} reference answers of {data.title} cannot be used by the "
            f'grader: {shown}; correct them or set {data.section}.bad_golds = "drop"'
        )


def _read_dicts(data: DataConfig, config: RunConfig) -> list[dict[str, Any]]:
    if data.format == "word_problems":
        from common.demo import word_problems

        return word_problems.generate(
            "test" if data.split == "test" else "train", data.limit or 1024, config.seed
        )
    if not data.path:
        raise UserError(
            f"{data.section}.path is missing: give a {', '.join(LOCAL_FILES)} file, or a hub data set's name"
        )
    return _read_file(Path(data.path), data) if data.is_file else _read_hub(data)


def _read_file(path: Path, data: DataConfig) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no data file {path}; check {data.section}.path")
    try:
        if path.suffix == ".parquet":
            return rows_of(pl.read_parquet(path, glob=False))
        rows = list(_json_rows(path))
    except (ValueError, RecursionError, OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, {place} is a {type(row).__name__}, not an object with a prompt and an answer"
            )
    return [row for _, row in rows]


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """What a .jsonl or .json file holds, and where. Raises ValueError or RecursionError where it is no JSON."""
    if path.suffix == ".json":
        rows = json.loads(path.read_bytes(), parse_float=number_of)
        if not isinstance(rows, list):
            raise ValueError(f"it holds a {type(rows).__name__}, not a list of objects")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line, parse_float=number_of)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number} is no JSON: {error}") from error


def _read_hub(data: DataConfig) -> list[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, data.name, split=data.split)
        wanted = [data.prompt_field or FORMATS[data.format].prompt_field]
        wanted.append(data.answer_field or FORMATS[data.format].answer_field)
        if set(wanted) <= set(rows.column_names):
            rows = rows.select_columns(
                [name for name in rows.column_names if name in (*wanted, *TEST_SETUP_FIELDS)]
            )
        return rows_of(pl.DataFrame(rows.with_format("arrow")[:]))
    except Exception as error:  # each kind of data set has errors of its own
        raise UserError(
            f"cannot load the data set {data.path} ({data.split}) from the hub: {first_line(error)}; "
            f"for a local file give a {data.section}.path that ends in {', '.join(LOCAL_FILES)}"
        ) from error
