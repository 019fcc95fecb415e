"""Reads data sets, from files or from the hub, as rows of a question and a reference answer."""

import json
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from common.config import LOCAL_FILES, PATH_ADVICE, DataConfig, RunConfig
from common.data.cells import rows_of, text_of
from common.data.files import local_files, rows_in
from common.data.formats import (
    FORMATS,
    GENERIC,
    NOT_THERE,
    TEST_SETUP_FIELDS,
    DataFormat,
    cell_at,
    has_field,
    recognised,
)
from common.data.messages import is_messages, text_of_turns, usable_turns
from common.errors import UserError, first_line
from common.grading import Grader, GraderConfig, row_needs
from common.grading.conventions import Needs
from common.grading.reference import Reference, json_number, storable_cell
from common.grading.rule_olympiadbench import reference_text

FIRST_ROWS = 100
"""The number of rows whose columns decide the format."""

SHOWN_COLUMNS = 20

MOST_CHARACTERS_OF_ROW = 65_536
"""The limit for columns that no setting names: each sample of the prompt stores them."""

NOTHING = Needs()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a data set: its place in the file, for messages, and the texts of its question and its answer field."""

    place: str
    question: str
    answer: str
    reference: Reference | None = None
    """The data that reward functions read from the row, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set after reading."""

    format: DataFormat
    pairs: list[tuple[str, str]]
    """Questions and reference answers, in file order."""
    dropped: int
    """Rows that data.bad_golds left out."""


def read_data_set(data: DataConfig, config: RunConfig) -> DataSet:
    """Read a data set's questions and reference answers; needs no tokenizer.

    Raises UserError if it is missing or empty, lacks a field, or holds an answer that the grader cannot use.
    """
    data_format = format_of(data)
    rows, dropped = _read_rows(data, config, row_needs(config.grader))
    grader = Grader(config.grader.spec)
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    for row in rows:
        try:
            gold = grader.extract_gold(row.answer) if data_format.answer_is_solution else row.answer
        except UserError as error:
            problems.append(f"{row.place}: {error}")
            continue
        reference = row.reference
        pairs.append((row.question, gold if reference is None else replace(reference, answer=gold).to_text()))
    refuse_bad_golds(problems, len(rows), data)
    return DataSet(format=data_format, pairs=pairs, dropped=dropped + len(problems))


def read_pairs(data: DataConfig, config: RunConfig) -> list[tuple[str, str]]:
    """The questions and reference answers of a data set, in file order. Raises the UserErrors of `read_data_set`."""
    return read_data_set(data, config).pairs


def read_rows(data: DataConfig, config: RunConfig) -> list[Row]:
    """Read a data set's rows, or as many as its limit takes, in file order.

    Raises UserError if it is missing or empty, lacks a field, or holds a cell that is no text.
    """
    return _read_rows(data, config, NOTHING)[0]


def _read_rows(data: DataConfig, config: RunConfig, needs: Needs) -> tuple[list[Row], int]:
    """The rows, with the columns that `needs` names, and the number of rows that data.bad_golds left out."""
    sources = _sources(data, config, needs)
    rows = [numbered for source in sources for numbered in source.numbered(data)]
    if not rows:
        raise UserError(f"the data set {data.title} is empty; check {data.section}.path")
    data_format = format_of(data)
    first_rows = [row for _, row in rows[:FIRST_ROWS]]
    _refuse_missing_field(first_rows, data_format, data, config.grader)
    columns = _needed_columns(first_rows, data_format, needs, data, config.grader)
    any_answer = not config.grader.reads_answer
    with_tolerance = bool(data_format.tolerance_field) and "olympiadbench" in config.grader.names
    if data.limit is not None and data.limit < len(rows):
        chosen = random.Random(data.seed).sample(range(len(rows)), data.limit)
        rows = [rows[index] for index in sorted(chosen)]
    for _, row in rows:
        row.update(
            {name: None for name in needs.columns if name not in row}
        )  # as the `datasets` library reads it
    under_chat = template_name(data) == "chat"
    found: list[Row] = []
    problems: list[str] = []
    for place, row in rows:
        try:
            answered = _with_tolerance_as_text(row, data_format) if with_tolerance else row
            question, answer = _pair(answered, data_format, under_chat, any_answer)
            reference = _reference(row, data_format, columns, any_answer) if needs.reads_row else None
            found.append(Row(place, question, answer, reference))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if data.bad_golds == "error":
                break
    if problems and (not found or data.bad_golds == "error"):
        drop = f', or {data.section}.bad_golds = "drop"' if data.bad_golds == "error" else ""
        where = f"{data.title}, " if problems[0].startswith("row ") else ""
        raise UserError(
            f"{where}{problems[0]}; correct the row, or set {data.section}.prompt_field and "
            f"{data.section}.answer_field{drop}"
        )
    return found, len(problems)


def _pair(
    row: dict[str, Any], data_format: DataFormat, under_chat: bool, any_answer: bool
) -> tuple[str, str]:
    """The texts of a row's question and answer. Raises ValueError, which names the cell and the problem."""
    if data_format.answer_is_tests:
        row = _with_tests_as_text(row, data_format)
    question = _cell(row, data_format.prompt_field, lambda cell: _question(cell, data_format, under_chat))
    if not question.strip():
        raise ValueError(f"{data_format.prompt_field} is empty")
    if not data_format.answer_field:
        return question, ""

    def read(cell: Any) -> str:
        if any_answer and cell is None:
            return ""
        if any_answer and isinstance(cell, list | dict | bool):
            return json.dumps(storable_cell(cell), ensure_ascii=False)
        if any_answer and len(_listed(cell, data_format) or [cell]) > 1:
            return text_of(cell)
        return _answer(cell, data_format)

    return question, _cell(row, data_format.answer_field, read)


