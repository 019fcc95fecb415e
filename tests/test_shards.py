"""Shards: each prompt is one job's work, jobs that could meet are refused, and together they are one whole run."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import polars as pl
import pytest

from common.data.prompts import prompt_id
from common.errors import UserError
from common.runs import WHOLE, RunPaths, Shard, exclusive_run, run_paths
from common.store import sample_files
from tests.conftest import ROOT, RunCli
from tests.fakes import EngineDied, ScriptedEngine, tiny_config
from tests.stage1_runs import (
    Engines,
    HeldJob,
    contents,
    rows_of,
    run,
    stored,
    write_questions,
)

QUESTIONS = 12
NAMES = [prompt_id(f"How many is {number}?", "1") for number in range(4000)]


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "data.jsonl", QUESTIONS)


def prompts_of(shard: Shard) -> set[str]:
    """Which of `data_file`'s prompts a shard holds."""
    names = [prompt_id(f"How many is {number}?", str(1 + number % 4)) for number in range(QUESTIONS)]
    return {name for name in names if shard.holds(name)}


def drawn(engine: ScriptedEngine) -> set[str]:
    return {name for name, _ in engine.drawn}


# Which prompts are whose.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "/",
        "1/",
        "/2",
        "0/2",
        "3/2",
        "1/0",
        "0/0",
        "-1/2",
        "+1/2",
        "1/2/3",
        "a/b",
        "1 / 2",
        "1.0/2",
        "²/3",
    ],
)
def test_anything_but_a_part_of_a_whole_is_no_shard(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Shard.parse(text)
    assert str(caught.value) == f"--shard {text}: write it as i/n with 1 ≤ i ≤ n, for example 2/8"


@pytest.mark.parametrize("text", ["1/1", "1/8", "8/8", "2/3", "117/500"])
def test_a_shard_is_written_as_it_is_read(text: str) -> None:
    assert str(Shard.parse(text)) == text
    assert (Shard.parse(text) == WHOLE) == (text == "1/1")


@pytest.mark.parametrize("count", range(1, 17))
def test_every_prompt_is_in_exactly_one_shard_and_the_shards_are_about_even(count: int) -> None:
    shards = [Shard(index, count) for index in range(1, count + 1)]
    holders = [[shard for shard in shards if shard.holds(name)] for name in NAMES]
    assert {len(each) for each in holders} == {1}
    sizes = [sum(each == [shard] for each in holders) for shard in shards]
    even = len(NAMES) / count
    assert all(abs(size - even) < 4 * even**0.5 for size in sizes), sizes


def test_two_shards_overlap_just_where_they_share_a_prompt() -> None:
    shards = [Shard(index, count) for count in range(1, 13) for index in range(1, count + 1)]
    held = {shard: frozenset(name for name in NAMES if shard.holds(name)) for shard in shards}
    for one, other in product(shards, shards):
        assert one.overlaps(other) == (not held[one].isdisjoint(held[other])), (one, other)


# Shards of one run.


@pytest.mark.parametrize("count", [2, 4])
def test_shards_one_after_the_other_give_the_rows_of_one_whole_run(
    tiny_model: Path, data_file: Path, engines: Engines, count: int
) -> None:
    run(tiny_config(tiny_model, data_file, run="whole"))
    config = tiny_config(tiny_model, data_file)
    for index in range(1, count + 1):
        shard = Shard(index, count)
        engines.next = ScriptedEngine()
        assert f"shard {shard} of {run_paths('test').samples} is complete" in run(config, shard)
        assert drawn(engines.next) == prompts_of(shard)
        assert len(engines.next.drawn) == 4 * len(prompts_of(shard)) > 0
        assert not run_paths("test").vstar.exists()
    loaded = engines.loaded
    assert "12 prompts, pass rate" in run(config)
    assert engines.loaded == loaded
    assert rows_of().equals(rows_of("whole"))
    assert stored().equals(stored("whole"))


def test_the_run_without_a_shard_draws_what_a_shard_that_never_ran_would_have_drawn(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file, run="whole"))
    config = tiny_config(tiny_model, data_file)
    run(config, Shard(1, 3))
    run(config, Shard(3, 3))
    engines.next = ScriptedEngine()
    run(config)
    assert sorted(engines.next.drawn) == sorted(
        (name, index) for name in prompts_of(Shard(2, 3)) for index in range(4)
    )
    assert rows_of().equals(rows_of("whole"))


