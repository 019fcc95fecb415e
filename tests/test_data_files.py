"""Data files of every kind: the same rows from each, and what cannot be read named by its file and line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from common.config import COMPRESSED, LOCAL_FILES, data_suffix
from common.data.datasets import read_data_set, read_pairs
from common.data.files import rows_in
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.errors import UserError
from stage2_train.config import Config
from stage2_train.preflight import refuse_first
from tests.fakes import tiny_config
from tests.test_prompts import ROWS, write_jsonl

PAIRS = [(row["prompt"], row["answer"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,answer\n" + "".join(f"{prompt},{answer}\n" for prompt, answer in PAIRS)


def auto(path: Any, grader: str = "gsm8k", /, **data: Any) -> Config:
    """A run whose [data] says little but where the rows are."""
    config = tiny_config(Path("model"), Path("none"), grader={"name": grader})
    return Config.model_validate({**config.model_dump(), "data": {"path": path, **data}})


def pairs(path: Any, grader: str = "gsm8k", /, **data: Any) -> list[tuple[str, str]]:
    config = auto(str(path) if isinstance(path, Path) else path, grader, **data)
    return read_pairs(config.data, config)


def refusal(path: Any, grader: str = "gsm8k", /, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        pairs(path, grader, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parquet(file: Path) -> None:
    pl.DataFrame(ROWS).write_parquet(file)


def arrow_file(file: Path) -> None:
    pl.DataFrame(ROWS).write_ipc(file)


def arrow_stream(file: Path) -> None:
    table = pl.DataFrame(ROWS).to_arrow()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def compressed(kind: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with pa.output_stream(str(file), compression=kind) as opened:
            opened.write(LINES.encode())

    return write


def plain(content: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    return raw(content.encode(encoding))


def raw(content: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(content)

    return write


def parquet_in_gzip(file: Path) -> None:
    parquet(file)
    file.write_bytes(gzip.compress(file.read_bytes()))


WRITERS: dict[str, Callable[[Path], None]] = {
    "data.jsonl": plain(LINES),
    "DATA.JSONL": plain(LINES.replace("\n", "\r\n")),
    "data.ndjson": plain(LINES, "utf-8-sig"),
    "list.json": plain(json.dumps(ROWS)),
    "lines.json": plain(LINES),
    "lines.bom.json": plain(LINES, "utf-8-sig"),
    "columns.json": plain(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1)),
    "data.parquet": parquet,
    "data.pq": parquet,
    "file.arrow": arrow_file,
    "stream.arrow": arrow_stream,
    "data.csv": plain(CSV),
    "bom.csv": plain(CSV, "utf-8-sig"),
    "data.TSV": plain(CSV.replace(",", "\t").replace("\n", "\r\n")),
    "data.jsonl.gz": compressed("gzip"),
    "data.jsonl.zst": compressed("zstd"),
    "data.jsonl.BZ2": compressed("bz2"),
    "members.jsonl.gz": raw(b"".join(gzip.compress(line) for line in LINES.encode().splitlines(True))),
    "list.json.gz": raw(gzip.compress(json.dumps(ROWS).encode())),
    "data.csv.gz": raw(gzip.compress(CSV.encode())),
    "data.parquet.gz": parquet_in_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert pairs(tmp_path / name) == PAIRS
    assert pairs(tmp_path / name, format="generic") == PAIRS
    assert len(rows_in(tmp_path / name, most=3)) == 3


def test_there_is_a_file_of_each_ending() -> None:
    assert {data_suffix(name) for name in WRITERS} == set(LOCAL_FILES)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("cut.jsonl", LINES[:-20], "line 20 is no JSON: Unterminated string starting at character"),
        (
            "doubled.jsonl",
            LINES.replace("}\n", "}", 1),
            "line 1 is no JSON: a second value begins at character 44; put each row on a line of its own",
        ),
        (
            "doubled.json",
            f"{LINES}{LINES[:-1]}{LINES}",
            "line 40 is no JSON: a second value begins at character",
        ),
        ("cut.json", json.dumps(ROWS, indent=1)[:100], "line 8 is no JSON: Expecting value"),
        (
            "object.json",
            '{"prompt": "x", "answer": "1"}',
            "it holds one object, with prompt, answer, not a list of objects; write a list of rows",
        ),
        ("uneven.json", '{"prompt": ["x"], "answer": []}', "it holds one object, with prompt, answer"),
        ("text.json", '"x"', "it holds a str, not a list of objects"),
        ("number.json", "[1]", "row 1 is a int, not an object with a prompt and an answer"),
        ("lists.jsonl", "[[1], {}]\n", "line 1 is a list, not an object with a prompt and an answer"),
        ("long.csv", "prompt,answer\nx,1\ny,2,3\n", "line 3 has 3 cells, the first line 2"),
        ("short.csv", 'prompt,answer\n"x\ny",1\nz\n', "line 4 has 1 cells, the first line 2"),
        ("quote.csv", 'prompt,answer\n"x,1\n', "line 2 is no row: unexpected end of data"),
        ("twice.csv", "prompt,prompt\nx,1\n", "two of its columns have the same name"),
        ("data.parquet", "no Parquet", ""),
        ("data.arrow", "no Arrow", ""),
        ("data.jsonl.gz", "no gzip", ""),
        ("data.jsonl.zst", "no zstd", ""),
    ],
)
def test_what_cannot_be_read_is_named_by_its_file_and_line(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name).startswith(f"cannot read {tmp_path / name}: {expected}")


@pytest.mark.parametrize("cut", [1, 12, 60])
@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_compressed_file_that_was_cut_off_is_refused(tmp_path: Path, ending: str, cut: int) -> None:
    file = tmp_path / f"data.jsonl{ending}"
    compressed(COMPRESSED[ending])(file)
    file.write_bytes(file.read_bytes()[:-cut])
    assert refusal(file).startswith(f"cannot read {file}: ")


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    for name in ("data.csv", "data.jsonl"):
        content = (CSV if name == "data.csv" else LINES).replace("What is 1 +", "Wo größer als 1 +")
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        line = 3 if name == "data.csv" else 2
        assert f"cannot read {tmp_path / name}: line {line} is no" in refusal(tmp_path / name)


def test_cells_of_a_table_are_texts_and_an_empty_one_is_missing(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('prompt,answer\n"a, ""b""\nc",1.10\n"z",\n')
    assert pairs(tmp_path / "data.csv", bad_golds="drop") == [('a, "b"\nc', "1.10")]
    assert refusal(tmp_path / "data.csv").startswith(
        f"{tmp_path / 'data.csv'}, row 2: answer is missing; correct"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of two splits in two kinds, and others."""
    rows = ROWS[:2]
    (tmp_path / "set" / "more").mkdir(parents=True)
    (tmp_path / "set" / "notes.txt").write_text("no data")
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    pl.DataFrame(rows[:1]).write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet")
    write_jsonl(tmp_path / "set" / "train-00001-of-00002.jsonl", rows[1:])
    write_jsonl(tmp_path / "set" / "more" / "test.jsonl", ROWS[2:5])
    return tmp_path / "set"


