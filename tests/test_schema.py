"""The contract between the stages: written files can be read by anyone, broken rules are named."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import DamagedFile, UserError
from common.provenance import METADATA_KEY, SCHEMA_VERSION, Provenance
from common.vstar_file import (
    ESTIMATORS,
    VSTAR,
    read_vstar,
    scan_vstar,
    vstar_writer,
    write_vstar,
)
from tests.fakes import CONTEXT, IDENTITY, write_artifact

OUTCOMES = {
    "p1": ["correct", "wrong", "unparsed"],
    "p2": ["truncated", "wrong", "wrong"],
    "p3": ["correct"] * 3,
}
PROVENANCE = Provenance(identity=IDENTITY, context=CONTEXT)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "vstar.parquet", OUTCOMES)


def rewrite(path: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Break an artifact as another tool could: past the writer's checks, with the provenance kept."""
    table = change(pl.read_parquet(path)).to_arrow()
    pq.write_table(table.replace_schema_metadata(pq.read_schema(path).metadata), path)


@pytest.fixture(params=[65_536, 2, 1], ids="{} at a time".format)
def batch_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many prompts a table is streamed in; the file has 3."""
    rows = request.param
    assert isinstance(rows, int)
    monkeypatch.setattr("common.contract.BATCH_ROWS", rows)
    return rows


def refusal(path: Path) -> str:
    """What both ways of reading say of a broken file."""
    with pytest.raises(UserError) as whole:
        read_vstar(path)
    with pytest.raises(UserError) as streamed:
        list(scan_vstar(path))
    assert type(whole.value) is type(streamed.value)
    if not isinstance(whole.value, DamagedFile):  # which each library describes in its own words
        assert str(whole.value) == str(streamed.value)
    return str(whole.value)


def test_what_is_written_is_read_back(artifact: Path) -> None:
    rows, provenance = read_vstar(artifact)
    assert rows.columns == VSTAR.names
    assert rows["rewards"].to_list() == [[1.0, 0.0, 0.0], [0.0] * 3, [1.0] * 3]
    assert rows["outcomes"].to_list() == list(OUTCOMES.values())
    assert rows["completion_tokens"].to_list() == [[3, 4, 5]] * 3
    assert rows["pass_rate"].to_list() == [1 / 3, 0.0, 1.0]
    assert rows["pass_at_n"].to_list() == [True, False, True]
    assert provenance == PROVENANCE


def test_the_file_opens_in_polars_duckdb_and_pandas_with_the_same_columns_and_values(artifact: Path) -> None:
    by_polars = pl.read_parquet(artifact)
    by_pandas = pd.read_parquet(artifact)
    with duckdb.connect() as database:
        by_duckdb = database.execute("select * from read_parquet(?)", [str(artifact)]).fetchall()
        columns = [name for name, *_ in database.description or ()]
        query = "select list_avg(rewards) = pass_rate from read_parquet(?) where pass_at_n"
        rates = database.execute(query, [str(artifact)]).fetchall()
    assert by_polars.columns == columns == list(by_pandas.columns) == VSTAR.names
    assert by_duckdb == by_polars.rows()
    assert rates == [(True,), (True,)]
    missing = {"vstar_se", "dropped_by"}  # which pandas has another word for
    plain = [name for name, kind in by_polars.schema.items() if not kind.is_nested() and name not in missing]
    assert list(by_pandas[plain].itertuples(index=False, name=None)) == by_polars.select(plain).rows()
    assert [list(rewards) for rewards in by_pandas["rewards"]] == by_polars["rewards"].to_list()


BROKEN: dict[str, pl.Expr] = {
    "a prompt appears once": pl.lit("p1").alias("prompt_id"),
    "prompt is present": pl.lit(None, pl.String).alias("prompt"),
    "num_samples counts the rewards": pl.col("rewards").list.head(2),
    "num_samples counts the outcomes": pl.col("outcomes").list.head(2),
    "num_samples counts the lengths": pl.col("completion_tokens").list.head(2),
    "pass_rate is the share of correct outcomes": pl.lit(0.5).alias("pass_rate"),
    "pass_at_n says whether any sample is correct": (~pl.col("pass_at_n")).alias("pass_at_n"),
    "beta1 is a number and not negative": pl.lit(-1.0).alias("beta1"),
    "vstar lies between the mean and the best reward": (pl.col("vstar") + 0.6).alias("vstar"),
    "vstar_se is missing or not negative": pl.lit(-0.1).alias("vstar_se"),
    "keep is present": pl.lit(None, pl.Boolean).alias("keep"),
    "no rule dropped a prompt that is kept": pl.lit("all correct").alias("dropped_by"),
}


@pytest.mark.usefixtures("batch_rows")
@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_row_is_named_with_the_rule_that_it_breaks(artifact: Path, rule: str) -> None:
    name = BROKEN[rule].meta.output_name()
    second = pl.when(pl.col("prompt_id") == "p2").then(BROKEN[rule]).otherwise(pl.col(name))
    rewrite(artifact, lambda rows: rows.with_columns(second.alias(name)))
    message = refusal(artifact)
    assert f"break the rule “{rule}”" in message
    assert str(artifact) in message
    assert ("'prompt_id': 'p1'" if rule == "a prompt appears once" else "'prompt_id': 'p2'") in message


@pytest.mark.usefixtures("batch_rows")
@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("rewards", [0.0, None, 0.0], "rewards are finite"),
        ("rewards", [0.0, float("nan"), 0.0], "rewards are finite"),
        ("rewards", [0.0, float("inf"), 0.0], "rewards are finite"),
        ("outcomes", ["wrong", "guessed", "wrong"], "outcomes are known"),
        ("outcomes", ["wrong", None, "wrong"], "outcomes are known"),
        ("beta1", float("nan"), "beta1 is a number and not negative"),
        ("beta1", 0.25, "beta1 is the same for every prompt"),
        ("vstar", float("nan"), "vstar lies between the mean and the best reward"),
        ("vstar", None, "vstar is present"),
        ("vstar_se", float("nan"), "vstar_se is missing or not negative"),
        ("pass_rate", float("nan"), "pass_rate is the share of correct outcomes"),
    ],
)
def test_a_value_that_no_reader_expects_is_refused(
    artifact: Path, column: str, value: Any, rule: str
) -> None:
    def change(rows: pl.DataFrame) -> pl.DataFrame:
        values = rows[column].to_list()
        values[1] = value
        return rows.with_columns(pl.Series(column, values, dtype=rows.schema[column]))

    rewrite(artifact, change)
    message = refusal(artifact)
    assert f"1 rows break the rule “{rule}”" in message
    assert "'prompt_id': 'p2'" in message


def test_a_prompt_without_samples_is_refused(artifact: Path) -> None:
    empty = [pl.col(name).list.head(0) for name in ("rewards", "outcomes", "completion_tokens")]
    rewrite(artifact, lambda rows: rows.with_columns(pl.lit(0, pl.Int32).alias("num_samples"), *empty))
    assert "“there is at least one sample”" in refusal(artifact)


def test_a_missing_column_a_wrong_type_and_no_rows_are_named(artifact: Path) -> None:
    whole = artifact.read_bytes()
    rewrite(artifact, lambda rows: rows.drop("vstar", "keep"))
    assert "lacks the columns vstar, keep" in refusal(artifact)
    artifact.write_bytes(whole)
    rewrite(artifact, lambda rows: rows.with_columns(pl.col("vstar").cast(pl.String)))
    assert "column vstar holds String, not Float64" in refusal(artifact)
    artifact.write_bytes(whole)
    rewrite(artifact, lambda rows: rows.clear())
    assert "has no rows" in refusal(artifact)


def test_the_writer_refuses_a_broken_row_and_leaves_the_old_file(artifact: Path) -> None:
    before = artifact.read_bytes()
    rows = pl.read_parquet(artifact).with_columns(pl.col("vstar") - 1.0)
    with pytest.raises(UserError, match="“vstar lies between the mean and the best reward”"):
        write_vstar(rows, PROVENANCE, artifact)
    assert artifact.read_bytes() == before
    assert list(artifact.parent.iterdir()) == [artifact]


def test_a_table_is_streamed_as_it_is_read(artifact: Path, batch_rows: int) -> None:
    parts = list(scan_vstar(artifact))
    assert [part.height for part in parts] == [min(batch_rows, 3 - at) for at in range(0, 3, batch_rows)]
    assert pl.concat(parts).equals(read_vstar(artifact)[0])
    some = pl.concat(scan_vstar(artifact, ["prompt_id", "rewards"]))
    assert some.equals(read_vstar(artifact)[0].select("prompt_id", "rewards"))


def test_a_broken_row_is_not_handed_out_and_the_others_are(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.contract.BATCH_ROWS", 1)
    rewrite(artifact, lambda rows: rows.with_columns(pl.col("vstar") - pl.Series([0.0, 1.0, 1.0])))
    parts = scan_vstar(artifact)
    assert next(parts)["prompt_id"].to_list() == ["p1"]
    with pytest.raises(UserError, match=r"2 rows break the rule “vstar lies between.*'prompt_id': 'p2'"):
        next(parts)


def test_prompts_whose_hashes_agree_are_told_apart(
    artifact: Path, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Series, "hash", lambda ids: ids.str.len_chars().cast(pl.UInt64))
    assert sum(part.height for part in scan_vstar(artifact)) == 3
    twice = pl.Series("prompt_id", ["p1", "p2", "p1"])
    rewrite(artifact, lambda rows: rows.with_columns(twice))
    assert "2 rows break the rule “a prompt appears once”, the first is {'prompt_id': 'p1'}" in refusal(
        artifact
    )


def test_what_is_written_in_parts_is_the_same_table(artifact: Path, tmp_path: Path, batch_rows: int) -> None:
    rows = read_vstar(artifact)[0].with_columns(vstar_se=pl.lit(0.5))
    with vstar_writer(tmp_path / "new.parquet", PROVENANCE, changed=["vstar_se"]) as write:
        for first in range(0, 3, batch_rows):
            write(rows[first : first + batch_rows])
    assert read_vstar(tmp_path / "new.parquet")[0].equals(rows)
    assert pq.read_schema(tmp_path / "new.parquet").equals(pq.read_schema(artifact), check_metadata=True)


def test_what_has_been_read_and_written_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.contract.BATCH_ROWS", 500)
    rows = pl.concat([read_vstar(write_artifact(tmp_path / "small.parquet", OUTCOMES))[0][:1]] * 500)
    source, output, parts = tmp_path / "large.parquet", tmp_path / "new.parquet", 40
    with vstar_writer(source, PROVENANCE, changed=["prompt_id", "prompt"]) as write:
        for part in range(parts):
            ids = pl.Series([f"{part}-{row}" for row in range(500)])
            texts = pl.Series([random.randbytes(2000).hex() for _ in range(500)])
            write(rows.with_columns(prompt_id=ids, prompt=texts))
    before, held = pa.total_allocated_bytes(), []
    with vstar_writer(output, PROVENANCE, changed=["vstar"]) as write:
        for each in scan_vstar(source):
            write(each)
            held.append(pa.total_allocated_bytes() - before)
    assert len(held) == parts
    # How much is held depends on how far the writing thread is behind; all of it would be the file's size and more.
    assert max(held) < source.stat().st_size / 2


def test_a_part_that_breaks_a_rule_leaves_the_old_file(artifact: Path) -> None:
    before = artifact.read_bytes()
    rows = read_vstar(artifact)[0]

    def write_both() -> None:
        with vstar_writer(artifact, PROVENANCE, changed=["keep", "dropped_by"]) as write:
            write(rows)
            write(rows.with_columns(dropped_by=pl.lit("a rule")))

    with pytest.raises(UserError, match="3 rows break the rule “no rule dropped a prompt that is kept”"):
        write_both()
    assert artifact.read_bytes() == before
    assert list(artifact.parent.iterdir()) == [artifact]


def test_each_estimator_promises_a_range(artifact: Path) -> None:
    rows = read_vstar(artifact)[0]
    pulled = rows.with_columns(vstar=pl.Series([0.5, 0.2, 0.9]))
    by = {name: Provenance(identity=IDENTITY, context={"estimator": name}) for name in ESTIMATORS}
    write_vstar(pulled, by["beta_binomial"], artifact)
    assert read_vstar(artifact)[0]["vstar"].to_list() == [0.5, 0.2, 0.9]
    for name in ("plugin", "jackknife"):
        with pytest.raises(
            UserError, match="2 rows break the rule “vstar lies between the mean and the best"
        ):
            write_vstar(pulled, by[name], artifact)
    with pytest.raises(UserError, match="1 rows break the rule “vstar lies between 0 and 1”"):
        write_vstar(rows.with_columns(vstar=pl.Series([0.5, 0.0, 1.1])), by["beta_binomial"], artifact)


@pytest.mark.parametrize("beta1", [0.0, 1e-6, 0.5, 1e6, float("inf")])
def test_rewards_of_any_size_satisfy_the_invariants_under_any_beta1(tmp_path: Path, beta1: float) -> None:
    rewards = {
        "p0": [-1e9 - 1 / 3, -1e9, -1e9 - 0.1],
        "p1": [-1e9, 1e9, 1 / 3],
        "p2": [1e15, 1e15 + 1, 1e15 - 0.5],
        "p3": [0.1, 0.1, 0.1],
    }
    outcomes = {name: ["wrong"] * 3 for name in rewards}
    path = write_artifact(tmp_path / "vstar.parquet", outcomes, beta1=beta1, rewards=rewards)
    assert read_vstar(path)[0]["rewards"].to_list() == list(rewards.values())


def test_a_file_that_is_missing_damaged_or_foreign_is_named_with_what_to_do(artifact: Path) -> None:
    assert "there is no" in refusal(artifact.with_name("none.parquet"))
    assert "python cli.py vstar" in refusal(artifact.with_name("none.parquet"))
    whole = artifact.read_bytes()
    artifact.write_bytes(whole[: len(whole) // 2])
    assert re.search(
        r"is not a readable Parquet file: .*; make it again with `python cli.py vstar`", refusal(artifact)
    )
    damaged = bytearray(whole)
    damaged[4:60] = bytes(56)
    artifact.write_bytes(damaged)
    assert "remove it and make it again with `python cli.py vstar`" in refusal(artifact)
    pl.DataFrame({"prompt_id": ["p"]}).write_parquet(artifact)
    assert "carries no provenance" in refusal(artifact)


def test_another_schema_version_is_refused(artifact: Path) -> None:
    table = pq.read_table(artifact)
    document = json.loads(table.schema.metadata[METADATA_KEY])
    metadata = {METADATA_KEY: json.dumps({**document, "schema_version": SCHEMA_VERSION + 1}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), artifact)
    assert f"has format version {SCHEMA_VERSION + 1}, made by a newer checkout" in refusal(artifact)


def test_another_identity_is_refused_with_each_difference() -> None:
    other = Provenance(
        identity={**IDENTITY, "grader": "math/3", "model": {**IDENTITY["model"], "weights": "x"}}, context={}
    )
    with pytest.raises(UserError) as caught:
        PROVENANCE.refuse_unless_same(other, what="the file", advice="choose another --run")
    message = str(caught.value)
    assert 'grader is "math/3" there and "gsm8k/1" here' in message
    assert 'model.weights is "x" there' in message
    assert message.endswith(
        "choose another --run, or accept it with --allow-mismatch grader --allow-mismatch model.weights"
    )
    PROVENANCE.refuse_unless_same(Provenance(identity=IDENTITY, context={"commit": "c"}), what="", advice="")