def _reference(
    row: dict[str, Any], data_format: DataFormat, columns: Collection[str] | None, any_answer: bool
) -> Reference:
    """The data that reward functions read from a row; `columns` names the columns, None means all but the prompt."""
    answer = cell_at(row, data_format.answer_field)
    answer = json_number(answer) if isinstance(answer, Decimal) else answer
    kinds = (int, float, list, dict) if any_answer else (int, float)  # a rule reads the one element of a list
    is_no_text = isinstance(answer, kinds) or (any_answer and _listed(answer, data_format) is not None)
    names = [name for name in row if name != data_format.prompt_field] if columns is None else columns
    reference = Reference(
        answer="",
        raw=storable_cell(answer) if is_no_text else None,
        columns={name: row[name] for name in names if name in row},
        is_messages=is_messages(cell_at(row, data_format.prompt_field)),
    )
    if columns is None and (size := len(reference.to_text())) > MOST_CHARACTERS_OF_ROW:
        raise ValueError(
            f"has {size:,} characters in its columns, all of which a reward function with **kwargs gets and every "
            "sample stores; name those that it reads in grader.columns"
        )
    return reference


def _needed_columns(
    rows: Sequence[dict[str, Any]],
    data_format: DataFormat,
    needs: Needs,
    data: DataConfig,
    grader: GraderConfig,
) -> list[str] | None:
    """The columns that reward functions read, None for all. Raises UserError if one is missing."""
    there = {name for row in rows for name in row}
    named = [*needs.columns, *(grader.columns or [])]
    if missing := [name for name in named if name not in there]:
        raise UserError(
            f"the data set {data.title} has no column {missing[0]}, which grader.name = {grader.title} takes; it has "
            f"{_columns_of(rows)}"
        )
    if needs.all_columns and grader.columns is None:
        return None
    return list(dict.fromkeys([*named, *needs.optional_columns]))


def _cell(row: dict[str, Any], field: str, read: Callable[[Any], str]) -> str:
    cell = cell_at(row, field)
    try:
        return read(None if cell is NOT_THERE else cell)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} {error}") from error


def _question(cell: Any, data_format: DataFormat, under_chat: bool) -> str:
    if not is_messages(cell):
        return text_of(cell)
    turns = usable_turns(cell, drops_last_answer=data_format.drops_last_answer)
    if len(turns) > 1 and not under_chat:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(
            f'has the turns {roles}, which only template = "chat" shows, not one turn of the user'
        )
    return text_of(text_of_turns(turns))


def _answer(cell: Any, data_format: DataFormat) -> str:
    """The text of an answer; a list with one answer is that answer."""
    if data_format.answer_is_tests:
        return text_of(cell)
    if (listed := _listed(cell, data_format)) is not None:
        cell = listed
    if isinstance(cell, list) and len(cell) == 1:
        (cell,) = cell
    if isinstance(cell, list) and cell:
        raise TypeError(f"is a list of {len(cell)}, not a text, a number or a list of one")
    return text_of(cell)


def _listed(cell: Any, data_format: DataFormat) -> list[Any] | None:
    """The list whose JSON a text is; None for any other cell."""
    if data_format.answer_may_be_json and isinstance(cell, str) and cell.lstrip().startswith('["'):
        with suppress(ValueError, RecursionError):  # an answer may begin like a list and be none
            return list(json.loads(cell))
    return None


