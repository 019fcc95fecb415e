"""regrade: another grader's verdicts on the same completions, and their effect; text and old grades stay."""

import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.errors import UserError
from common.grading import Grade, GraderPool, fingerprint
from common.provenance import read_provenance
from common.rollout import Completion
from common.runs import run_paths
from common.store import original_text, sample_files
from common.terminal.console import Terminal
from common.vstar_file import read_vstar
from stage1_vstar.describe import describe, to_json
from stage1_vstar.filter import drop_rules, filter_prompts
from stage1_vstar.regrade import run_regrade
from stage2_train.config import Config
from stage2_train.data import prepare
from tests.conftest import RunCli
from tests.fakes import ScriptedEngine, tiny_config
from tests.stage1_runs import (
    QUESTIONS,
    Engines,
    contents,
    rows_of,
    run,
    stored,
)
from tests.stage2_runs import as_toml

pytestmark = pytest.mark.usefixtures("engines")

REWARD_A = """
def reward(prompt, completion, answer):
    return float(completion.endswith(answer))
"""
REWARD_B = """
LAST = {"1": 1.0, "2": -0.5, "3": 0.25, "4": 0.0}

def reward(prompt, completion, answer):
    if answer == "1":
        return float(completion.endswith(answer))
    return LAST[completion[-1]]
"""
SAMPLES = QUESTIONS * 4


def reward_b(completion: str, answer: str) -> float:
    """What REWARD_B says."""
    if answer == "1":
        return float(completion.endswith("1"))
    return [1.0, -0.5, 0.25, 0.0][int(completion[-1]) - 1]


MakeConfig = Callable[..., Config]