def test_a_shard_that_is_complete_is_told_and_draws_nothing(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    config = tiny_config(tiny_model, data_file)
    run(config, Shard(1, 2))
    before = contents(run_paths("test").samples)
    assert "shard 1/2" in (again := run(config, Shard(1, 2)))
    assert "is complete" in again
    assert "to draw" not in again
    run(config, Shard(3, 4))  # a half of it
    assert engines.loaded == 1
    assert contents(run_paths("test").samples) == before


def test_an_interrupted_shard_continues_and_another_number_of_shards_finds_its_samples(
    tiny_model: Path, data_file: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config(tiny_model, data_file, run="whole"))
    monkeypatch.setattr("common.sampling.writer.FRAGMENT_SAMPLES", 3)
    config = tiny_config(tiny_model, data_file)
    samples = run_paths("test").samples
    engines.next = ScriptedEngine(dies_when=lambda: len(sample_files(samples)) >= 2)
    with pytest.raises(EngineDied):
        run(config, Shard(1, 2))
    there = set(pl.read_parquet(sample_files(samples)).select("prompt_id", "sample_index").iter_rows())
    all_drawn = [*there]
    for index in (1, 2, 3):
        engines.next = ScriptedEngine()
        run(config, Shard(index, 3))
        all_drawn += engines.next.drawn
    assert 6 <= len(there) < len(set(all_drawn)) == len(all_drawn) == QUESTIONS * 4
    run(config)
    assert rows_of().equals(rows_of("whole"))


def test_a_shard_with_a_finished_table_leaves_the_table_as_it_is(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file))
    before = run_paths("test").vstar.read_bytes()
    engines.next = ScriptedEngine()
    run(tiny_config(tiny_model, data_file, vstar={"num_samples": 6}), Shard(1, 2))
    assert drawn(engines.next) == prompts_of(Shard(1, 2))
    assert {index for _, index in engines.next.drawn} == {4, 5}
    assert run_paths("test").vstar.read_bytes() == before


