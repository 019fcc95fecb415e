"""The sample store: written samples come back, damaged ones count as missing, those of another identity are refused."""

import errno
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.provenance import Allowance, Provenance, read_provenance
from common.store import (
    SAMPLE_FILES,
    SAMPLES,
    SampleStore,
    add_fragment,
    completion_hash,
    damage,
    original_text,
    set_aside_damaged,
    stored_text,
)
from tests.fakes import CONTEXT, IDENTITY, sample_rows

OUTCOMES = {
    "p1": ["correct", "wrong", "unparsed"],
    "p2": ["truncated", "wrong", "wrong"],
    "p3": ["correct"] * 3,
}
PROVENANCE = Provenance(identity=IDENTITY, context=CONTEXT)
PROMPTS = pl.DataFrame(
    {"prompt_id": list(OUTCOMES), "prompt_token_hash": [f"tokens of {name}" for name in OUTCOMES]}
)


def other(**changes: Any) -> Provenance:
    return Provenance(identity={**IDENTITY, **changes}, context=CONTEXT)


def append(folder: Path, rows: pl.DataFrame, provenance: Provenance = PROVENANCE) -> Path:
    return SampleStore(folder, provenance).append(rows.to_dicts())


def addresses(store: SampleStore) -> set[tuple[str, int]]:
    there = store.present(PROMPTS, 3)
    return {(PROMPTS["prompt_id"][int(place)], int(index)) for place, index in np.argwhere(there)}


def test_the_store_knows_what_is_there_and_reads_it_back(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "samples", PROVENANCE)
    assert not store.present(PROMPTS, 3).any()
    rows = sample_rows(OUTCOMES)
    store.append(rows.head(4).to_dicts())
    assert addresses(store) == {("p1", 0), ("p1", 1), ("p1", 2), ("p2", 0)}
    store.append(rows.tail(5).to_dicts())
    assert store.present(PROMPTS, 3).all()
    assert store.present(PROMPTS.head(1), 2).shape == (1, 2)
    again = SampleStore(tmp_path / "samples", PROVENANCE)
    assert again.read().sort("prompt_id", "sample_index").equals(rows.select(SAMPLES.schema.names))
    assert again.grades(PROMPTS, 2).height == 6
    assert set(again.grades(PROMPTS.head(2), 3)["prompt_id"]) == {"p1", "p2"}
    made_by = [read_provenance(fragment) for fragment in again.fragments()]
    assert [each.identity for each in made_by] == [PROVENANCE.identity] * 2
    assert all(PROVENANCE.context.items() <= each.context.items() for each in made_by)


def test_each_file_says_how_long_its_samples_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 103.0, 107.5, 109.75, 300.0, 304.0])
    monkeypatch.setattr("common.store.time.monotonic", lambda: next(clock))
    rows = sample_rows(OUTCOMES).to_dicts()
    store = SampleStore(tmp_path, PROVENANCE)
    assert store.seconds() == 0
    store.loaded(devices=4)
    store.append(rows[:2])
    store.append(rows[2:5])
    later = SampleStore(tmp_path, PROVENANCE)
    later.append(rows[5:])
    assert later.seconds() == 7.5 + 2.25 + 4.0
    assert later.loading_seconds() == 3.0
    assert later.devices() == 4
    add_fragment(tmp_path, SAMPLE_FILES, sample_rows({"p9": ["wrong"]}).to_dicts(), SAMPLES, PROVENANCE)
    assert later.seconds() is None


def test_samples_of_some_prompts_come_with_this_graders_verdict_where_there_is_one(tmp_path: Path) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    later = SampleStore(tmp_path, other(grader="math/1"))
    judged = completion_hash("#### 1", None)
    verdict = {
        "completion_hash": judged,
        "outcome": "correct",
        "extracted": "7",
        "reward": 1.0,
        "reason": None,
    }
    later.add_grades(
        [{"prompt_id": name, "sample_index": 1, **verdict} for name in ("p1", "p2")],
    )
    columns = [pl.col("prompt_id", "sample_index", "outcome", "extracted", "reward", "reason")]
    found = later.samples_of({"p1", "p3"}, columns).sort("prompt_id", "sample_index")
    assert found.rows() == [
        ("p1", 0, "correct", None, 1.0, None),
        ("p1", 1, "correct", "7", 1.0, None),
        ("p1", 2, "unparsed", None, 0.0, None),
        *(("p3", index, "correct", None, 1.0, None) for index in range(3)),
    ]
    assert SampleStore(tmp_path, PROVENANCE).samples_of({"p1"}, columns)["extracted"].to_list() == [None] * 3


