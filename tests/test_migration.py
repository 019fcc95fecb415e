"""Artifacts of earlier releases: read with their values, continued with their samples, written in today's format.

tests/formats/v<N> holds a run that a release with format version N has written; it is never written again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.provenance import (
    METADATA_KEY,
    MIGRATIONS,
    SCHEMA_VERSION,
    UNRECORDED,
    differences,
    read_provenance,
    sampler_identity,
)
from common.runs import run_paths
from common.store import SAMPLES, SampleStore, add_bytes, original_text, sample_files, set_aside_damaged
from common.vstar_file import VSTAR, estimator_of, read_vstar
from stage1_vstar.describe import describe
from stage1_vstar.filter import drop_rules, filter_prompts
from stage1_vstar.rescore import rescore
from stage2_train.config import Config
from tests.conftest import ROOT
from tests.fakes import ScriptedEngine, tiny_config
from tests.stage1_runs import Engines, contents, rows_of, run, write_questions

FORMATS = ROOT / "tests" / "formats"
V1 = FORMATS / "v1"
V2 = FORMATS / "v2"
V3 = FORMATS / "v3"
V4 = FORMATS / "v4"
OLD_VERSIONS = range(1, SCHEMA_VERSION)
QUESTIONS = 3
MODEL_OF_TODAY = {"config": "c" * 32}
"""What the identity of a model says today and did not say then."""


def document_of(path: Path) -> dict[str, Any]:
    """A file's provenance as it is written, without any migration."""
    document = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
    assert isinstance(document, dict)
    return document


# Every version.


def test_there_is_a_migration_and_a_genuine_run_for_every_old_version() -> None:
    assert sorted(MIGRATIONS) == list(OLD_VERSIONS)
    assert sorted(folder.name for folder in FORMATS.iterdir()) == [f"v{version}" for version in OLD_VERSIONS]


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_a_run_of_every_old_version_is_read_whole(version: int) -> None:
    folder = FORMATS / f"v{version}"
    files = [folder / "vstar.parquet", *sample_files(folder / "samples")]
    assert len(files) >= 2
    assert {document_of(file)["schema_version"] for file in files} == {version}
    rows, provenance = read_vstar(folder / "vstar.parquet")
    assert rows.columns == VSTAR.names
    samples = SampleStore(folder / "samples", provenance).read()
    assert samples.columns == SAMPLES.schema.names
    rewards = samples.sort("sample_index").group_by("prompt_id").agg("reward")
    assert dict(rewards.iter_rows()) == dict(rows.select("prompt_id", "rewards").iter_rows())
    assert describe(folder / "vstar.parquet").samples == samples.height


# Version 1.


def test_the_values_of_a_first_format_table_are_read_and_what_it_lacks_is_missing() -> None:
    rows, provenance = read_vstar(V1 / "vstar.parquet")
    assert rows["prompt"].to_list() == [f"How many is {number}?" for number in range(QUESTIONS)]
    assert rows["answer"].to_list() == ["1", "2", "3"]
    assert rows["prompt_token_hash"].to_list() == [None] * QUESTIONS
    assert rows["num_samples"].to_list() == [4] * QUESTIONS
    assert rows["rewards"].to_list() == [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4]
    assert rows["outcomes"].to_list()[0] == ["correct", "wrong", "truncated", "correct"]
    assert rows["completion_tokens"].to_list() == [[1, 6, 10, 1], [3, 1, 2, 8], [8, 5, 2, 8]]
    assert rows["pass_rate"].to_list() == [0.5, 0.25, 0.0]
    assert rows["vstar"].to_list() == pytest.approx([0.716890, 0.477229, 0.0], abs=1e-6)
    assert rows["keep"].to_list() == [True, False, False]
    assert provenance.context["filters"] == ["pass@N = 0", "pass rate below 0.3"]