def test_a_folder_gives_the_split_that_its_files_name(folder: Path) -> None:
    assert pairs(folder) == PAIRS[:2]
    assert pairs(folder, split="test") == PAIRS[2:5]
    assert pairs(folder / "more", split="test") == PAIRS[2:5]
    message = refusal(folder, split="validation")
    assert f"the folder {folder} has the splits test, train, by the names of its files" in message
    assert 'data.split is "validation"; set it to one of them' in message


def test_a_folder_whose_files_name_no_split_is_read_whole(tmp_path: Path) -> None:
    for number in range(3):
        write_jsonl(tmp_path / "set" / f"part-{number}.jsonl", ROWS[number : number + 1])
    assert pairs(tmp_path / "set") == PAIRS[:3]
    assert "names no splits, by the names of its files, and data.split" in refusal(
        tmp_path / "set", split="test"
    )
    (tmp_path / "empty").mkdir()
    assert f"the folder {tmp_path / 'empty'} holds no data file (.jsonl, " in refusal(tmp_path / "empty")


def test_several_files_and_patterns_are_read_in_order(folder: Path) -> None:
    pattern = str(folder / "train-*")
    test = str(folder / "more" / "test.jsonl")
    assert pairs(pattern) == pairs(str(folder / "*.[jp]*[lt]")) == PAIRS[:2]
    assert pairs([test, pattern]) == [*PAIRS[2:5], *PAIRS[:2]]
    assert pairs(str(folder / "**" / "*t.jsonl")) == PAIRS[2:5]


def test_a_bad_row_of_several_files_is_named_by_its_file(folder: Path) -> None:
    bad = write_jsonl(folder / "train-9.jsonl", [ROWS[3], {"prompt": "x", "answer": None}])
    message = refusal(str(folder / "train-*"))
    assert message.startswith(f"{bad}, row 2: answer is missing; correct the row, or set data.prompt_field")
    good = write_jsonl(folder / "good.jsonl", [{"problem": "x", "solution": "\\boxed{1}"}] * 2)
    bad = write_jsonl(folder / "bad.jsonl", [{"problem": "x", "solution": "\\boxed{}"}])
    message = refusal([str(good), str(bad)], "math")
    assert (
        f"1 of 3 reference answers of {good}, {bad} cannot be used by the grader: {bad}, row 1: " in message
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none.jsonl", "there is no data file none.jsonl; check data.path"),
        ("none.JSONL.gz", "there is no data file none.JSONL.gz; check data.path"),
        ("./none", "there is no data file or folder none; check data.path"),
        ("/none/data", "there is no data file or folder /none/data; check data.path"),
        ("none/*.jsonl", "no file matches none/*.jsonl; check data.path"),
        (["none.jsonl", "x"], "there is no data file none.jsonl; check data.path"),
        (
            "data.txt",
            "data.txt is of no kind of data file that is known (.jsonl, .json, .parquet, .csv, .tsv,",
        ),
        ("data.*", "data.txt is of no kind of data file that is known"),
    ],
)
def test_a_path_that_means_no_file_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, expected: str
) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text(LINES)
    assert refusal(path).startswith(expected)