def test_a_file_is_named_for_the_hash_of_its_content(tmp_path: Path) -> None:
    path = append(tmp_path, sample_rows(OUTCOMES))
    assert path.name == f"part-{hashlib.sha256(path.read_bytes()).hexdigest()}.parquet"
    rows = pq.read_table(path).to_pylist()
    assert add_fragment(tmp_path, SAMPLE_FILES, rows, SAMPLES, read_provenance(path)) == path


EVERY_PLANE = "".join(chr(plane * 0x10000 + offset) for plane in range(17) for offset in (0x20, 0x41, 0xFFFD))
TEXTS = {
    "nothing": "",
    "NUL": "a\x00b\x00",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x85\u2028\ufeff",
    "a lone high surrogate": "so \ud800 it is",
    "a lone low surrogate at the end": "so\udfff",
    "surrogates in the wrong order": "\udc00\ud800",
    "a pair as two code points": "\ud83d\ude00",
    "a lone surrogate among emoji": "😀\ud83d😀",
    "replacement characters": "\ufffd?",
    "every plane": EVERY_PLANE,
    "1 MB": "x" * 1_000_000,
    "1 MB of emoji and a surrogate": "🧮" * 250_000 + "\udabc",
    "line ends": "a\r\nb\rc\n",
    "not normalised": "e\u0301 é",
}


def test_any_text_survives_the_round_trip_through_the_file(tmp_path: Path) -> None:
    rows = sample_rows({f"p{number}": ["wrong"] for number in range(len(TEXTS))}).to_dicts()
    for row, text in zip(rows, TEXTS.values(), strict=True):
        row["completion"], row["completion_raw"] = stored_text(text)
    SampleStore(tmp_path, PROVENANCE).append(rows)
    read = SampleStore(tmp_path, PROVENANCE).read()
    found = [original_text(*pair) for pair in read.select("completion", "completion_raw").iter_rows()]
    assert dict(zip(TEXTS, found, strict=True)) == TEXTS
    assert read["completion_raw"].is_null().to_list() == [
        "surrog" not in name and "pair" not in name for name in TEXTS
    ]