def _refuse_missing_field(
    rows: Sequence[dict[str, Any]], data_format: DataFormat, data: DataConfig, grader: GraderConfig
) -> None:
    if not data_format.answer_field and grader.reads_answer:
        raise UserError(
            f"the data set {data.title} has prompts and no answers, which grader.name = {grader.title} compares with; "
            f"it has {_columns_of(rows)}; set {data.section}.answer_field"
        )
    for field in (data_format.prompt_field, data_format.answer_field):
        if field and not has_field(rows, field):
            raise UserError(
                f"the data set {data.title} has no field {field}, it has {_columns_of(rows)}; "
                f"set {data.section}.prompt_field and {data.section}.answer_field"
            )


def _columns_of(rows: Sequence[dict[str, Any]]) -> str:
    """The names of their columns; for a column of objects, the dotted names of the objects' keys."""
    names: dict[str, None] = {}
    for row in rows:
        for name, cell in row.items():
            inner = [f"{name}.{key}" for key in cell] if isinstance(cell, dict) else []
            names |= dict.fromkeys(inner or [name])
    shown = list(names)[:SHOWN_COLUMNS]
    return ", ".join([*shown, *(["…"] if len(names) > len(shown) else [])])


def format_of(data: DataConfig) -> DataFormat:
    """The format of a data set, with its fields and its template.

    Under "auto" the first rows decide. Raises UserError if they fit no known format, or several.
    """
    if data.format != "auto":
        found = FORMATS[data.format]
    elif data.prompt_field and data.answer_field:
        found = GENERIC
    else:
        found = _recognised(data)
    found = replace(
        found,
        prompt_field=data.prompt_field or found.prompt_field,
        answer_field=data.answer_field or found.answer_field,
    )
    if data.format == "auto" and data.template is None:
        cells = (cell_at(row, found.prompt_field) for row in _first_rows(data))
        if any(is_messages(cell) for cell in cells):
            return replace(found, template="chat")
    return found


def template_name(data: DataConfig) -> str:
    """The template for a data set's questions: the config's, or else the format's."""
    return data.template or format_of(data).template


def recognised_as(data: DataConfig, data_format: DataFormat) -> str:
    """A line that says which format "auto" found in a data set."""
    answers = (
        f"answers from {data_format.answer_field}"
        if data_format.answer_field
        else _no_answers(data, data_format)
    )
    return (
        f"{data.title}: read as {data_format.name}: prompts from {data_format.prompt_field}, {answers}, "
        f"template {template_name(data)!r}"
    )


def _no_answers(data: DataConfig, data_format: DataFormat) -> str:
    others = [name for name in _first_rows(data)[0] if name != data_format.prompt_field]
    if not others:
        return "no answers"
    return f"no answers (set {data.section}.answer_field if one of {', '.join(others[:SHOWN_COLUMNS])} is the answer)"


def _recognised(data: DataConfig) -> DataFormat:
    rows = _first_rows(data)
    if not rows:
        raise UserError(f"the data set {data.title} is empty; check {data.section}.path")
    candidates = recognised(rows)
    if len(candidates) == 1:
        return candidates[0]
    advice = f"set {data.section}.prompt_field and {data.section}.answer_field"
    if not candidates:
        raise UserError(
            f"the data set {data.title} is of no format that is known by its columns: it has {_columns_of(rows)}; "
            f"{advice} (docs/data.md lists the formats)"
        )
    names = " or ".join(f"{each.name} ({each.prompt_field}, {each.answer_field})" for each in candidates)
    raise UserError(
        f"the data set {data.title} may be of several formats: {names}; it has {_columns_of(rows)}; {advice}"
    )


def _first_rows(data: DataConfig) -> Sequence[dict[str, Any]]:
    """The first rows, at most FIRST_ROWS, of the first file that has any."""
    _refuse_missing_path(data)
    files = local_files(data)
    if files is None:
        return _first_rows_of_hub(str(data.path), data.name, data.split, data.section)
    for file in files:
        status = file.stat()
        if rows := _first_rows_of_file(file, status.st_mtime_ns, status.st_size):
            return rows
    return []


@lru_cache(maxsize=8)
def _first_rows_of_file(file: Path, changed: int, size: int) -> list[dict[str, Any]]:
    return rows_in(file, FIRST_ROWS)


@lru_cache(maxsize=8)
def _first_rows_of_hub(path: str, name: str | None, split: str, section: str) -> list[dict[str, Any]]:
    return _rows_of_hub(path, name, split, section, most=FIRST_ROWS)