@pytest.fixture
def graded_by(
    tiny_model: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeConfig:
    """Makes the run's config with a grader by the name of its module: regrade_a, regrade_b or a built-in rule's."""
    (tmp_path / "regrade_a.py").write_text(REWARD_A)
    (tmp_path / "regrade_b.py").write_text(REWARD_B)
    monkeypatch.syspath_prepend(tmp_path)

    def config(module: str, **sections: Any) -> Config:
        grader = {"name": f"{module}:reward" if (tmp_path / f"{module}.py").exists() else module}
        return tiny_config(tiny_model, data_file, grader=grader, **sections)

    return config


def regrade(config: Config) -> str:
    """Regrade; returns what was printed."""
    printed = io.StringIO()
    run_regrade(config, Terminal(file=printed, width=1000))
    return printed.getvalue()


def folder_of(config: Config) -> Path:
    name = re.sub(r"[:@/_]+", "-", fingerprint(config.grader))
    return run_paths(config.run).root / "regraded" / name


def grade_files() -> list[Path]:
    return sorted(run_paths("test").samples.glob("grades-*.parquet"))


def grades() -> pl.DataFrame:
    return pl.read_parquet(grade_files()).sort("prompt_id", "sample_index")


def vstar_of(rewards: list[float], beta1: float) -> float:
    return beta1 * math.log(sum(math.exp(reward / beta1) for reward in rewards) / len(rewards))


# The new grades, the new table and the comparison.


def test_every_sample_gets_the_new_graders_verdict_and_every_prompt_its_vstar(
    graded_by: MakeConfig, engines: Engines
) -> None:
    run(graded_by("regrade_a", vstar={"beta1": 0.3}))
    old, config = rows_of(), graded_by("regrade_b")
    before = contents(run_paths("test").root, "*.parquet")
    printed = regrade(config)
    assert f"{SAMPLES} completions to grade by regrade_b:reward@" in printed
    assert engines.loaded == 1
    after = contents(run_paths("test").root, "*.parquet")
    assert before.items() < after.items()
    assert set(after) - set(before) == {
        *grade_files(),
        folder_of(config) / "vstar.parquet",
        folder_of(config) / "changes.parquet",
    }

    samples = stored()
    assert {"correct", "wrong", "truncated"} == set(samples["outcome"])
    graded = grades()
    assert graded.select("prompt_id", "sample_index").equals(samples.select("prompt_id", "sample_index"))
    for sample, grade in zip(samples.iter_rows(named=True), graded.iter_rows(named=True), strict=True):
        if sample["outcome"] == "truncated":
            assert (grade["outcome"], grade["reward"]) == ("truncated", 0.0)
            continue
        reward = reward_b(sample["completion"], sample["answer"])
        assert (grade["outcome"], grade["reward"]) == ("correct" if reward >= 1 else "wrong", reward)
    assert set(graded["reward"]) == {1.0, -0.5, 0.25, 0.0}

    new, provenance = read_vstar(folder_of(config) / "vstar.parquet")
    same = ["prompt_id", "prompt", "answer", "prompt_token_hash", "num_samples", "completion_tokens", "beta1"]
    assert new.select(same).equals(old.select(same))
    for row in new.iter_rows(named=True):
        of_prompt = graded.filter(pl.col("prompt_id") == row["prompt_id"])
        assert row["rewards"] == of_prompt["reward"].to_list()
        assert row["outcomes"] == of_prompt["outcome"].to_list()
        assert row["pass_rate"] == row["outcomes"].count("correct") / 4
        assert row["vstar"] == pytest.approx(vstar_of(row["rewards"], 0.3), abs=1e-12)
        assert row["keep"]
    assert provenance.identity == {
        **read_provenance(run_paths("test").vstar).identity,
        "grader": fingerprint(config.grader),
    }
    assert provenance.context["regraded_from"] == fingerprint(graded_by("regrade_a").grader)


def test_the_comparison_lists_just_the_changed_prompts_with_the_largest_change_first(
    graded_by: MakeConfig,
) -> None:
    run(graded_by("regrade_a"))
    config = graded_by("regrade_b")
    printed = regrade(config)
    old, (new, _) = rows_of(), read_vstar(folder_of(config) / "vstar.parquet")
    pairs = list(zip(old.iter_rows(named=True), new.iter_rows(named=True), strict=True))
    changed = [(was, now) for was, now in pairs if was["rewards"] != now["rewards"]]
    assert 0 < len(changed) < QUESTIONS

    changes = pl.read_parquet(folder_of(config) / "changes.parquet")
    assert set(changes["prompt_id"]) == {was["prompt_id"] for was, _ in changed}
    assert changes.height == len(changed)
    for was, now in changed:
        row = changes.row(by_predicate=pl.col("prompt_id") == was["prompt_id"], named=True)
        assert (row["prompt"], row["answer"]) == (was["prompt"], was["answer"])
        for name in ("outcomes", "rewards", "vstar"):
            assert (row[f"{name}_before"], row[f"{name}_after"]) == (was[name], now[name])
        delta = vstar_of(now["rewards"], 0.5) - vstar_of(was["rewards"], 0.5)
        assert row["delta_vstar"] == pytest.approx(delta, abs=1e-12)
    sizes = changes["delta_vstar"].abs().to_list()
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1
    assert {delta > 0 for delta in changes["delta_vstar"]} == {True, False}

    summary = json.loads((folder_of(config) / "summary.json").read_text())
    moves = Counter(
        f"{was} → {now}"
        for before, after in changed
        for was, now in zip(before["outcomes"], after["outcomes"], strict=True)
        if was != now
    )
    assert summary["changed_outcomes"] == dict(moves)
    assert {"wrong → correct", "correct → wrong"} == set(moves)
    everything = [new["vstar"][place] - old["vstar"][place] for place in range(QUESTIONS)]
    expected = {
        "before": fingerprint(graded_by("regrade_a").grader),
        "after": fingerprint(config.grader),
        "beta1": "0.5",
        "prompts": QUESTIONS,
        "samples": SAMPLES,
        "changed_prompts": len(changed),
    }
    assert {name: summary[name] for name in expected} == expected
    outcomes = {"before": old["outcomes"].explode(), "after": new["outcomes"].explode()}
    for side, table in (("before", old), ("after", new)):
        solved = outcomes[side].to_list().count("correct")
        assert summary["pass_rate"][side] == pytest.approx(solved / SAMPLES)
        assert summary["mean_vstar"][side] == pytest.approx(sum(table["vstar"]) / QUESTIONS)
    assert summary["mean_absolute_delta_vstar"] == pytest.approx(sum(map(abs, everything)) / QUESTIONS)
    assert summary["largest_delta_vstar"] == pytest.approx(max(everything, key=abs))
    assert f"{len(changed)} of {QUESTIONS} prompts change" in printed
    for move, count in moves.items():
        assert f"  {move}: {count} samples" in printed


def test_a_grader_that_agrees_changes_no_prompt(graded_by: MakeConfig, tmp_path: Path) -> None:
    run(graded_by("regrade_a"))
    (tmp_path / "regrade_b.py").write_text(REWARD_A + "\n# the same in other words\n")
    config = graded_by("regrade_b")
    assert f"0 of {QUESTIONS} prompts change" in regrade(config)
    assert pl.read_parquet(folder_of(config) / "changes.parquet").is_empty()
    summary = json.loads((folder_of(config) / "summary.json").read_text())
    assert (summary["changed_prompts"], summary["changed_outcomes"]) == (0, {})
    assert summary["mean_absolute_delta_vstar"] == summary["largest_delta_vstar"] == 0.0
    assert read_vstar(folder_of(config) / "vstar.parquet")[0].equals(rows_of())


def test_flags_that_were_about_the_old_grades_are_not_carried_over(graded_by: MakeConfig) -> None:
    run(graded_by("regrade_a"))
    path = run_paths("test").vstar
    filter_prompts(path, None, drop_rules(unsolved=True, solved=False, min_pass_rate=0.5, max_pass_rate=1))
    assert not rows_of()["keep"].all()
    regrade(config := graded_by("regrade_b"))
    rows, provenance = read_vstar(folder_of(config) / "vstar.parquet")
    assert rows["keep"].all()
    assert "filters" not in provenance.context
    regrade(unsolved := graded_by("regrade_b", vstar={"drop_unsolved": True}))
    rows = read_vstar(folder_of(unsolved) / "vstar.parquet")[0]
    assert rows["keep"].to_list() == rows["pass_at_n"].to_list()


def test_only_the_samples_of_the_table_are_compared(graded_by: MakeConfig) -> None:
    run(graded_by("regrade_a", vstar={"num_samples": 6}))
    run(graded_by("regrade_a", vstar={"num_samples": 3}))
    regrade(config := graded_by("regrade_b", vstar={"num_samples": 3}))
    assert grades().height == QUESTIONS * 6
    rows = read_vstar(folder_of(config) / "vstar.parquet")[0]
    assert rows["num_samples"].to_list() == [3] * QUESTIONS


def test_the_new_grader_reads_completions_as_the_engine_gave_them(
    graded_by: MakeConfig, engines: Engines, tmp_path: Path
) -> None:
    texts = ["so \ud800 4", "\udfff", "so \ufffd 4", "a\x00b\x00", "😀\ud83d😀"]
    (tmp_path / "regrade_b.py").write_text(
        f"TEXTS = {texts!a}\n\ndef reward(prompt, completion, answer):\n    return TEXTS.index(completion) + 2.0\n"
    )
    engines.next = ScriptedEngine(lambda request: texts[request.seed % len(texts)])
    run(graded_by("regrade_a"))
    regrade(graded_by("regrade_b"))
    samples, graded = stored(), grades()
    completions = [
        original_text(*pair) for pair in samples.select("completion", "completion_raw").iter_rows()
    ]
    assert set(completions) == set(texts)
    assert graded["reward"].to_list() == [
        0.0 if outcome == "truncated" else texts.index(text) + 2.0
        for text, outcome in zip(completions, samples["outcome"], strict=True)
    ]


# Again, and after an interruption.


def refuse_to_grade(_: object) -> GraderPool:
    raise AssertionError("everything has been graded")


def test_a_second_regrade_grades_nothing_and_changes_no_file(
    graded_by: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(graded_by("regrade_a"))
    regrade(graded_by("regrade_b"))
    before = contents(run_paths("test").root)
    monkeypatch.setattr("common.sampling.regrading.GraderPool", refuse_to_grade)
    assert "completions to grade" not in (printed := regrade(graded_by("regrade_b")))
    assert "prompts change" in printed
    assert {
        path: content for path, content in contents(run_paths("test").root).items() if path in before
    } == before
    assert "nothing to do" in regrade(graded_by("regrade_a"))


class DyingPool(GraderPool):
    """Grades immediately, and dies after too many completions. `given` counts over all pools."""

    given = 0
    limit = 10**6

    def submit(self, *arguments: Any, **options: Any) -> None:
        if DyingPool.given == DyingPool.limit:
            raise RuntimeError("the machine goes down")
        DyingPool.given += 1
        super().submit(*arguments, **options)

    def ready(self) -> list[tuple[Any, Grade]]:
        return self.drain()


def test_a_regrade_that_was_cut_off_continues_and_gives_the_same_table(
    graded_by: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(graded_by("regrade_a"))
    run(graded_by("regrade_a", run="whole"))
    regrade(whole := graded_by("regrade_b", run="whole"))
    monkeypatch.setattr("common.sampling.writer.FRAGMENT_SAMPLES", 5)
    monkeypatch.setattr("common.sampling.regrading.GraderPool", DyingPool)
    monkeypatch.setattr(DyingPool, "given", 0)
    config = graded_by("regrade_b")
    for limit in (7, 13):
        monkeypatch.setattr(DyingPool, "limit", limit)
        with pytest.raises(RuntimeError, match="the machine goes down"):
            regrade(config)
        assert grades().height == limit
        assert not folder_of(config).exists()
    assert len(grade_files()) == 4  # 5 and 2, then 5 and 1
    monkeypatch.setattr(DyingPool, "limit", SAMPLES)
    assert f"{SAMPLES - 13} completions to grade" in regrade(config)
    assert DyingPool.given == SAMPLES == grades().height
    for name in ("vstar.parquet", "changes.parquet"):
        assert pl.read_parquet(folder_of(config) / name).equals(pl.read_parquet(folder_of(whole) / name))


# Back to stage 1.


def test_an_edited_reward_is_refused_until_its_samples_are_graded_anew(
    graded_by: MakeConfig, engines: Engines, tmp_path: Path
) -> None:
    config = graded_by("regrade_a")
    run(config)
    old = rows_of()
    before = fingerprint(config.grader)
    (tmp_path / "regrade_a.py").write_text(REWARD_B + "\n# edited\n")
    after = fingerprint(config.grader)
    with pytest.raises(UserError) as caught:
        run(config)
    assert f'grader is "{before}" there and "{after}" here' in str(caught.value)
    assert "(to grade its samples again: `python cli.py regrade`)" in str(caught.value)

    run_paths("test").vstar.rename(tmp_path / "old.parquet")
    with pytest.raises(UserError) as caught:
        run(config)
    assert str(caught.value).startswith(
        f"{SAMPLES} samples in {run_paths('test').samples} were graded by another"
    )
    assert "grade them again with `python cli.py regrade`" in str(caught.value)
    assert not run_paths("test").vstar.exists()

    assert "run `python cli.py vstar`" in regrade(config)
    run(config)
    assert engines.loaded == 1
    rows = rows_of()
    assert read_provenance(run_paths("test").vstar).identity["grader"] == after
    samples = stored()
    assert rows.sort("prompt_id")["rewards"].explode().to_list() == [
        0.0 if sample["outcome"] == "truncated" else reward_b(sample["completion"], sample["answer"])
        for sample in samples.iter_rows(named=True)
    ]
    assert not rows["rewards"].equals(old["rewards"])
    assert "nothing to do" in run(config)


def test_after_a_regrade_more_samples_draw_only_the_missing_ones(
    graded_by: MakeConfig, engines: Engines, tmp_path: Path
) -> None:
    run(graded_by("regrade_a"))
    regrade(config := graded_by("regrade_b"))
    regraded = read_vstar(folder_of(config) / "vstar.parquet")[0]
    run_paths("test").vstar.rename(tmp_path / "old.parquet")
    engines.next = ScriptedEngine()
    run(graded_by("regrade_b", vstar={"num_samples": 6}))
    assert sorted(engines.next.drawn) == sorted(
        (name, index) for name in regraded["prompt_id"] for index in (4, 5)
    )
    rows = rows_of()
    assert [rewards[:4] for rewards in rows["rewards"].to_list()] == regraded["rewards"].to_list()
    engines.next = ScriptedEngine()
    run(graded_by("regrade_b", run="anew", vstar={"num_samples": 6}))
    assert rows.equals(rows_of("anew"))


def test_old_grades_can_be_accepted_and_the_file_says_so(graded_by: MakeConfig, engines: Engines) -> None:
    run(graded_by("regrade_a"))
    old, config = rows_of(), graded_by("regrade_b")
    run(config, allow_mismatch=["grader"])
    assert engines.loaded == 1
    assert rows_of().equals(old)
    provenance = read_provenance(run_paths("test").vstar)
    assert provenance.identity["grader"] == fingerprint(config.grader)
    there, here = fingerprint(graded_by("regrade_a").grader), fingerprint(config.grader)
    accepted = [f'grader is "{there}" there and "{here}" here']
    assert provenance.context["accepted_mismatches"] == accepted
    document = json.loads(to_json(describe(run_paths("test").vstar)))
    assert document["context"]["accepted_mismatches"] == accepted
    assert "nothing to do" in run(config)  # what was accepted once is not asked again
    assert f"was graded by {here}" not in regrade(config)  # nor is the table taken for one of the new grader


def test_a_regraded_table_trains_with_its_grader_and_not_with_the_old_one(graded_by: MakeConfig) -> None:
    run(graded_by("regrade_a"))
    regrade(config := graded_by("regrade_b"))
    file = folder_of(config) / "vstar.parquet"
    data = prepare(config, file)
    assert data.stage1 is not None
    rows = read_vstar(file)[0]
    assert data.stage1.vstar == dict(zip(rows["prompt_id"], rows["vstar"], strict=True))
    assert len(data.prompts) == QUESTIONS
    assert data.stage1.accepted_mismatches == ()
    with pytest.raises(
        UserError, match=r'grader is "regrade_b:reward@\w+" there and "regrade_a:reward@\w+" here'
    ):
        prepare(graded_by("regrade_a"), file)
    with pytest.raises(
        UserError, match=r'grader is "regrade_a:reward@\w+" there and "regrade_b:reward@\w+" here'
    ):
        prepare(config, run_paths("test").vstar)


# What cannot be done.


def test_a_grader_that_can_judge_nothing_is_refused_and_nothing_is_kept(
    graded_by: MakeConfig, tmp_path: Path
) -> None:
    run(graded_by("regrade_a"))
    (tmp_path / "regrade_b.py").write_text(
        "def reward(prompt, completion, answer):\n    return answer.score\n"
    )
    before = contents(run_paths("test").root, "*.parquet")
    with pytest.raises(UserError) as caught:
        regrade(graded_by("regrade_b"))
    assert re.match(
        r"the grader could judge none of the first \d+ completions \(verifier_crash", str(caught.value)
    )
    assert "nothing was kept of them" in str(caught.value)
    assert contents(run_paths("test").root, "*.parquet") == before


def other_answers(path: Path, *answers: str) -> Path:
    """The data set with these answers in its first rows."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=False):
        row["answer"] = answer
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_reference_answers_that_the_new_grader_cannot_use_are_refused_before_anything_is_graded(
    graded_by: MakeConfig, data_file: Path
) -> None:
    other_answers(data_file, "see the solution")
    run(graded_by("regrade_a"))
    before = contents(run_paths("test").root, "*.parquet")
    with pytest.raises(
        UserError,
        match=r"1 of 6 reference answers of these samples: .*How many is 0\?.*: not a number.*bad_golds",
    ) as caught:
        regrade(graded_by("gsm8k"))
    assert "\n" not in str(caught.value)
    assert contents(run_paths("test").root, "*.parquet") == before


def test_prompts_whose_answer_the_new_grader_cannot_use_are_left_out_where_that_is_asked_for(
    graded_by: MakeConfig, data_file: Path
) -> None:
    other_answers(data_file, "see the solution")
    run(graded_by("regrade_a"))
    config = graded_by("gsm8k")
    config = config.model_copy(update={"data": config.data.model_copy(update={"bad_golds": "drop"})})
    printed = regrade(config)
    assert (
        "prompts left out, since the grader cannot use 1 of 6 reference answers of these samples: "
        "\"How many is 0?\": not a number: 'see the solution'" in printed
    )
    table = read_vstar(folder_of(config) / "vstar.parquet")[0]
    assert table["prompt"].to_list() == [f"How many is {number}?" for number in range(1, QUESTIONS)]
    assert not table["outcomes"].explode().is_in(["gold_unparsed"]).any()
    assert json.loads((folder_of(config) / "summary.json").read_text())["prompts"] == QUESTIONS - 1
    with pytest.raises(UserError, match="1 of 6 reference answers"):  # the grades are there, the table is not
        regrade(graded_by("gsm8k"))


def test_an_answer_that_cannot_be_used_is_found_where_every_completion_was_cut_off(
    graded_by: MakeConfig, data_file: Path, engines: Engines
) -> None:
    """Their outcomes do not say so."""
    other_answers(data_file, "see the solution")

    class Endless(ScriptedEngine):
        def generate(self, *arguments: Any) -> Iterator[Completion]:
            return (replace(each, truncated=True) for each in super().generate(*arguments))

    engines.next = Endless()
    run(graded_by("regrade_a"))
    with pytest.raises(UserError, match="1 of 6 reference answers"):
        regrade(graded_by("gsm8k"))


def test_only_the_answers_of_the_tables_prompts_have_to_be_usable(
    graded_by: MakeConfig, data_file: Path
) -> None:
    other_answers(data_file, "see the solution")
    run(graded_by("regrade_a"))
    data_file.write_text("\n".join(data_file.read_text().splitlines()[1:]))
    run_paths("test").vstar.unlink()
    run(graded_by("regrade_a"))
    regrade(graded_by("gsm8k"))
    assert read_vstar(folder_of(graded_by("gsm8k")) / "vstar.parquet")[0].height == QUESTIONS - 1


def test_where_the_new_grader_can_use_no_answer_nothing_is_written(
    graded_by: MakeConfig, data_file: Path
) -> None:
    other_answers(data_file, *["see the solution"] * QUESTIONS)
    run(graded_by("regrade_a"))
    config = graded_by("gsm8k")
    config = config.model_copy(update={"data": config.data.model_copy(update={"bad_golds": "drop"})})
    with pytest.raises(
        UserError, match="no prompt is left: the grader 'gsm8k' cannot use 6 of 6 reference answers"
    ):
        regrade(config)
    assert not folder_of(config).exists()


def test_a_run_without_samples_cannot_be_regraded(graded_by: MakeConfig) -> None:
    with pytest.raises(UserError) as caught:
        regrade(graded_by("regrade_b"))
    assert str(caught.value) == (
        f"there are no samples in {run_paths('test').samples}; draw them with `python cli.py vstar`"
    )


def test_the_command_line_prints_the_comparison_as_one_json_document(
    graded_by: MakeConfig, run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(graded_by("regrade_a"))
    config = graded_by("regrade_b")
    (tmp_path / "run.toml").write_text(as_toml(config))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    command = ("regrade", "--config", tmp_path / "run.toml", "--run", "test", "--json")
    result = run_cli(*command)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((folder_of(config) / "summary.json").read_text())
    assert summary["samples"] == SAMPLES
    assert result.stderr.startswith(f"{SAMPLES} completions to grade by ")
    grade_files()[0].write_bytes(b"")
    result = run_cli(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == summary


def test_a_regrade_without_a_damaged_fragments_samples_ends_with_a_table_or_a_line_of_advice(
    graded_by: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("common.sampling.writer.FRAGMENT_SAMPLES", 5)
        run(graded_by("regrade_a"))
    damaged = sample_files(run_paths("test").samples)[0]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    config, advice = graded_by("regrade_b"), ""
    try:
        regrade(config)
    except UserError as error:
        advice = str(error)
    assert (folder_of(config) / "vstar.parquet").exists() != ("`python cli.py vstar`" in advice)


def test_a_table_by_the_same_grader_leaves_standard_output_to_json(
    graded_by: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(graded_by("regrade_a"))
    capsys.readouterr()
    run_regrade(graded_by("regrade_a"), Terminal(), as_json=True)
    printed = capsys.readouterr().out
    assert printed == "" or json.loads(printed)