def test_prompts_with_one_text_and_two_answers_are_two_prompts(tmp_path: Path) -> None:
    from common.data.prompts import prompt_id

    first, second = prompt_id("How many?", "1"), prompt_id("How many?", "2")
    assert first != second
    rows = sample_rows({first: ["correct"], second: ["wrong"]}).with_columns(
        pl.lit("How many?").alias("prompt"), pl.Series("answer", ["1", "2"])
    )
    store = SampleStore(tmp_path, PROVENANCE)
    store.append(rows.to_dicts())
    assert dict(store.read().select("prompt_id", "answer").iter_rows()) == {first: "1", second: "2"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def corrupt_footer(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(3).randrange(4, len(content) // 2)] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.write_text("not Parquet at all")


@pytest.mark.parametrize("harm", [truncate, empty, corrupt_footer, flip_a_bit, foreign])
def test_a_damaged_file_is_set_aside_and_its_samples_are_missing(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    rows = sample_rows(OUTCOMES)
    broken, _ = append(tmp_path, rows.head(4)), append(tmp_path, rows.tail(5))
    harm(broken)
    content = broken.read_bytes()
    [line] = set_aside_damaged(tmp_path)
    assert line.startswith(f"{broken.name} is damaged (")
    assert (tmp_path / "damaged" / broken.name).read_bytes() == content
    store = SampleStore(tmp_path, PROVENANCE)
    assert addresses(store) == {("p2", 1), ("p2", 2), ("p3", 0), ("p3", 1), ("p3", 2)}
    store.append(rows.head(4).to_dicts())
    assert store.read().sort("prompt_id", "sample_index").equals(rows.select(SAMPLES.schema.names))
    assert set_aside_damaged(tmp_path) == []


@pytest.mark.parametrize("harm", [truncate, empty, corrupt_footer, foreign])
def test_a_damaged_file_of_the_first_format_is_found_too(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = append(tmp_path, sample_rows(OUTCOMES)).rename(tmp_path / f"part-{'0' * 32}.parquet")
    assert damage(path) is None
    harm(path)
    assert damage(path) is not None


def test_leftovers_of_dead_and_old_writers_are_removed_and_those_of_living_ones_are_not(
    tmp_path: Path,
) -> None:
    import platform

    here, now = platform.node(), os.stat(tmp_path).st_mtime
    dead = tmp_path / f".part-0.parquet.{here}.{2**22 + 1}.tmp"
    alive = tmp_path / f".part-1.parquet.{here}.{os.getpid()}.tmp"
    elsewhere = tmp_path / ".part-2.parquet.another-host.7.tmp"
    old = tmp_path / ".part-3.parquet.another-host.8.tmp"
    for file in (dead, alive, elsewhere, old):
        file.write_bytes(b"half")
    os.utime(old, (now - 2 * 24 * 3600, now - 2 * 24 * 3600))
    assert set_aside_damaged(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere])


def test_of_samples_that_are_there_twice_the_first_counts(tmp_path: Path) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    assert SampleStore(tmp_path, PROVENANCE).surplus() == 0
    append(tmp_path, sample_rows({"p2": ["correct"]}))
    store = SampleStore(tmp_path, PROVENANCE)
    assert store.surplus() == 1
    first = pl.concat([pl.read_parquet(path) for path in store.fragments()]).unique(
        ["prompt_id", "sample_index"], keep="first", maintain_order=True
    )
    assert first.height == 9
    assert store.grades(PROMPTS, 3).select("prompt_id", "sample_index", "reward").rows() == (
        first.select("prompt_id", "sample_index", "reward").rows()
    )
    assert store.read().height == 9


def test_a_later_grade_counts_for_the_text_that_it_judged_alone(tmp_path: Path) -> None:
    append(tmp_path, sample_rows({"p1": ["correct", "wrong"]}))
    store = SampleStore(tmp_path, other(grader="math/2"))
    store.add_grades(grade_rows({"p1": ["wrong", "correct"]}))
    assert store.ungraded_count() == 0
    [fragment] = store.fragments()
    redrawn = sample_rows({"p1": ["correct", "wrong"]}).with_columns(
        pl.Series("completion", ["#### 0", "#### another"])
    )
    fragment.unlink()
    append(tmp_path, redrawn)
    store = SampleStore(tmp_path, other(grader="math/2"))
    assert [row["completion"] for frame in store.ungraded() for row in frame.to_dicts()] == ["#### another"]
    assert store.grades(PROMPTS, 3)["sample_index"].to_list() == [0]


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    folder, other_folder = tmp_path / "r[1]", tmp_path / "r1"
    append(folder, sample_rows(OUTCOMES))
    append(other_folder, sample_rows({"p1": ["wrong"]}))
    assert SampleStore(folder, PROVENANCE).present(PROMPTS, 3).all()


@pytest.mark.parametrize("step", ["write", "sync", "rename", "folder"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EBADF])
def test_a_write_that_fails_at_any_point_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    rows = sample_rows(OUTCOMES)
    append(tmp_path, rows.head(4))
    before = sorted(tmp_path.iterdir())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(bytes(content)[:100])
        fail()

    store = SampleStore(tmp_path, PROVENANCE)
    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", half)
        elif step == "sync":
            patch.setattr(os, "fsync", fail)
        elif step == "rename":
            patch.setattr(Path, "replace", fail)
        else:
            patch.setattr(Path, "mkdir", fail)
        with pytest.raises(OSError if number == errno.EBADF else UserError, match=os.strerror(number)):
            store.append(rows.tail(5).to_dicts())
    assert sorted(tmp_path.iterdir()) == before
    assert len(addresses(SampleStore(tmp_path, PROVENANCE))) == 4


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampling": {**IDENTITY["sampling"], "temperature": 0.7}}, "sampling.temperature"),
        ({"model": {**IDENTITY["model"], "weights": "x"}}, "model.weights"),
        ({"model": {**IDENTITY["model"], "tokenizer": "x"}}, "model.tokenizer"),
        ({"prompt": {**IDENTITY["prompt"], "eos_token_ids": [0, 1]}}, "prompt.eos_token_ids"),
        ({"revision": "main"}, "revision"),
        ({"seed": 1}, "seed"),
        ({"engine": {"backend": "transformers", "dtype": "float32"}}, "engine.backend"),
        ({"engine": {"backend": "vllm", "dtype": "bfloat16"}}, "engine.dtype"),
        ({"versions": {**IDENTITY["versions"], "vllm": "0.33.0"}}, "versions.vllm"),
    ],
)
def test_samples_of_another_identity_are_refused_by_name_or_accepted_and_recorded(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    with pytest.raises(UserError) as caught:
        SampleStore(tmp_path, other(**changes))
    assert f"{field} is " in str(caught.value)
    assert str(caught.value).endswith(f"accept it with --allow-mismatch {field}")
    allowance = Allowance([field])
    assert addresses(SampleStore(tmp_path, other(**changes), allowance)) == addresses(
        SampleStore(tmp_path, PROVENANCE)
    )
    [recorded] = other(**changes).accepting(allowance).context["accepted_mismatches"]
    assert recorded.startswith(f"{field} is ")
    SampleStore(tmp_path, other(**changes), Allowance(known=[recorded]))
    with pytest.raises(UserError, match=field.replace(".", r"\.")):
        SampleStore(tmp_path, other(**changes), Allowance(["grader"], known=["something else"]))


def test_a_group_of_fields_can_be_accepted_and_an_unknown_field_is_refused(tmp_path: Path) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    upgraded = other(versions={"torch": "3.0", "transformers": "6.0", "vllm": "1.0"})
    allowance = Allowance(["versions"])
    SampleStore(tmp_path, upgraded, allowance)
    assert len(allowance.used) == 3
    with pytest.raises(UserError, match=r"version: there is no such field; use one of .*versions\.vllm"):
        Allowance(["version"]).refuse_unknown([*upgraded.fields()])


def test_samples_of_prompts_that_were_rendered_to_other_tokens_are_refused(tmp_path: Path) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    changed = PROMPTS.with_columns(pl.Series("prompt_token_hash", ["tokens of p1", "new", "tokens of p3"]))
    with pytest.raises(
        UserError, match=r"differ for 1 prompts, such as p2; .*--allow-mismatch prompt\.tokens"
    ):
        SampleStore(tmp_path, PROVENANCE).present(changed, 3)
    assert SampleStore(tmp_path, PROVENANCE, Allowance(["prompt.tokens"])).present(changed, 3).all()


def grade_rows(outcomes: dict[str, list[str]]) -> list[dict[str, Any]]:
    rows = sample_rows(outcomes).to_dicts()
    hashes = [{"completion_hash": completion_hash(row["completion"], row["completion_raw"])} for row in rows]
    return [row | its_hash for row, its_hash in zip(rows, hashes, strict=True)]


def test_another_graders_samples_count_once_this_graders_verdicts_are_there(tmp_path: Path) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    store = SampleStore(tmp_path, other(grader="math/2"))
    assert store.present(PROMPTS, 3).all()
    assert store.ungraded_count() == 9
    assert store.grades(PROMPTS, 3).is_empty()
    store.add_grades(grade_rows({"p1": ["wrong", "correct", "correct"]}))
    assert store.ungraded_count() == 6
    assert {name for frame in store.ungraded() for name in frame["prompt_id"]} == {"p2", "p3"}
    assert store.grades(PROMPTS, 3).sort("sample_index")["reward"].to_list() == [0.0, 1.0, 1.0]
    assert SampleStore(tmp_path, PROVENANCE).grades(PROMPTS, 3).height == 9
    assert SampleStore(tmp_path, other(grader="math/3")).ungraded_count() == 9
    store.append(sample_rows({"p4": ["correct"]}).to_dicts())
    assert store.ungraded_count() == 6


def test_another_graders_verdicts_can_be_accepted_where_this_ones_are_missing(tmp_path: Path) -> None:
    append(tmp_path, sample_rows(OUTCOMES))
    allowance = Allowance(["grader"])
    store = SampleStore(tmp_path, other(grader="math/2"), allowance)
    assert store.accept_other_grades()
    assert store.grades(PROMPTS, 3).height == 9
    assert list(allowance.used) == ['grader is "gsm8k/1" there and "math/2" here']
    assert not SampleStore(tmp_path, other(grader="math/2")).accept_other_grades()
    store.add_grades(grade_rows({"p1": ["wrong", "correct", "correct"]}))
    grades = store.grades(PROMPTS, 3).sort("prompt_id", "sample_index")
    assert grades["reward"].to_list() == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_columns_that_another_tool_has_broken_are_named(tmp_path: Path) -> None:
    path = append(tmp_path, sample_rows(OUTCOMES))
    table = pq.read_table(path)
    changed = table.set_column(table.schema.get_field_index("reward"), "reward", [["much"] * 9])
    path.unlink()
    pq.write_table(
        changed.replace_schema_metadata(table.schema.metadata), tmp_path / f"part-{'1' * 32}.parquet"
    )
    with pytest.raises(UserError, match="cannot read the samples"):
        SampleStore(tmp_path, PROVENANCE).grades(PROMPTS, 3)