def test_what_the_hub_does_not_have_may_be_a_path_with_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no data/train\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refusal("data/train").startswith(
        "cannot load the data set data/train (train) from the hub, and there is no such file or folder here: no "
        "data/train; for a local file give a data.path that ends in .jsonl, .json,"
    )


def test_a_clone_of_a_hub_data_set_is_left_to_the_library_that_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def load(path: str, name: str | None, split: str) -> Any:
        asked.append((path, name, split))
        return datasets.Dataset.from_dict({"prompt": ["x"], "answer": ["1"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    folder = str(tmp_path / "set")
    assert pairs(folder, format="generic", name="main") == [("x", "1")]
    assert pairs(folder, format="generic", split="train[:1]") == [("x", "1")]
    assert pairs(folder, format="generic") == PAIRS
    (tmp_path / "set" / "README.md").write_text("---\nconfigs: []\n---\n")
    assert pairs(folder, format="generic") == [("x", "1")]
    assert asked == [(folder, "main", "train"), (folder, None, "train[:1]"), (folder, None, "train")]


def test_a_data_set_of_the_hub_is_recognised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {
        "data_source": ["x"] * 2,
        "prompt": [[{"role": "user", "content": text}] for text in ("a", "b")],
        "reward_model": [{"ground_truth": "1", "style": "rule"}, {"ground_truth": "2", "style": "rule"}],
    }
    found = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    assert pairs("owner/data of the hub") == [("a", "1"), ("b", "2")]


def test_null_rows_obey_bad_golds_and_are_counted(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"prompt": None, "answer": "1"},
        {"prompt": "x", "answer": None},
        {"prompt": " ", "answer": "1"},
        {"prompt": "x", "answer": float("nan")},
        {"prompt": "x", "answer": True},
        {"answer": "1"},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS[:2], *bad, *ROWS[2:]])
    assert refusal(path) == (
        f"{path}, row 3: prompt is missing; correct the row, or set data.prompt_field and data.answer_field, "
        'or data.bad_golds = "drop"'
    )
    config = auto(str(path), bad_golds="drop")
    found = read_data_set(config.data, config)
    assert (found.pairs, found.dropped) == (PAIRS, len(bad))
    path = write_jsonl(tmp_path / "bad.jsonl", bad[1:5])
    assert refusal(path, bad_golds="drop") == (
        f"{path}, row 1: answer is missing; correct the row, or set data.prompt_field and data.answer_field"
    )


def test_a_parquet_file_with_nulls_drops_them(tmp_path: Path) -> None:
    frame = pl.DataFrame({"prompt": ["x", None, "y"], "answer": [1.5, 2.0, None]})
    frame.write_parquet(tmp_path / "data.parquet")
    assert pairs(tmp_path / "data.parquet", bad_golds="drop") == [("x", "1.5")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"path": ["a.jsonl"], "split": "test"},
            "split = 'test' would have no effect: a.jsonl is a local file",
        ),
        ({"path": "a/*.gz", "name": "main"}, "name = 'main' would have no effect: a/\\*.gz is a local file"),
        ({"path": "A.JSONL.ZST", "split": "test"}, "split = 'test' would have no effect"),
        ({"path": []}, "path should not be empty; give a .jsonl, .json, .parquet, .csv file"),
        ({"path": ["a.jsonl", ""]}, "path should not be empty"),
    ],
)
def test_settings_of_files_that_would_have_no_effect_are_refused(
    settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        auto(settings.pop("path"), **settings)


def test_held_out_files_are_read_by_the_same_code_before_a_model_loads(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "set" / "test.jsonl", [*ROWS[:2], {"prompt": "x", "answer": None}])
    evaluate = {"data": {"path": str(tmp_path / "set"), "split": "test", "max_prompt_tokens": 64}}
    config = tiny_config(tiny_model, write_jsonl(tmp_path / "train.jsonl", ROWS), evaluate=evaluate)
    assert config.held_out is not None
    expected = r"test\.jsonl, row 3: answer is missing; .* set evaluate\.data\.prompt_field"
    with pytest.raises(UserError, match=expected):
        refuse_first(config, tiny_model)
    with pytest.raises(UserError, match=expected):
        load_prompts(config.held_out, config, PromptRenderer(tiny_model, config.held_out))
