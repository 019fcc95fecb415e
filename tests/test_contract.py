"""The contract machine by itself, with a table that has nothing to do with V̂*."""

import errno
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.contract import Constant, Contract, Unique
from common.errors import DamagedFile, UserError
from common.provenance import METADATA_KEY, Provenance

FRUIT = Contract(
    schema=pa.schema(
        [
            pa.field("tree", pa.string(), nullable=False),
            pa.field("place", pa.int32(), nullable=False),
            pa.field("grams", pa.float64(), nullable=False),
            pa.field("year", pa.int32(), nullable=False),
            pa.field("note", pa.string()),
        ]
    ),
    invariants={
        "a fruit is weighed once": Unique(["tree", "place"]),
        "fruit weighs something": pl.col("grams") > 0,
        "all fruit is of one year": Constant("year"),
    },
    version=2,
    migrations={1: lambda document: document | {"context": document["context"] | {"from": "version 1"}}},
    remedy="pick fruit",
)
PROVENANCE = Provenance(identity={"garden": "north"}, context={"ladder": True})


def fruit(**changes: list[object]) -> pl.DataFrame:
    columns: dict[str, list[object]] = {
        "tree": ["apple", "apple", "pear"],
        "place": [1, 2, 1],
        "grams": [150.0, 120.0, 200.0],
        "year": [2024] * 3,
        "note": [None, "ripe", None],
    }
    return pl.DataFrame(columns | changes).cast({"place": pl.Int32, "year": pl.Int32})


@pytest.fixture(params=[65_536, 2, 1], ids="{} at a time".format, autouse=True)
def batch_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("common.contract.BATCH_ROWS", request.param)
    rows = request.param
    assert isinstance(rows, int)
    return rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    FRUIT.write(fruit(), PROVENANCE, tmp_path / "fruit.parquet")
    return tmp_path / "fruit.parquet"


def write_unchecked(rows: pl.DataFrame, path: Path, version: int = 2) -> None:
    table = rows.to_arrow().replace_schema_metadata(PROVENANCE.metadata(version))
    pq.write_table(table, path)


def refusal(path: Path) -> str:
    """What both ways of reading say."""
    with pytest.raises(UserError) as whole:
        FRUIT.read(path)
    with pytest.raises(UserError) as streamed:
        list(FRUIT.scan(path))
    assert str(whole.value) == str(streamed.value)
    return str(whole.value)


def test_what_is_written_is_read_back_whole_and_in_parts(path: Path, batch_rows: int) -> None:
    rows, provenance = FRUIT.read(path)
    assert rows.equals(fruit())
    assert provenance == PROVENANCE
    parts = list(FRUIT.scan(path))
    assert [part.height for part in parts] == [min(batch_rows, 3 - at) for at in range(0, 3, batch_rows)]
    assert pl.concat(parts).equals(rows)


def test_some_columns_are_read_and_only_rules_about_these_are_checked(path: Path) -> None:
    write_unchecked(fruit(grams=[1.0, -1.0, 1.0]), path)
    assert pl.concat(FRUIT.scan(path, ["place", "note"])).equals(fruit().select("place", "note"))
    with pytest.raises(
        UserError, match=r"1 rows break the rule “fruit weighs something”, the first is \{'grams': -1\.0\}"
    ):
        list(FRUIT.scan(path, ["grams"]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"place": [1, 1, 1]},
            "2 rows break the rule “a fruit is weighed once”, the first is {'tree': 'apple', 'place': 1}",
        ),
        (
            {"grams": [1.0, 0.0, -1.0]},
            "2 rows break the rule “fruit weighs something”, the first is "
            "{'tree': 'apple', 'place': 2, 'grams': 0.0}",
        ),
        (
            {"year": [2024, 2023, 2024]},
            "1 rows break the rule “all fruit is of one year”, the first is "
            "{'tree': 'apple', 'place': 2, 'year': 2023}",
        ),
        (
            {"grams": [1.0, 2.0, None]},
            "1 rows break the rule “grams is present”, the first is "
            "{'tree': 'pear', 'place': 1, 'grams': None}",
        ),
    ],
)
def test_a_broken_row_is_named_with_its_key_and_is_not_written(
    path: Path, broken: dict[str, list[object]], message: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        FRUIT.write(fruit(**broken), PROVENANCE, path)
    assert str(caught.value) == f"{path}: {message}"
    assert path.read_bytes() == before
    write_unchecked(fruit(**broken), path)
    assert refusal(path) == f"{path}: {message}"


def test_rows_that_change_are_checked_again_while_they_are_written_in_place(path: Path) -> None:
    with FRUIT.writer(path, PROVENANCE, changed=["grams"]) as write:
        for rows in FRUIT.scan(path):
            write(rows.with_columns(pl.col("grams") * 2))
    assert FRUIT.read(path)[0].equals(fruit(grams=[300.0, 240.0, 400.0]))
    before = path.read_bytes()

    def double_the_weight_and_lose_it() -> None:
        with FRUIT.writer(path, PROVENANCE, changed=["grams"]) as write:
            for rows in FRUIT.scan(path):
                write(rows.with_columns(pl.col("grams") * 0))

    with pytest.raises(UserError, match="3 rows break the rule “fruit weighs something”"):
        double_the_weight_and_lose_it()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_table_that_is_new_is_checked_by_all_rules_while_it_is_written(tmp_path: Path) -> None:
    def write(rows: pl.DataFrame) -> None:
        with FRUIT.writer(tmp_path / "new.parquet", PROVENANCE) as write:
            write(rows)

    write(fruit())
    assert FRUIT.read(tmp_path / "new.parquet")[0].equals(fruit())
    with pytest.raises(UserError, match="“all fruit is of one year”"):
        write(fruit(year=[2024, 2024, 2023]))


def test_a_file_in_the_old_form_and_in_todays_hold_the_same(tmp_path: Path) -> None:
    ids = pa.list_(pa.field("item", pa.int32(), nullable=False))
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("texts", pa.list_(pa.string()), nullable=False),
            pa.field("numbers", pa.list_(pa.float64())),
            pa.field("ids", ids, nullable=False),
            pa.field("lists", pa.list_(ids), nullable=False),
            pa.field("flag", pa.bool_()),
        ]
    )
    nested = replace(FRUIT, schema=schema, invariants={"a key appears once": Unique(["key"])})
    rows = {
        "key": ["a", "b" * 200, ""],
        "texts": [["x", None, "y" * 100], [], [""]],
        "numbers": [None, [1.5, float("nan"), None], []],
        "ids": [[1, 2], [], [3]],
        "lists": [[[1], []], [], [[2, 3]]],
        "flag": [True, None, False],
    }
    table = pa.table(rows, schema=nested.stamped(PROVENANCE))
    pq.write_table(table, tmp_path / "old.parquet", compression="zstd")
    with nested.writer(tmp_path / "new.parquet", PROVENANCE) as write:
        for part in nested.scan(tmp_path / "old.parquet"):
            write(part)
    old, new = (pq.read_table(tmp_path / name) for name in ("old.parquet", "new.parquet"))
    assert new.schema.equals(old.schema, check_metadata=True)
    assert pl.DataFrame(new).equals(pl.DataFrame(old))
    assert nested.read(tmp_path / "new.parquet")[0].equals(nested.read(tmp_path / "old.parquet")[0])


