"""merge: samples of several runs become one run's, each once, with the provenance that they came with."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from common.provenance import METADATA_KEY, UNRECORDED, Provenance, read_provenance
from common.runs import Shard, exclusive_run, run_paths
from common.store import SampleStore, addresses, sample_files
from common.terminal.console import Terminal
from stage1_vstar.merge import merge_runs
from stage1_vstar.regrade import run_regrade
from tests.conftest import ROOT, RunCli
from tests.fakes import CONTEXT, IDENTITY, ScriptedEngine, sample_rows, tiny_config
from tests.stage1_runs import (
    QUESTIONS,
    Engines,
    contents,
    rows_of,
    run,
    stored,
)

V1 = ROOT / "tests" / "formats" / "v1"


def merge(*sources: str | Path, into: str = "joined", allow_mismatch: tuple[str, ...] = ()) -> str:
    """Merge; returns what was printed."""
    printed = io.StringIO()
    merge_runs([str(source) for source in sources], into, Terminal(file=printed, width=200), allow_mismatch)
    return printed.getvalue()


def samples_of(name: str) -> Path:
    return run_paths(name).samples


def store_of(folder: Path, outcomes: dict[str, list[str]], **changes: Any) -> Path:
    """A folder with a fragment of made-up samples, with these changes to their identity."""
    provenance = Provenance(identity={**IDENTITY, **changes}, context=CONTEXT)
    SampleStore(folder / "samples", provenance).append(sample_rows(outcomes).to_dicts())
    return folder


def there(name: str) -> list[tuple[str, int]]:
    return sorted(addresses(sample_files(samples_of(name))).iter_rows())


# What comes together.


def test_shards_of_three_runs_joined_are_one_whole_run(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file, run="whole"))
    for index in (1, 2, 3):
        engines.next = ScriptedEngine()
        run(tiny_config(tiny_model, data_file, run=f"machine-{index}"), Shard(index, 3))
    sources = [f"machine-{index}" for index in (1, 2, 3)]
    before = {source: contents(run_paths(source).root) for source in sources}
    # By name, by the run's folder and by the samples' own folder.
    printed = merge("machine-1", run_paths("machine-2").root, samples_of("machine-3"))
    assert {source: contents(run_paths(source).root) for source in sources} == before
    assert f"{QUESTIONS * 4} samples of {QUESTIONS} prompts" in printed
    assert {path.name for path in samples_of("joined").iterdir()} == {
        path.name for source in sources for path in samples_of(source).iterdir()
    }
    loaded = engines.loaded
    run(tiny_config(tiny_model, data_file, run="joined"))
    assert engines.loaded == loaded
    assert rows_of("joined").equals(rows_of("whole"))
    assert stored("joined").equals(stored("whole"))


def test_what_no_source_has_drawn_is_drawn_afterwards(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file, run="whole"))
    run(tiny_config(tiny_model, data_file, run="half"), Shard(1, 2))
    merge("half")
    engines.next = ScriptedEngine()
    run(tiny_config(tiny_model, data_file, run="joined"))
    assert 0 < len(engines.next.drawn) == QUESTIONS * 4 - len(there("half"))
    assert rows_of("joined").equals(rows_of("whole"))


@pytest.mark.usefixtures("artifacts")
def test_a_sample_of_several_sources_is_there_once_and_the_first_one_counts(tmp_path: Path) -> None:
    one = store_of(tmp_path / "one", {"p1": ["correct", "wrong"], "p2": ["correct"]})
    two = store_of(tmp_path / "two", {"p2": ["wrong", "wrong"], "p3": ["wrong"]})
    three = store_of(tmp_path / "three", {"p1": ["wrong", "wrong", "correct"], "p3": ["correct"]})
    before = contents(tmp_path)
    printed = merge(one, two, three, one)
    assert before.items() <= contents(tmp_path).items()
    lines = [line.partition(": ")[2] for line in printed.splitlines()]
    assert lines[:3] == [
        "3 samples added, 0 were there",
        "2 samples added, 1 were there",
        "1 samples added, 3 were there",
    ]
    assert lines[3].startswith(
        "6 samples of 3 prompts; `python cli.py vstar --config CONFIG.toml --run joined` "
    )
    store = SampleStore(samples_of("joined"), Provenance(identity=IDENTITY, context=CONTEXT))
    outcomes = store.read().select("prompt_id", "sample_index", "outcome").sort(pl.all())
    assert outcomes.rows() == [
        ("p1", 0, "correct"),
        ("p1", 1, "wrong"),
        ("p1", 2, "correct"),
        ("p2", 0, "correct"),
        ("p2", 1, "wrong"),
        ("p3", 0, "wrong"),
    ]


@pytest.mark.usefixtures("artifacts")
def test_merging_twice_or_a_run_into_itself_adds_nothing(tmp_path: Path) -> None:
    one = store_of(tmp_path / "one", {"p1": ["correct", "wrong"]})
    two = store_of(tmp_path / "two", {"p1": ["correct", "wrong", "wrong"], "p2": ["wrong"]})
    merge(one, two)
    once = contents(samples_of("joined"))
    assert len(once) == 2
    for sources in ((one, two), (two, one), (two,), ("joined",)):
        assert " 0 samples added" in merge(*sources)
        assert contents(samples_of("joined")) == once


def test_a_fragment_that_is_there_in_part_is_split_and_keeps_its_own_provenance(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file, run="joined", data={"limit": 4}))
    engines.next = ScriptedEngine()
    run(tiny_config(tiny_model, data_file, run="more", vstar={"num_samples": 6}))
    [ours], [theirs] = sample_files(samples_of("joined")), sample_files(samples_of("more"))
    before = contents(run_paths("more").root)
    printed = merge("more")
    assert f"{QUESTIONS * 6 - 16} samples added, 16 were there" in printed
    assert contents(run_paths("more").root) == before
    [added] = set(sample_files(samples_of("joined"))) - {ours}

    metadata = {path: pq.read_schema(path).metadata[METADATA_KEY] for path in (ours, theirs, added)}
    assert metadata[added] == metadata[theirs] != metadata[ours]
    expected = pl.read_parquet(theirs).join(
        pl.read_parquet(ours), on=["prompt_id", "sample_index"], how="anti", maintain_order="left"
    )
    assert pl.read_parquet(added).equals(expected)
    assert pq.read_schema(added).equals(pq.read_schema(theirs))

    run(tiny_config(tiny_model, data_file, run="joined", vstar={"num_samples": 6}))
    assert engines.loaded == 2
    assert rows_of("joined").equals(rows_of("more"))


def write_grader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "merge_test_reward.py").write_text(
        "def reward(prompt, completion, answer):\n    return 0.5 if completion.endswith('3') else 0.0\n"
    )
    monkeypatch.syspath_prepend(folder)
    return "merge_test_reward:reward"


def test_grades_of_another_grader_travel_along(
    tiny_model: Path, data_file: Path, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grader = {"name": write_grader(tmp_path, monkeypatch)}
    run(tiny_config(tiny_model, data_file, run="source"))
    run_regrade(tiny_config(tiny_model, data_file, run="source", grader=grader), Terminal(file=io.StringIO()))
    grades = {path.name: path.read_bytes() for path in samples_of("source").glob("grades-*.parquet")}
    assert grades
    merge("source")
    for _ in range(2):
        joined = samples_of("joined")
        assert {path.name: path.read_bytes() for path in joined.glob("grades-*.parquet")} == grades
        merge("source")
    run(tiny_config(tiny_model, data_file, run="joined", grader=grader))
    assert engines.loaded == 1
    regraded = next((run_paths("source").root / "regraded").glob("*/vstar.parquet"))
    assert rows_of("joined").equals(pl.read_parquet(regraded))
    assert set(rows_of("joined")["rewards"].explode()) == {0.0, 0.5}


def test_grades_that_travel_along_judge_no_other_text(
    tiny_model: Path, data_file: Path, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grader = {"name": write_grader(tmp_path, monkeypatch)}
    engines.next = ScriptedEngine(lambda _: "3")
    run(tiny_config(tiny_model, data_file, run="source"))
    run_regrade(tiny_config(tiny_model, data_file, run="source", grader=grader), Terminal(file=io.StringIO()))
    engines.next = ScriptedEngine(lambda _: "2")
    run(tiny_config(tiny_model, data_file, run="joined"))
    assert "0 samples added" in merge("source")
    run_regrade(tiny_config(tiny_model, data_file, run="joined", grader=grader), Terminal(file=io.StringIO()))
    regraded = next((run_paths("joined").root / "regraded").glob("*/vstar.parquet"))
    judged = (
        pl.read_parquet(regraded).explode("rewards", "outcomes").filter(pl.col("outcomes") != "truncated")
    )
    assert set(judged["rewards"]) == {0.0}


def test_samples_of_different_graders_are_joined_and_that_is_said(tmp_path: Path, artifacts: Path) -> None:
    ours = store_of(tmp_path / "a", {"p1": ["correct"]})
    theirs = store_of(tmp_path / "b", {"p2": ["correct"]}, grader="math/2")
    assert "graded by gsm8k/1, math/2: `python cli.py regrade --config CONFIG.toml --run joined`" in merge(
        ours, theirs
    )


def test_samples_of_a_prompt_from_different_tokens_are_refused(tmp_path: Path, artifacts: Path) -> None:
    ours = store_of(tmp_path / "a", {"p1": ["correct"]})
    rendered_otherwise = sample_rows({"p1": ["correct", "wrong"]}).with_columns(prompt_token_hash=pl.lit("t"))
    provenance = Provenance(identity=IDENTITY, context=CONTEXT)
    SampleStore(tmp_path / "b" / "samples", provenance).append(rendered_otherwise[1:].to_dicts())
    with pytest.raises(UserError, match=r"prompt\.tokens differ for 1 prompts, such as p1"):
        merge(ours, tmp_path / "b")
    assert not sample_files(samples_of("joined"))
    merge(ours, tmp_path / "b", allow_mismatch=("prompt.tokens",))
    assert addresses(sample_files(samples_of("joined"))).height == 2


# What is damaged.


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [flip_a_bit, truncate, empty])
@pytest.mark.usefixtures("artifacts")
def test_a_damaged_file_of_a_source_is_named_and_left_out(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    source = store_of(tmp_path / "source", {"p1": ["correct", "wrong"]})
    store_of(source, {"p2": ["wrong"]})
    broken = next(path for path in sample_files(source / "samples") if pl.read_parquet(path).height == 2)
    whole = next(path for path in sample_files(source / "samples") if path != broken)
    harm(broken)
    before = contents(source)
    printed = merge(source)
    assert (
        f"{broken} is damaged (its content does not match the hash in its name) and was left out" in printed
    )
    assert contents(source) == before
    assert [path.name for path in sample_files(samples_of("joined"))] == [whole.name]
    assert there("joined") == [("p2", 0)]


@pytest.mark.usefixtures("artifacts")
def test_a_damaged_file_of_the_run_itself_is_replaced_by_a_sources_whole_one(tmp_path: Path) -> None:
    source = store_of(tmp_path / "source", {"p1": ["correct", "wrong"]})
    merge(source)
    [ours] = sample_files(samples_of("joined"))
    truncate(ours)
    printed = merge(source)
    assert f"{ours.name} is damaged" in printed
    assert "2 samples added, 0 were there" in printed
    assert contents(samples_of("joined"), "part-*")[ours] == contents(source, "part-*").popitem()[1]


# What does not belong together.


@pytest.mark.usefixtures("artifacts")
def test_sources_of_another_identity_are_refused_before_anything_is_written_or_accepted(
    tmp_path: Path,
) -> None:
    warm = store_of(tmp_path / "warm", {"p1": ["correct"]})
    sampling = {**IDENTITY["sampling"], "temperature": 0.7}
    cold = store_of(tmp_path / "cold", {"p2": ["correct"]}, sampling=sampling, seed=3)
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        merge(warm, cold)
    message = str(caught.value)
    assert "sampling.temperature is 0.7 there and 1.0 here" in message
    assert "seed is 3 there and 0 here" in message
    assert message.endswith("--allow-mismatch sampling.temperature --allow-mismatch seed")
    assert str(sample_files(cold / "samples")[0]) in message
    assert not samples_of("joined").exists()
    with pytest.raises(UserError, match=r"seed is 3 there and 0 here; .*--allow-mismatch seed$"):
        merge(warm, cold, allow_mismatch=("sampling.temperature",))
    assert not samples_of("joined").exists()
    with pytest.raises(UserError, match=r"--allow-mismatch temperature: there is no such field; use one of"):
        merge(warm, cold, allow_mismatch=("temperature",))
    merge(warm, cold, allow_mismatch=("sampling", "seed"))
    assert there("joined") == [("p1", 0), ("p2", 0)]
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.usefixtures("artifacts")
def test_what_an_older_version_did_not_write_down_lets_no_two_others_be_mixed(tmp_path: Path) -> None:
    models = [{**IDENTITY["model"], "config": config} for config in (UNRECORDED, "one", "another")]
    old, one, another = (
        store_of(tmp_path / f"{number}", {f"p{number}": ["correct"]}, model=model)
        for number, model in enumerate(models)
    )
    merge(old)
    with pytest.raises(UserError, match=r'model\.config is "another" there and "one" here'):
        merge(one, another)
    assert there("joined") == [("p0", 0)]
    merge(one)
    with pytest.raises(UserError, match=r"model\.config is"):
        merge(another)
    assert there("joined") == [("p0", 0), ("p1", 0)]


@pytest.mark.usefixtures("artifacts")
def test_a_source_must_belong_to_what_the_run_has_already(tmp_path: Path) -> None:
    merge(store_of(tmp_path / "ours", {"p1": ["correct"]}))
    before = contents(samples_of("joined"))
    for source in (
        store_of(tmp_path / "theirs", {"p2": ["correct"]}, revision="main"),
        store_of(tmp_path / "more", {"p1": ["correct"], "p2": ["correct"]}, revision="main"),
    ):
        with pytest.raises(UserError, match='revision is "main" there and null here'):
            merge(source)
        assert contents(samples_of("joined")) == before


@pytest.mark.usefixtures("artifacts")
def test_a_source_without_samples_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = store_of(tmp_path / "source", {"p1": ["correct"]})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError) as caught:
        merge(source, tmp_path / "nothing")
    assert str(caught.value).startswith(f"{tmp_path / 'nothing'}: no samples found in ")
    assert str(caught.value).endswith("; give a run's name or folder")
    assert not run_paths("joined").root.exists()


@pytest.mark.usefixtures("artifacts")
def test_a_run_that_a_job_is_writing_to_is_left_alone(tmp_path: Path) -> None:
    source = store_of(tmp_path / "source", {"p1": ["correct"]})
    with (
        exclusive_run(run_paths("joined"), "vstar", Shard(2, 3)),
        pytest.raises(UserError, match="another vstar job"),
    ):
        merge(source)
    assert not samples_of("joined").exists()


# The first format, and the command line.


@pytest.mark.usefixtures("artifacts")
def test_samples_of_the_first_format_are_merged_whole_and_in_part(tmp_path: Path) -> None:
    [old] = sample_files(V1 / "samples")
    before = contents(V1)
    assert "12 samples added, 0 were there" in merge(V1)
    [copied] = sample_files(samples_of("joined"))
    assert copied.read_bytes() == old.read_bytes()
    assert "0 samples added, 12 were there" in merge(V1)

    some = pl.read_parquet(old).head(5)
    store = SampleStore(samples_of("second"), read_provenance(old))
    rows = some.with_columns(prompt_token_hash=pl.lit("tokens"), completion_raw=pl.lit(None, pl.Binary))
    ours = store.append(rows.to_dicts())
    assert "7 samples added, 5 were there" in merge(V1, into="second")
    [added] = set(sample_files(samples_of("second"))) - {ours}
    assert pl.read_parquet(added).equals(pl.read_parquet(old).slice(5))
    assert pq.read_schema(added).metadata[METADATA_KEY] == pq.read_schema(old).metadata[METADATA_KEY]
    whole = SampleStore(samples_of("second"), read_provenance(old)).read()
    assert whole.height == 12
    assert whole["prompt_token_hash"].null_count() == 7
    assert contents(V1) == before


def test_merge_on_the_command_line(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("merge", V1, "--run", "joined")
    assert done.returncode == 0, done.stderr
    assert "12 samples added, 0 were there" in done.stdout
    assert len(there("joined")) == 12

    other = store_of(tmp_path / "other", {"p1": ["correct"]})
    for sources, complaint in (
        ([V1, "nothing"], "error: nothing: no samples found in "),
        ([V1, other], "model.weights is "),
    ):
        refused = run_cli("merge", *sources, "--run", "joined")
        assert refused.returncode == 2
        assert complaint in refused.stderr
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
    assert len(there("joined")) == 12