def test_a_shard_without_any_prompt_says_so_before_an_engine_loads(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    empty = next(shard for index in range(1, 500) if not prompts_of(shard := Shard(index, 499)))
    assert run(tiny_config(tiny_model, data_file), empty) == f"shard {empty} holds no prompt: nothing to do\n"
    assert engines.loaded == 0


def test_the_command_line_refuses_a_wrong_shard_in_a_line(run_cli: RunCli) -> None:
    result = run_cli("vstar", "--shard", "5/4")
    assert result.returncode == 2
    assert result.stderr == "error: --shard 5/4: write it as i/n with 1 ≤ i ≤ n, for example 2/8\n"


# At the same time.


def test_a_second_shard_draws_while_the_first_one_does(
    tiny_model: Path, data_file: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_paths("test").root.parent == artifacts
    drawing, other_is_done = threading.Event(), threading.Event()
    waited: list[bool] = []

    def wait() -> bool:
        drawing.set()
        waited.append(other_is_done.wait(60))
        return False

    first, second, none = ScriptedEngine(dies_when=wait), ScriptedEngine(), ScriptedEngine()
    handed_out = iter([first, second, none])
    monkeypatch.setattr("tests.stage1_runs.engine_builder", lambda *_, **__: next(handed_out))
    config = tiny_config(tiny_model, data_file)
    thread = threading.Thread(target=run, args=(config, Shard(1, 2)))
    thread.start()
    assert drawing.wait(60)
    run(config, Shard(2, 2))
    assert not first.drawn
    other_is_done.set()
    thread.join(60)
    assert all(waited)
    assert (drawn(first), drawn(second)) == (prompts_of(Shard(1, 2)), prompts_of(Shard(2, 2)))
    run(config)
    rows = rows_of()
    assert next(handed_out) is none
    monkeypatch.setattr("tests.stage1_runs.engine_builder", lambda *_, **__: none)
    run(tiny_config(tiny_model, data_file, run="whole"))
    assert rows.equals(rows_of("whole"))


def test_two_processes_draw_two_shards_and_those_that_overlap_are_refused_meanwhile(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    config = tiny_config(tiny_model, data_file)
    with HeldJob(config, Shard(1, 4)) as job:
        job.wait_until_it_draws()
        for shard in (WHOLE, Shard(1, 2), Shard(1, 4)):
            with pytest.raises(UserError, match=r"another vstar job \(process \d+ on .+\) is writing to "):
                run(config, shard)
        assert engines.loaded == 0
        run(config, Shard(2, 4))
        run(config, Shard(2, 2))
        assert drawn(engines.next) == prompts_of(Shard(2, 4)) | prompts_of(Shard(2, 2))
        assert "shard 1/4" in job.finish()
    engines.next = ScriptedEngine()
    run(config)
    assert drawn(engines.next) == prompts_of(Shard(3, 4))
    run(tiny_config(tiny_model, data_file, run="whole"))
    assert rows_of().equals(rows_of("whole"))
    assert stored().equals(stored("whole"))


@pytest.mark.parametrize(
    ("held", "wanted", "refused"),
    [
        ("1/4", "1/2", True),
        ("1/4", "1/1", True),
        ("1/4", "1/4", True),
        ("1/4", "5/8", True),
        ("1/1", "7/8", True),
        ("1/4", "2/3", True),
        ("1/4", "2/4", False),
        ("1/4", "2/2", False),
        ("1/4", "2/8", False),
    ],
)
def test_a_job_is_refused_while_another_one_could_draw_the_same_prompt(
    tmp_path: Path, held: str, wanted: str, refused: bool
) -> None:
    paths, one, other = RunPaths(tmp_path / "run"), Shard.parse(held), Shard.parse(wanted)
    for first, second in ((one, other), (other, one)):
        with ExitStack() as jobs:
            jobs.enter_context(exclusive_run(paths, "vstar", first))
            jobs.enter_context(exclusive_run(paths, "train"))
            if refused:
                with pytest.raises(
                    UserError, match=rf"\(process {os.getpid()} on .+ is writing to {paths.root}"
                ):
                    jobs.enter_context(exclusive_run(paths, "vstar", second))
            else:
                jobs.enter_context(exclusive_run(paths, "vstar", second))
        with exclusive_run(paths, "vstar", second):
            pass


def test_a_refused_job_leaves_nothing_locked(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    with exclusive_run(paths, "vstar", Shard(3, 4)):
        for shard in (WHOLE, Shard(1, 2)):
            with pytest.raises(UserError, match="wait for it"), exclusive_run(paths, "vstar", shard):
                pass
        with exclusive_run(paths, "vstar", Shard(1, 4)), exclusive_run(paths, "vstar", Shard(2, 2)):
            pass
    with exclusive_run(paths, "vstar"):
        pass


def test_a_claim_ends_with_its_process_even_where_its_grader_processes_live_on(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from common.runs import RunPaths, Shard, exclusive_run
from common.grading import GraderConfig, GraderPool
with exclusive_run(RunPaths(Path(sys.argv[1])), "vstar", Shard(1, 2)), GraderPool(GraderConfig(name="gsm8k")):
    print("held", flush=True)
    time.sleep(60)
"""
    paths = RunPaths(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(paths.root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"process {job.pid} on "),
            exclusive_run(paths, "vstar", Shard(1, 4)),
        ):
            pass
        job.send_signal(signal.SIGKILL)
        job.wait()
        with exclusive_run(paths, "vstar"):
            pass