def test_a_file_that_is_replaced_while_it_is_scanned_is_read_to_its_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.contract.BATCH_ROWS", 1)
    parts = FRUIT.scan(path)
    read = [next(parts)]
    FRUIT.write(fruit(grams=[1.0, 1.0, 1.0]), PROVENANCE, path)
    assert pl.concat([*read, *parts]).equals(fruit())


def test_an_error_of_the_writing_thread_is_one_line_and_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    before = path.read_bytes()

    def double_the_weight() -> None:
        with FRUIT.writer(path, PROVENANCE, changed=["grams"]) as write:
            for rows in FRUIT.scan(path):
                write(rows.with_columns(pl.col("grams") * 2))

    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        double_the_weight()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_older_version_is_brought_to_todays_and_lacks_what_came_later(path: Path) -> None:
    write_unchecked(fruit().drop("note"), path, version=1)
    rows, provenance = FRUIT.read(path)
    assert rows.equals(fruit(note=[None] * 3).cast({"note": pl.String}))
    assert provenance.context == {"ladder": True, "from": "version 1"}
    assert pl.concat(FRUIT.scan(path)).equals(rows)


def test_the_remedy_is_the_contracts_own(path: Path) -> None:
    assert refusal(path.with_name("none")) == f"there is no {path.parent}/none; make it with `pick fruit`"
    write_unchecked(fruit().drop("grams"), path)
    assert refusal(path) == f"{path} lacks the columns grams; make it again with `pick fruit`"
    write_unchecked(fruit().cast({"grams": pl.Int64}), path)
    assert "column grams holds Int64, not Float64; make it again with `pick fruit`" in refusal(path)
    write_unchecked(fruit().clear(), path)
    assert refusal(path) == f"{path} has no rows; make it again with `pick fruit`"
    write_unchecked(fruit(), path, version=3)
    assert "has format version 3, made by a newer checkout; this one reads 1 to 2" in refusal(path)
    fruit().write_parquet(path)
    assert refusal(path) == f"{path} carries no provenance; make it again with `pick fruit`"


def test_a_table_of_another_kind_has_no_provenance_here_whatever_its_version(path: Path) -> None:
    write_unchecked(fruit().drop("grams"), path, version=9)
    with pytest.raises(UserError, match=r"lacks the columns grams; make it again with `pick fruit`"):
        FRUIT.provenance(path)


def test_a_damaged_file_is_named_with_the_remedy(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    for read in (lambda: FRUIT.read(path), lambda: list(FRUIT.scan(path))):
        with pytest.raises(DamagedFile, match="remove it and make it again with `pick fruit`"):
            read()


def test_a_table_without_rows_is_whole_where_the_contract_says_so(path: Path) -> None:
    lenient = replace(FRUIT, may_be_empty=True)
    lenient.write(fruit().clear(), PROVENANCE, path)
    assert lenient.read(path)[0].equals(fruit().clear())
    assert list(lenient.scan(path)) == []


def test_the_version_that_is_written_is_the_contracts(path: Path) -> None:
    assert b'"schema_version": 2' in pq.read_schema(path).metadata[METADATA_KEY]
    with pytest.raises(AssertionError, match="every older version can be read"):
        replace(FRUIT, version=3)