def _with_tests_as_text(row: dict[str, Any], data_format: DataFormat) -> dict[str, Any]:
    """Rewrite a row's tests for the grader "code". MBPP's first test is shown in the question: it names the function.

    A row without such tests is returned unchanged; reading its answer as a text then fails.
    """
    prompt_field, answer_field = data_format.prompt_field, data_format.answer_field
    question, tests = cell_at(row, prompt_field), cell_at(row, answer_field)
    if data_format.entry_point_field:
        name = row.get(data_format.entry_point_field)
        if not isinstance(tests, str) or not isinstance(name, str):
            return row
        return {**row, answer_field: json.dumps({"setup": tests, "tests": [f"check({name})"]})}
    if (
        not isinstance(question, str)
        or not question
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


def _with_tolerance_as_text(row: dict[str, Any], data_format: DataFormat) -> dict[str, Any]:
    """The row with its answers, their tolerance and unit as the grader "olympiadbench" reads them.

    Unchanged where it has no list of answers. Raises ValueError for a tolerance that is no number.
    """
    answers, unit = cell_at(row, data_format.answer_field), row.get(data_format.unit_field)
    if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
        return row
    tolerance = str(row.get(data_format.tolerance_field) or "").split(",")
    try:
        numbers = [float(part) for part in tolerance if part.strip()]
    except ValueError as error:
        raise ValueError(f"{data_format.tolerance_field} is no number: {','.join(tolerance)!r}") from error
    return {
        **row,
        data_format.answer_field: reference_text(answers, numbers, None if unit is None else str(unit)),
    }


def refuse_bad_golds(problems: Sequence[str], total: int, data: DataConfig) -> None:
    if problems and data.bad_golds == "error":
        shown = "; ".join([*problems[:3], *(["…"] if len(problems) > 3 else [])])
        raise UserError(
            f"{len(problems):,} of {total:,} reference answers of {data.title} cannot be used by the "
            f'grader: {shown}; correct them or set {data.section}.bad_golds = "drop"'
        )


@dataclass(frozen=True, slots=True)
class _Source:
    """The rows of a file or of a data set on the hub."""

    title: str
    rows: list[dict[str, Any]]

    def numbered(self, data: DataConfig) -> list[tuple[str, dict[str, Any]]]:
        """Each row with its place, which includes the file's name if the data set has several files."""
        file = "" if self.title == data.title else f"{self.title}, "
        return [(f"{file}row {number}", row) for number, row in enumerate(self.rows, start=1)]


def _refuse_missing_path(data: DataConfig) -> None:
    if not data.path:
        raise UserError(f"{data.section}.path is missing: {PATH_ADVICE}")


def _sources(data: DataConfig, config: RunConfig, needs: Needs) -> list[_Source]:
    if data.format == "word_problems":
        from common.demo import word_problems

        rows = word_problems.generate(
            "test" if data.split == "test" else "train", data.limit or 1024, config.seed
        )
        return [_Source(data.title, rows)]
    _refuse_missing_path(data)
    files = local_files(data)
    if files is not None:
        return [_Source(str(file), rows_in(file)) for file in files]
    data_format = format_of(data)
    fields = [data_format.prompt_field, data_format.answer_field, data_format.entry_point_field]
    if needs.all_columns and config.grader.columns is None:
        fields = []
    else:
        fields += [*needs.columns, *(config.grader.columns or [])]
    further = [*needs.optional_columns, data_format.unit_field, data_format.tolerance_field]
    rows = _rows_of_hub(str(data.path), data.name, data.split, data.section, fields=fields, further=further)
    return [_Source(data.title, rows)]


def _rows_of_hub(
    path: str,
    name: str | None,
    split: str,
    section: str,
    *,
    fields: Sequence[str] = (),
    further: Sequence[str] = (),
    most: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a data set that the `datasets` library loads.

    Without `fields` all columns are kept; otherwise the columns of `fields`, and those of `further` that exist.
    """
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
        wanted = {
            field if field in rows.column_names else field.partition(".")[0] for field in fields if field
        }
        if wanted and wanted <= set(rows.column_names):
            kept = {*wanted, *further, *TEST_SETUP_FIELDS}
            names = [column for column in rows.column_names if column in kept]
            rows = rows.select_columns(names)
        return rows_of(pl.DataFrame(rows.with_format("arrow")[:most]))
    except Exception as error:  # each kind of data set raises its own errors
        there = "" if Path(path).is_dir() else " from the hub, and there is no such file or folder here"
        raise UserError(
            f"cannot load the data set {path} ({split}){there}: {first_line(error)}; "
            f"for a local file give a {section}.path that ends in {', '.join(LOCAL_FILES)}"
        ) from error
