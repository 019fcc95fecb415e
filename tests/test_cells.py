"""Answers out of JSON and Parquet: each column type gives the text that stands there, or its row is named."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from common.config import DataConfig
from common.data import datasets as module
from common.data.cells import rows_of, text_of
from common.data.datasets import read_pairs
from common.errors import UserError
from common.grading import find_grader
from tests.fakes import tiny_config

CLOCK = datetime.datetime(2024, 5, 17, 12)


def answers(path: Path, **data: Any) -> list[str]:
    config = tiny_config(Path("model"), path, data=data)
    return [answer for _, answer in read_pairs(config.data, config)]


def parquet(folder: Path, values: list[Any], dtype: Any) -> Path:
    frame = pl.DataFrame({"prompt": [f"{number}?" for number in range(len(values))]})
    path = folder / "data.parquet"
    frame.with_columns(pl.Series("answer", values, dtype=dtype)).write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (pl.Float16, [1.1, 0.3], ["1.1", "0.3"]),
        (
            pl.Float32,
            [0.3, 1.1, 0.6, 1e-5, 3.0, 16777216.0],
            ["0.3", "1.1", "0.6", "0.00001", "3.0", "16777216.0"],
        ),
        (
            pl.Float64,
            [0.3, 1.1, 1e-5, 3.0, 1e22, 1 / 3],
            ["0.3", "1.1", "0.00001", "3.0", f"{10**22}.0", str(1 / 3)],
        ),
        (pl.Int8, [-3, 7], ["-3", "7"]),
        (pl.UInt64, [2**64 - 1], [str(2**64 - 1)]),
        (pl.Decimal(10, 2), [Decimal("1.10"), Decimal("-3")], ["1.10", "-3.00"]),
        (pl.String, ["1.10", "½"], ["1.10", "½"]),
        (pl.Categorical, ["yes", "no"], ["yes", "no"]),
        (pl.Enum(["yes", "no"]), ["no", "yes"], ["no", "yes"]),
        (pl.List(pl.Float32), [[1.1], [3]], ["1.1", "3.0"]),
    ],
    ids=str,
)
def test_a_columns_answers_are_what_stands_there_in_its_own_type(
    tmp_path: Path, dtype: Any, values: list[Any], expected: list[str]
) -> None:
    assert answers(parquet(tmp_path, values, dtype)) == expected


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (pl.Float32, None, "answer is missing"),
        (pl.Float32, float("nan"), "answer is nan, not a number"),
        (pl.Float64, float("-inf"), "answer is -inf, not a number"),
        (pl.Null, None, "answer is missing"),
        (pl.Boolean, True, "answer is a bool, not a text or a number"),
        (pl.Date, CLOCK.date(), "answer is a date, not a text or a number"),
        (pl.Datetime, CLOCK, "answer is a datetime, not a text or a number"),
        (pl.Time, CLOCK.time(), "answer is a time, not a text or a number"),
        (pl.Duration, datetime.timedelta(1), "answer is a timedelta, not a text or a number"),
        (pl.Binary, b"3", "answer is a bytes, not a text or a number"),
        (pl.List(pl.Int64), [3, 4], "answer is a list of 2, not a text, a number or a list of one"),
        (pl.List(pl.Int64), [], "answer is a list, not a text or a number"),
        (pl.Array(pl.Int64, 2), [3, 4], "answer is a list of 2, not a text, a number or a list of one"),
        (pl.Struct({"value": pl.Int64}), {"value": 3}, "answer is a dict, not a text or a number"),
    ],
    ids=str,
)
def test_a_cell_that_is_no_answer_is_refused_with_its_row(
    tmp_path: Path, dtype: Any, value: Any, expected: str
) -> None:
    path = parquet(tmp_path, [value, value], dtype)
    with pytest.raises(UserError) as caught:
        answers(path)
    assert str(caught.value).startswith(
        f"{path}, row 1: {expected}; correct the row, or set data.prompt_field"
    )


def test_every_short_float_is_widened_to_its_shortest_decimal() -> None:
    values = np.random.default_rng(0).random(500, dtype=np.float32) * np.float32(1000)
    rows = rows_of(pl.DataFrame({"answer": pl.Series(values)}))
    texts = [text_of(row["answer"]) for row in rows]
    assert [np.float32(text) for text in texts] == list(values)
    assert max(map(len, texts)) <= 12


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("1.10", "1.1"),
        ("3", "3"),
        ("3.0", "3.0"),
        ("1e-5", "0.00001"),
        ("-2.5E3", "-2500.0"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("1e400", f"{10**400}"),
        (str(10**30), str(10**30)),
    ],
)
def test_a_number_in_json_keeps_its_digits(tmp_path: Path, number: str, expected: str) -> None:
    (tmp_path / "data.json").write_text(f'[{{"prompt": "x", "answer": {number}}}]')
    (tmp_path / "data.jsonl").write_text(f'{{"prompt": "x", "answer": {number}}}\r\n')
    assert answers(tmp_path / "data.json") == answers(tmp_path / "data.jsonl") == [expected]
    assert find_grader("gsm8k").validate_gold(expected) is None


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("true", "row 2: answer is a bool, not a text or a number"),
        ("null", "row 2: answer is missing"),
        ("NaN", "row 2: answer is nan, not a number"),
        ("-Infinity", "row 2: answer is -inf, not a number"),
        ("1e999999999", "row 2: answer is 1E+999999999, which is out of range"),
        ("1e99999999999999999999", "line 3 is no JSON: the number 1e99999999999999999999 is out of range"),
        ('-0.1e-99999999999999999999, "other": 1', "line 3 is no JSON: the number -0.1e-999"),
        ('1, "other": 1e99999999999999999999', "line 3 is no JSON: the number 1e999"),
        ('{"a": 1}', "row 2: answer is a dict, not a text or a number"),
        ('"\\ud83d"', "row 2: answer holds half of a UTF-16 pair"),
        ("9" * 5000, "line 3 is no JSON"),
        ("[" * 100_000, "line 3 is no JSON"),
        ("", "line 3 is no JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_a_line_of_json_that_is_no_row_is_named(tmp_path: Path, cell: str, expected: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"prompt": "x", "answer": 1}}\n\n{{"prompt": "y", "answer": {cell}}}\n')
    with pytest.raises(UserError) as caught:
        answers(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b'{"prompt": "x", "answer": "1"}\n{"prompt": "\xff"}\n',
            "line 2 is no JSON: 'utf-8' codec can't decode",
        ),
        (
            b'{"prompt": "x", "answer": "1"}\n7\n',
            "line 2 is a int, not an object with a prompt and an answer",
        ),
    ],
)
def test_bytes_and_values_that_are_no_rows_are_named_by_their_line(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        answers(tmp_path / "data.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "x", "answer": "1"})
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode())
    (tmp_path / "data.json").write_bytes(b"\xef\xbb\xbf[" + row.encode() + b"]")
    assert answers(tmp_path / "data.jsonl") == answers(tmp_path / "data.json") == ["1"]


def test_a_data_set_of_the_hub_gives_the_same_answers_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "answer": datasets.Value("float32"),
            "other": datasets.Value("int8"),
        }
    )
    rows = {"prompt": ["x", "y"], "answer": [1.1, 0.3], "other": [1, 2]}
    found = datasets.Dataset.from_dict(rows, features=features)
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = tiny_config(Path("model"), Path("owner/data"), data={"name": "main", "split": "validation"})
    assert read_pairs(config.data, config) == [("x", "1.1"), ("y", "0.3")]
    assert asked == [(("owner/data", "main"), {"split": "validation"})]
    missing = config.data.model_copy(update={"answer_field": "gold"})
    with pytest.raises(UserError, match="has no field gold, it has prompt, answer, other; set"):
        read_pairs(missing, config)


def test_a_list_with_a_number_out_of_range_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"prompt": "x", "answer": 1, "other": 1e99999999999999999999}]')
    with pytest.raises(UserError, match=r"^cannot read .*data\.json: the number 1e9{20} is out of range$"):
        answers(path)


def test_a_data_set_with_a_loading_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n")
    (tmp_path / "scripted" / "README.md").write_text("A clone of a data set of the hub.\n")
    with pytest.raises(UserError, match=r"^cannot load the data set .*scripted \(train\).*scripts") as told:
        answers(tmp_path / "scripted")
    assert "\n" not in str(told.value)


def test_tests_that_are_no_texts_are_refused_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "Add.", "test_list": [1.5]}\n')
    with pytest.raises(UserError, match="row 1: test_list is a list, not a text or a number"):
        answers(path, format="mbpp")


def test_a_message_names_the_section_that_the_data_set_was_named_in(tmp_path: Path) -> None:
    data = DataConfig(format="generic", path=str(tmp_path / "none.jsonl"))
    config = tiny_config(Path("model"), tmp_path, evaluate={"data": data.model_dump()})
    assert config.held_out is not None
    with pytest.raises(UserError, match=r"there is no data file .*; check evaluate\.data\.path"):
        module.read_rows(config.held_out, config)
    with pytest.raises(UserError, match=r"there is no data file .*; check data\.path"):
        module.read_rows(data, config)
