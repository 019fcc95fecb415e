"""The known formats of data sets: the columns that hold prompt and answer, and the columns that identify a format.

docs/data.md has the table for users; tests/test_formats_of_others.py has a file of each format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOT_THERE = object()
"""Stands for a cell that a row does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """Where rows hold prompt and answer. A field may be a dotted path: `reward_model.ground_truth`, `0.value`."""

    name: str
    """The project or data set that uses the format, for messages."""
    prompt_field: str
    answer_field: str
    """Empty if the rows have no answer."""
    template: str = "plain"
    """The template for prompts that are texts; under "auto" lists of messages use the model's chat template."""
    columns: tuple[str, ...] = ()
    """Columns that a data set must have, besides prompt and answer, to be recognised."""
    absent: tuple[str, ...] = ()
    """A data set with one of these columns has another format."""
    answers_hold: str = ""
    """A text that at least one of the first answers must contain."""
    answer_is_solution: bool = False
    """The answer field holds a worked solution, from which the grader extracts the reference answer. A text without a
    marked answer is the answer itself."""
    answer_is_tests: bool = False
    """The answer field holds unit tests; TEST_SETUP_FIELDS hold code that runs before them."""
    entry_point_field: str = ""
    """The column with the name of the function that the tests pass to their `check`."""
    unit_field: str = ""
    tolerance_field: str = ""
    """The columns with the answers' unit and tolerance, which the grader "olympiadbench" uses."""
    answer_may_be_json: bool = False
    """The answer may be the text of a JSON list: `["25"]`."""
    drops_last_answer: bool = False
    """If the last turn is the assistant's, it shows an answer and is left out of the prompt."""


TEST_SETUP_FIELDS = ("test_setup_code", "test_imports")

GENERIC = DataFormat(name="prompt and answer", prompt_field="prompt", answer_field="answer")
WHOLE_PROGRAM = "{prompt}\nWrite the whole function, with its imports, in a ```python block."

FORMATS = {
    "gsm8k": DataFormat(
        name="GSM8K",
        prompt_field="question",
        answer_field="answer",
        template="gsm8k",
        answers_hold="####",
        answer_is_solution=True,
    ),
    "math": DataFormat(
        name="MATH",
        prompt_field="problem",
        answer_field="solution",
        template="math",
        absent=("answer",),
        answer_is_solution=True,
    ),
    "openr1": DataFormat(name="OpenR1", prompt_field="problem", answer_field="answer", template="openr1"),
    "generic": GENERIC,
    "word_problems": DataFormat(
        name="word problems",
        prompt_field="question",
        answer_field="answer",
        template="line",
        answer_is_solution=True,
    ),
    "mbpp": DataFormat(
        name="MBPP",
        prompt_field="text",
        answer_field="test_list",
        template="mbpp",
        answer_is_solution=True,
        answer_is_tests=True,
    ),
}
"""The formats that data.format can name."""

DISTINCT = (
    DataFormat(
        name="verl",
        prompt_field="prompt",
        answer_field="reward_model.ground_truth",
        answer_may_be_json=True,
    ),
    DataFormat(name="SkyRL", prompt_field="prompt", answer_field="reward_spec.ground_truth"),
    DataFormat(
        name="open-instruct RLVR",
        prompt_field="messages",
        answer_field="ground_truth",
        answer_may_be_json=True,
        drops_last_answer=True,
    ),
    DataFormat(name="ORZ", prompt_field="0.value", answer_field="1.ground_truth.value", template="math"),
    DataFormat(name="NeMo Gym", prompt_field="responses_create_params.input", answer_field="expected_answer"),
    FORMATS["gsm8k"],
    DataFormat(
        name="HumanEval",
        prompt_field="prompt",
        answer_field="test",
        template=WHOLE_PROGRAM,
        columns=("entry_point",),
        answer_is_solution=True,
        answer_is_tests=True,
        entry_point_field="entry_point",
    ),
    FORMATS["mbpp"],
    DataFormat(
        name="MBPP, sanitized",
        prompt_field="prompt",
        answer_field="test_list",
        template="mbpp",
        answer_is_solution=True,
        answer_is_tests=True,
    ),
    DataFormat(
        name="OlympiadBench",
        prompt_field="question",
        answer_field="final_answer",
        template="math",
        columns=("is_multiple_answer", "answer_type"),
        unit_field="unit",
        tolerance_field="error",
    ),
)
"""Formats with columns that no other format has."""

PAIRS = (
    DataFormat(
        name="problem and answer, as of OpenR1, DeepScaleR, Big-Math, NuminaMath 1.5",
        prompt_field="problem",
        answer_field="answer",
        template="math",
    ),
    FORMATS["math"],
    DataFormat(
        name="question and final answer, as of DeepMath",
        prompt_field="question",
        answer_field="final_answer",
        template="math",
    ),
    DataFormat(name="question and answer", prompt_field="question", answer_field="answer"),
    DataFormat(name="slime", prompt_field="prompt", answer_field="label"),
    GENERIC,
    DataFormat(name="TRL, with ground_truth", prompt_field="prompt", answer_field="ground_truth"),
    DataFormat(
        name="TRL, with solution",
        prompt_field="prompt",
        answer_field="solution",
        absent=("answer", "ground_truth", "label"),
        answer_is_solution=True,
    ),
)
"""Formats with common column names, tried if none of DISTINCT fits."""

ALONE = tuple(
    DataFormat(name="prompts alone", prompt_field=field, answer_field="")
    for field in ("prompt", "messages", "problem", "question")
)
"""Prompts without answers, tried last; they suit reward functions that read no answer."""


def cell_at(row: Mapping[str, Any], field: str) -> Any:
    """The cell of a row under a name or a dotted path of keys and list positions; NOT_THERE if it is missing."""
    if field in row:
        return row[field]
    found: Any = row
    for part in field.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return NOT_THERE
    return found


def has_field(rows: Sequence[Mapping[str, Any]], field: str) -> bool:
    """Whether one of these rows has the field."""
    return any(cell_at(row, field) is not NOT_THERE for row in rows)


def recognised(rows: Sequence[Mapping[str, Any]]) -> list[DataFormat]:
    """The formats that fit the first rows of a data set: one, none, or several that cannot be told apart."""
    kinds = ([each for each in some if _may_be(each, rows)] for some in (DISTINCT, PAIRS, ALONE))
    return next((found for found in kinds if found), [])


def _may_be(data_format: DataFormat, rows: Sequence[Mapping[str, Any]]) -> bool:
    needed = (data_format.prompt_field, data_format.answer_field, *data_format.columns)
    return (
        all(has_field(rows, field) for field in needed if field)
        and not any(has_field(rows, field) for field in data_format.absent)
        and (
            not data_format.answers_hold
            or any(data_format.answers_hold in str(cell_at(row, data_format.answer_field)) for row in rows)
        )
    )