def test_an_identity_of_the_first_format_gains_what_its_context_says() -> None:
    for path in (V1 / "vstar.parquet", *sample_files(V1 / "samples")):
        written = document_of(path)
        assert {"revision", "engine", "versions"}.isdisjoint(written["identity"])
        provenance = read_provenance(path)
        assert provenance.context == written["context"]
        assert provenance.identity == {
            **written["identity"],
            "model": {**written["identity"]["model"], "config": UNRECORDED},
            "revision": None,
            **sampler_identity("vllm", "float32", written["context"]["versions"]),
        }
        assert provenance.identity["engine"] == {"backend": "vllm", "dtype": "float32"}
        assert provenance.identity["versions"] == {
            "torch": "2.13.0",
            "transformers": "5.19.0",
            "vllm": "0.32.0",
        }


def run_of_then(folder: Path, monkeypatch: pytest.MonkeyPatch, artifacts: Path) -> Path:
    """An old run's copy, on a machine that has the model, the libraries and the grader of then."""
    written = document_of(folder / "vstar.parquet")
    monkeypatch.setattr(
        "stage1_vstar.run.model_identity", lambda *_: {**MODEL_OF_TODAY, **written["identity"]["model"]}
    )
    monkeypatch.setattr("stage1_vstar.run.fingerprint", lambda _: written["identity"]["grader"])
    monkeypatch.setattr("common.provenance._version", lambda name: written["context"]["versions"].get(name))
    return Path(shutil.copytree(folder, artifacts / "test"))


@pytest.fixture
def old_run(monkeypatch: pytest.MonkeyPatch, artifacts: Path) -> Path:
    """The first format's run."""
    return run_of_then(V1, monkeypatch, artifacts)


def config_of(model: Path, folder: Path, questions: int = QUESTIONS, **sections: Any) -> Config:
    return tiny_config(model, write_questions(folder / "data.jsonl", questions), **sections)


def assert_written_anew(path: Path) -> None:
    assert document_of(path)["schema_version"] == SCHEMA_VERSION
    assert rows_of()["prompt_token_hash"].null_count() == 0
    assert read_provenance(path).context["filters"] == ["pass@N = 0", "pass rate below 0.3"]


def test_a_finished_run_of_the_first_format_is_written_anew_without_drawing(
    tiny_model: Path, tmp_path: Path, engines: Engines, old_run: Path
) -> None:
    before, samples = rows_of(), contents(old_run / "samples")
    config = config_of(tiny_model, tmp_path)
    run(config)
    assert engines.loaded == 0
    assert rows_of().drop("prompt_token_hash").equals(before.drop("prompt_token_hash"))
    assert contents(old_run / "samples") == samples
    assert_written_anew(old_run / "vstar.parquet")
    assert "nothing to do" in run(config)


def test_more_samples_of_a_first_format_run_draw_only_the_missing_ones(
    tiny_model: Path, tmp_path: Path, engines: Engines, old_run: Path
) -> None:
    before, samples = rows_of(), contents(old_run / "samples")
    config = config_of(tiny_model, tmp_path, vstar={"num_samples": 6})
    run(config)
    assert sorted(engines.next.drawn) == sorted(
        (name, index) for name in before["prompt_id"] for index in (4, 5)
    )
    assert samples.items() < contents(old_run / "samples").items()
    [new] = set(sample_files(old_run / "samples")) - set(samples)
    assert document_of(new)["schema_version"] == SCHEMA_VERSION
    assert document_of(new)["identity"]["model"]["config"] == MODEL_OF_TODAY["config"]
    assert differences(document_of(new)["identity"], read_provenance(V1 / "vstar.parquet").identity) == {}
    rows = rows_of()
    assert [rewards[:4] for rewards in rows["rewards"].to_list()] == before["rewards"].to_list()
    assert rows["keep"].to_list() == before["keep"].to_list() == [True, False, False]
    assert_written_anew(old_run / "vstar.parquet")

    engines.next = ScriptedEngine()
    run(config.model_copy(update={"run": "anew"}))
    assert rows_of("anew").drop("keep").equals(rows.drop("keep"))


