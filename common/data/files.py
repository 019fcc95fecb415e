"""Finds the data files that a path names, and reads each kind of file as rows.

A row is a dict with one cell per column. Errors name the file, and the line or row.
"""

import csv
import glob
import io
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa

from common.config import COMPRESSED, LOCAL_FILES, DataConfig, data_suffix
from common.data.cells import number_of, rows_of
from common.errors import UserError, first_line
from common.remote.copies import given
from common.remote.places import url_of

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in file names that name a split, and the split."""

NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the `datasets` library writes beside data files."""

Row = dict[str, Any]


def local_files(data: DataConfig) -> list[Path] | None:
    """The files that data.path names; None if the `datasets` library has to load the data set.

    Raises UserError if no file is found.
    """
    if not isinstance(data.path, str):
        return [file for path in data.path for file in _files_at(path, data)]
    folder = given(data.path).expanduser()
    if folder.is_dir():
        is_clone = data.name is not None or not data.split.isalpha() or (folder / "README.md").is_file()
        return None if is_clone else _files_in(folder, data)
    looks_local = data.is_file or folder.exists() or url_of(folder) or data.path.startswith((".", "/", "~"))
    return _files_at(data.path, data) if looks_local else None


def _files_at(path: str, data: DataConfig) -> list[Path]:
    place = given(path).expanduser()
    if place.is_dir():
        return _files_in(place, data)
    if place.is_file():
        files = [place]
    elif files := sorted(map(Path, glob.glob(str(place), recursive=True))):
        files = [file for file in files if file.is_file()]
    if not files:
        kind = "no file matches" if glob.has_magic(path) else "there is no data file"
        folder = "" if data_suffix(path) else " or folder"
        raise UserError(f"{kind}{folder} {place}; check {data.section}.path")
    for file in files:
        if data_suffix(file.name) not in LOCAL_FILES:
            raise UserError(
                f"{file} is of no kind of data file that is known ({', '.join(LOCAL_FILES)}; "
                f"compressed: {', '.join(COMPRESSED)}); give its name such an ending, or correct {data.section}.path"
            )
    return files


def _files_in(folder: Path, data: DataConfig) -> list[Path]:
    """The data files of a folder; if their names contain splits, only those of data.split."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and data_suffix(file.name) in LOCAL_FILES and file.name not in NO_DATA
    )
    if not files:
        raise UserError(
            f"the folder {folder} holds no data file ({', '.join(LOCAL_FILES)}); check {data.section}.path"
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.findall("[a-z]+", str(file.relative_to(folder)).lower())
        for split in {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}:
            by_split.setdefault(split, []).append(file)
    wanted = SPLIT_WORDS.get(data.split, data.split)
    if not by_split and wanted == "train":
        return files
    if wanted not in by_split:
        found = f"has the splits {', '.join(sorted(by_split))}" if by_split else "names no splits"
        raise UserError(
            f"the folder {folder} {found}, by the names of its files, and {data.section}.split is "
            f'"{data.split}"; set it to one of them, or give the files that you mean as {data.section}.path'
        )
    return by_split[wanted]


def rows_in(file: Path, most: int | None = None) -> list[Row]:
    """The rows of a data file, or its first `most`. Raises UserError if it cannot be read, naming file and line."""
    try:
        return _READERS[data_suffix(file.name)](file, most)
    except (ValueError, TypeError, RecursionError, OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


def _opened(file: Path) -> IO[bytes]:
    """A file's bytes, decompressed."""
    if file.suffix.lower() not in COMPRESSED:
        return file.open("rb")
    with pa.input_stream(str(file), compression=COMPRESSED[file.suffix.lower()]) as stream:
        return io.BytesIO(stream.read())


def _parquet(file: Path, most: int | None) -> list[Row]:
    if file.suffix.lower() not in COMPRESSED:
        return rows_of(pl.read_parquet(file, glob=False, n_rows=most))
    return rows_of(pl.read_parquet(_opened(file), n_rows=most))


def _arrow(file: Path, most: int | None) -> list[Row]:
    """An Arrow IPC stream, as `datasets` saves it, or an Arrow IPC file."""
    with _opened(file) as opened:
        content = opened.read()
    read = pa.ipc.open_file if content.startswith(b"ARROW1") else pa.ipc.open_stream
    frame = pl.from_arrow(read(content).read_all().slice(0, most))
    assert isinstance(frame, pl.DataFrame)
    return rows_of(frame)


def _table(file: Path, most: int | None) -> list[Row]:
    """A .csv or .tsv file whose first line names the columns. Cells are texts; an empty cell is missing."""
    csv.field_size_limit(sys.maxsize)
    with _opened(file) as opened:
        content = opened.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8: {error.reason}") from error
    delimiter = "\t" if data_suffix(file.name) == ".tsv" else ","
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = next(lines, [])
        if len(set(columns)) < len(columns):
            raise ValueError("two of its columns have the same name")
        return list(islice(_table_rows(lines, columns), most))
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num} is no row: {error}") from error


def _table_rows(lines: Any, columns: list[str]) -> Iterator[Row]:
    for cells in lines:
        if cells and len(cells) != len(columns):
            raise ValueError(f"line {lines.line_num} has {len(cells)} cells, the first line {len(columns)}")
        if cells:
            yield {column: cell or None for column, cell in zip(columns, cells, strict=True)}


def _json_lines(file: Path, most: int | None) -> list[Row]:
    with _opened(file) as opened:
        return list(islice(_rows_of_lines(opened), most))


def _rows_of_lines(lines: Any) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line, parse_float=number_of)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {_problem(error)}") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON: {error}") from error
            yield _row(row, f"line {number}")


def _problem(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return f"a second value begins at character {error.pos + 1}; put each row on a line of its own"
    return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"


def _json(file: Path, most: int | None) -> list[Row]:
    """A list of objects, an object of columns, or one object per line."""
    with _opened(file) as opened:
        content = opened.read()
    try:
        rows = json.loads(content, parse_float=number_of)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return list(islice(_rows_of_lines(io.BytesIO(content)), most))
        raise ValueError(
            f"line {error.lineno} is no JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from error
    if isinstance(rows, dict):
        rows = _rows_of_columns(rows)
    if not isinstance(rows, list):
        raise TypeError(f"it holds a {type(rows).__name__}, not a list of objects")
    return [_row(row, f"row {number}") for number, row in enumerate(rows[:most], start=1)]


def _rows_of_columns(columns: dict[str, Any]) -> list[Row]:
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        keys = ", ".join(list(columns)[:8])
        raise ValueError(
            f"it holds one object, with {keys or 'nothing'}, not a list of objects; write a list of rows, "
            "one row per line, or a list of equal length per column"
        )
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _row(row: Any, place: str) -> Row:
    """A row as a dict. A list of turns, as in ORZ's files, becomes a dict with the keys 0, 1 and so on."""
    if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
        return {str(number): turn for number, turn in enumerate(row)}
    if not isinstance(row, dict):
        raise TypeError(f"{place} is a {type(row).__name__}, not an object with a prompt and an answer")
    return row


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".pq": _parquet,
    ".csv": _table,
    ".tsv": _table,
    ".arrow": _arrow,
}