def test_more_prompts_of_a_first_format_run_draw_only_theirs(
    tiny_model: Path, tmp_path: Path, engines: Engines, old_run: Path
) -> None:
    before = rows_of()
    run(config_of(tiny_model, tmp_path, questions=5))
    rows = rows_of()
    assert rows.head(QUESTIONS).drop("prompt_token_hash").equals(before.drop("prompt_token_hash"))
    assert sorted(engines.next.drawn) == sorted(
        (name, index) for name in rows["prompt_id"][QUESTIONS:] for index in range(4)
    )
    assert rows["keep"].to_list() == [True, False, False, True, True]
    assert_written_anew(old_run / "vstar.parquet")


@pytest.mark.usefixtures("old_run")
def test_a_first_format_run_of_other_libraries_is_refused_by_their_names(
    tiny_model: Path, tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.provenance._version", lambda name: f"{name} of today")
    with pytest.raises(UserError, match=r"versions\.torch is \"2\.13\.0\" there and \"torch of today\" here"):
        run(config_of(tiny_model, tmp_path))
    run(config_of(tiny_model, tmp_path), allow_mismatch=["versions"])
    assert engines.loaded == 0
    accepted = read_provenance(run_paths("test").vstar).context["accepted_mismatches"]
    assert [line.partition(" ")[0] for line in accepted] == [
        "versions.torch",
        "versions.transformers",
        "versions.vllm",
    ]


# Version 2.


def test_a_table_of_the_second_format_does_not_say_which_rule_dropped_a_prompt() -> None:
    rows, provenance = read_vstar(V2 / "vstar.parquet")
    assert "dropped_by" not in pl.read_parquet_schema(V2 / "vstar.parquet")
    assert rows["keep"].to_list() == [True, False, False]
    assert rows["dropped_by"].to_list() == [None] * QUESTIONS
    assert rows["prompt_token_hash"].null_count() == 0
    assert rows["vstar"].to_list() == pytest.approx([0.716890, 0.477229, 0.0], abs=1e-6)
    assert_only_the_models_config_is_missing(V2 / "vstar.parquet")
    assert estimator_of(provenance) == "plugin"


def test_text_that_utf_8_cannot_hold_is_read_from_the_second_format() -> None:
    samples = SampleStore(V2 / "samples", read_provenance(V2 / "vstar.parquet")).read()
    raw = samples.filter(pl.col("completion_raw").is_not_null())
    assert raw["sample_index"].to_list() == [3] * QUESTIONS
    for row in raw.iter_rows(named=True):
        assert original_text(row["completion"], row["completion_raw"]).startswith("\ud83d broken #### ")


def assert_only_the_models_config_is_missing(path: Path) -> None:
    written, provenance = document_of(path), read_provenance(path)
    assert provenance.context == written["context"]
    model = {**written["identity"]["model"], "config": UNRECORDED}
    assert provenance.identity == {**written["identity"], "model": model}


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_offline_commands_write_an_old_table_in_todays_format(version: int, tmp_path: Path) -> None:
    old, new = FORMATS / f"v{version}" / "vstar.parquet", tmp_path / "new.parquet"
    before = contents(FORMATS)
    rescore(old, new, 0.25)
    assert document_of(new)["schema_version"] == SCHEMA_VERSION
    assert pq.read_schema(new).names == VSTAR.names
    assert read_vstar(new)[0]["keep"].to_list() == [True, False, False]
    filter_prompts(new, None, drop_rules(unsolved=True, solved=False, min_pass_rate=0.3, max_pass_rate=1))
    rows = read_vstar(new)[0]
    assert rows["keep"].to_list() == [True, False, False]
    assert rows["dropped_by"].to_list() == [None, "pass rate below 0.3", "pass@N = 0"]
    assert contents(FORMATS) == before


def test_a_finished_run_of_the_second_format_is_left_as_it_is_and_more_samples_keep_its_flags(
    tiny_model: Path, tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    path = run_of_then(V2, monkeypatch, artifacts) / "vstar.parquet"
    before = path.read_bytes()
    assert "nothing to do" in run(config_of(tiny_model, tmp_path))
    assert path.read_bytes() == before
    run(config_of(tiny_model, tmp_path, vstar={"num_samples": 6}))
    assert len(engines.next.drawn) == 2 * QUESTIONS
    assert document_of(path)["schema_version"] == SCHEMA_VERSION
    assert rows_of()["keep"].to_list() == [True, False, False]
    assert read_provenance(path).context["filters"] == ["pass@N = 0", "pass rate below 0.3"]


# Version 3.


def test_a_table_of_the_third_format_does_not_say_what_the_models_config_was() -> None:
    rows, _ = read_vstar(V3 / "vstar.parquet")
    assert rows["dropped_by"].to_list() == [None, "pass rate below 0.3", "pass@N = 0"]
    assert_only_the_models_config_is_missing(V3 / "vstar.parquet")


def test_samples_of_the_third_format_are_joined_by_those_of_a_model_whose_config_is_known(
    tiny_model: Path, tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch, artifacts: Path
) -> None:
    path = run_of_then(V3, monkeypatch, artifacts) / "vstar.parquet"
    before = path.read_bytes()
    assert "nothing to do" in run(config_of(tiny_model, tmp_path))
    assert path.read_bytes() == before
    run(config_of(tiny_model, tmp_path, vstar={"num_samples": 6}))
    assert len(engines.next.drawn) == 2 * QUESTIONS
    assert document_of(path)["identity"]["model"]["config"] == MODEL_OF_TODAY["config"]
    monkeypatch.setitem(MODEL_OF_TODAY, "config", "d" * 32)
    with pytest.raises(UserError, match=r'model\.config is "c+" there and "d+" here'):
        run(config_of(tiny_model, tmp_path, vstar={"num_samples": 8}))


# Version 4.


def test_samples_of_the_fourth_format_do_not_hold_their_token_ids() -> None:
    samples = SampleStore(V4 / "samples", read_provenance(V4 / "vstar.parquet")).read()
    assert samples["completion_ids"].null_count() == samples.height
    assert read_provenance(V4 / "vstar.parquet").identity == document_of(V4 / "vstar.parquet")["identity"]


# A later version.


def test_samples_of_a_later_version_are_refused_with_advice_and_left_where_they_are(
    tmp_path: Path, old_run: Path
) -> None:
    provenance = read_provenance(V1 / "vstar.parquet")
    [old] = sample_files(old_run / "samples")
    table = pq.read_table(old)
    document = {**document_of(old), "schema_version": SCHEMA_VERSION + 1}
    later = tmp_path / "later.parquet"
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(document).encode()}), later)
    old.unlink()
    path = add_bytes(old_run / "samples", "part", later.read_bytes())
    assert set_aside_damaged(old_run / "samples") == []
    with pytest.raises(UserError) as caught:
        SampleStore(old_run / "samples", provenance)
    assert str(caught.value) == (
        f"{path} has format version {SCHEMA_VERSION + 1}, made by a newer checkout; "
        f"this one reads 1 to {SCHEMA_VERSION}: update it"
    )


@pytest.mark.parametrize("table", ["vstar.parquet", "samples"])
def test_reading_a_first_format_run_changes_no_file(table: str) -> None:
    before = contents(V1)
    if table == "samples":
        SampleStore(V1 / "samples", read_provenance(V1 / "vstar.parquet")).read()
    else:
        assert pl.read_parquet(V1 / table).columns != read_vstar(V1 / table)[0].columns
    assert contents(V1) == before
