"""Stage 1: resume, more samples and a new β1 are one operation, and a scripted engine shows it row by row."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from benchmarks.tiny_model import save_tiny_model
from common.errors import UserError
from common.provenance import read_provenance
from common.runs import WHOLE, Shard, exclusive_run, run_paths
from common.sampling import writer as writer
from common.sampling.missing import Missing
from common.seeds import derive_seed
from stage1_vstar.filter import drop_rules, filter_prompts
from stage1_vstar.rescore import rescore
from tests.conftest import RunCli
from tests.fakes import EngineDied, ScriptedEngine, rows_of_samples, sample_rows, tiny_config
from tests.stage1_runs import QUESTIONS, Engines, rows_of, run, stored
from tests.stage1_runs import write_questions as write_questions


@pytest.mark.usefixtures("engines")
def test_each_prompt_gets_n_graded_samples_and_one_row(tiny_model: Path, data_file: Path) -> None:
    run(tiny_config(tiny_model, data_file))
    samples, rows = stored(), rows_of()
    assert samples.height == QUESTIONS * 4
    assert rows["prompt"].to_list() == [f"How many is {number}?" for number in range(QUESTIONS)]
    for sample in samples.iter_rows(named=True):
        seed = derive_seed(0, sample["prompt_id"], sample["sample_index"])
        correct = seed % 7 != 0 and 1 + seed % 4 == int(sample["answer"])
        assert sample["outcome"] == ("correct" if correct else "truncated" if seed % 7 == 0 else "wrong")
        assert sample["reward"] == float(correct)
        assert sample["completion_tokens"] == 1 + seed % 12
    assert 0 < samples["reward"].sum() < samples.height
    for row in rows.iter_rows(named=True):
        of_prompt = samples.filter(pl.col("prompt_id") == row["prompt_id"])
        assert row["rewards"] == of_prompt["reward"].to_list()
        assert row["outcomes"] == of_prompt["outcome"].to_list()
        assert row["completion_tokens"] == of_prompt["completion_tokens"].to_list()
    assert rows["keep"].all()


def test_an_interrupted_run_continues_with_what_is_missing_and_gives_the_same_rows(
    tiny_model: Path, data_file: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config(tiny_model, data_file, run="whole"))
    assert len(set(engines.next.drawn)) == QUESTIONS * 4

    monkeypatch.setattr(writer, "FRAGMENT_SAMPLES", 3)
    config = tiny_config(tiny_model, data_file)
    samples = run_paths("test").samples

    def fragments() -> list[Path]:
        return list(samples.glob("part-*"))

    def one_more_than(many: int) -> Callable[[], bool]:
        return lambda: len(fragments()) > many

    for _ in range(2):
        engines.next = ScriptedEngine(dies_when=one_more_than(len(fragments())))
        with pytest.raises(EngineDied):
            run(config)
        assert not run_paths("test").vstar.exists()
    there = list(pl.read_parquet(fragments()).select("prompt_id", "sample_index").iter_rows())
    assert 6 <= len(there) < QUESTIONS * 4
    engines.next = ScriptedEngine()
    run(config)
    assert sorted([*there, *engines.next.drawn]) == sorted(
        stored().select("prompt_id", "sample_index").iter_rows()
    )
    assert stored().equals(stored("whole"))
    assert rows_of().equals(rows_of("whole"))


def test_a_second_run_does_nothing(tiny_model: Path, data_file: Path, engines: Engines) -> None:
    config = tiny_config(tiny_model, data_file)
    run(config)
    before = {path: path.read_bytes() for path in run_paths("test").root.rglob("*") if path.is_file()}
    assert "nothing to do" in run(config)
    assert engines.loaded == 1
    assert {path: path.read_bytes() for path in run_paths("test").root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("beta1", [0.0, 0.1, float("inf")])
def test_a_new_beta1_needs_no_engine(
    tiny_model: Path, data_file: Path, engines: Engines, beta1: float
) -> None:
    run(tiny_config(tiny_model, data_file))
    before = rows_of()
    run(tiny_config(tiny_model, data_file, vstar={"beta1": beta1}))
    after = rows_of()
    assert engines.loaded == 1
    assert after["beta1"].to_list() == [beta1] * QUESTIONS
    assert after.drop("beta1", "vstar", "vstar_se").equals(before.drop("beta1", "vstar", "vstar_se"))
    if beta1 == 0.0:
        assert after["vstar"].to_list() == [max(rewards) for rewards in after["rewards"]]
    elif beta1 == 0.1:
        assert (after["vstar"] >= before["vstar"]).all()
    else:
        assert after["vstar"].to_list() == after["pass_rate"].to_list()


def test_more_samples_a_prompt_draws_only_the_missing_ones(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file))
    four = rows_of()
    engines.next = ScriptedEngine()
    run(tiny_config(tiny_model, data_file, vstar={"num_samples": 7}))
    assert sorted({index for _, index in engines.next.drawn}) == [4, 5, 6]
    assert len(engines.next.drawn) == QUESTIONS * 3
    seven = rows_of()
    assert [rewards[:4] for rewards in seven["rewards"].to_list()] == four["rewards"].to_list()
    assert seven["num_samples"].to_list() == [7] * QUESTIONS
    run(tiny_config(tiny_model, data_file, vstar={"num_samples": 4}))
    assert engines.loaded == 2
    assert rows_of().equals(four)


def test_more_prompts_draw_only_the_missing_ones_and_fewer_read_fewer(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file, data={"limit": 2}))
    two = rows_of()
    engines.next = ScriptedEngine()
    run(tiny_config(tiny_model, data_file))
    assert len(engines.next.drawn) == (QUESTIONS - 2) * 4
    assert rows_of().filter(pl.col("prompt_id").is_in(two["prompt_id"].to_list())).equals(two)
    assert rows_of().height == QUESTIONS
    run(tiny_config(tiny_model, data_file, data={"limit": 2}))
    assert rows_of().equals(two)
    assert engines.loaded == 2


@pytest.mark.usefixtures("engines")
def test_samples_depend_on_the_seed(tiny_model: Path, data_file: Path) -> None:
    run(tiny_config(tiny_model, data_file))
    run(tiny_config(tiny_model, data_file, run="other", seed=1))
    assert not stored()["completion_tokens"].equals(stored("other")["completion_tokens"])
    assert stored()["prompt_id"].equals(stored("other")["prompt_id"])


def test_unsolved_prompts_can_be_marked_at_once(tiny_model: Path, data_file: Path, engines: Engines) -> None:
    engines.next = ScriptedEngine(lambda _: "#### 1")
    run(tiny_config(tiny_model, data_file, vstar={"drop_unsolved": True}))
    assert rows_of()["keep"].to_list() == rows_of()["pass_at_n"].to_list()
    assert 0 < rows_of()["keep"].sum() < QUESTIONS


def test_the_second_of_two_jobs_is_told_before_it_loads_an_engine(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    with (
        exclusive_run(run_paths("test"), "vstar"),
        pytest.raises(UserError, match=r"another vstar job \(process \d+ on .+\) is writing"),
    ):
        run(tiny_config(tiny_model, data_file))
    assert engines.loaded == 0


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature is 1.0 there and 0.7 here"),
        (
            {"sampling": {"max_completion_tokens": 11}},
            "sampling.max_completion_tokens is 12 there and 11 here",
        ),
        ({"data": {"template": "plain"}}, r'prompt.template is "{prompt}\n" there and "{prompt}" here'),
        ({"grader": {"name": "math"}}, 'grader is "gsm8k/4" there and "math/'),
        ({"seed": 5}, "seed is 0 there and 5 here"),
    ],
)
def test_samples_of_another_distribution_are_refused_with_the_difference(
    tiny_model: Path, data_file: Path, engines: Engines, section: dict[str, Any], expected: str
) -> None:
    run(tiny_config(tiny_model, data_file))
    with pytest.raises(UserError) as caught:
        run(tiny_config(tiny_model, data_file, **section))
    assert expected in str(caught.value)
    assert "choose another --run" in str(caught.value)
    assert engines.loaded == 1


@pytest.mark.usefixtures("engines")
def test_samples_of_another_model_are_refused(tiny_model: Path, tmp_path: Path, data_file: Path) -> None:
    run(tiny_config(tiny_model, data_file))
    save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(
        UserError,
        match=r'model\.weights is "[0-9a-f]+" there and "[0-9a-f]+" here; remove it or choose another',
    ):
        run(tiny_config(tmp_path / "other", data_file))


def test_an_artifact_of_another_distribution_is_not_overwritten(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    run(tiny_config(tiny_model, data_file))
    for fragment in run_paths("test").samples.iterdir():
        fragment.unlink()
    before = run_paths("test").vstar.read_bytes()
    with pytest.raises(UserError, match=r"seed is 0 there and 3 here; remove it or choose another --run"):
        run(tiny_config(tiny_model, data_file, seed=3))
    assert run_paths("test").vstar.read_bytes() == before
    assert engines.loaded == 1


@pytest.mark.usefixtures("engines")
def test_a_filters_flags_survive_a_new_beta1_and_more_samples(tiny_model: Path, data_file: Path) -> None:
    run(tiny_config(tiny_model, data_file))
    path = run_paths("test").vstar
    filter_prompts(path, None, drop_rules(unsolved=True, solved=False, min_pass_rate=0.3, max_pass_rate=1))
    flags = rows_of()["keep"].to_list()
    assert 0 < sum(flags) < QUESTIONS
    assert "nothing to do" in run(tiny_config(tiny_model, data_file))
    rescore(path, path, 0.0)
    assert rows_of()["keep"].to_list() == flags
    run(tiny_config(tiny_model, data_file, vstar={"num_samples": 5, "beta1": 2.0}))
    assert rows_of()["keep"].to_list() == flags
    assert read_provenance(path).context["filters"] == ["pass@N = 0", "pass rate below 0.3"]


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(("unsolved", "said"), [(False, True), (True, False)])
def test_drop_unsolved_after_another_filter_is_said_to_change_nothing(
    tiny_model: Path, data_file: Path, unsolved: bool, said: bool
) -> None:
    run(tiny_config(tiny_model, data_file))
    rules = drop_rules(unsolved=unsolved, solved=True, min_pass_rate=0, max_pass_rate=1)
    filter_prompts(run_paths("test").vstar, None, rules)
    flags = rows_of()["keep"].to_list()
    printed = run(tiny_config(tiny_model, data_file, vstar={"drop_unsolved": True}))
    line = "vstar.drop_unsolved changes nothing: the flags stay as `filter` has set them (all correct); "
    assert (line in printed) is said
    assert ("`python cli.py filter --run test`" in printed) is said
    assert rows_of()["keep"].to_list() == flags
    assert "changes nothing" not in run(tiny_config(tiny_model, data_file))


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)], ids=str)
def test_a_check_that_had_nothing_to_compare_says_so(tiny_model: Path, data_file: Path, shard: Shard) -> None:
    config = tiny_config(tiny_model, data_file)
    assert "--check" not in run(config, shard)
    assert "--check compared nothing: no sample is missing" in run(config, shard, check=True)
    assert "--check" not in run(config, shard)


def test_answers_that_no_grader_can_use_are_refused_before_the_engine_loads_or_dropped(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    with data_file.open("a") as file:
        file.write('\n{"prompt": "How far?", "answer": "far"}')
    with pytest.raises(UserError, match=r"1 of 7 reference answers .*How far\?.* set data\.bad_golds"):
        run(tiny_config(tiny_model, data_file))
    assert engines.loaded == 0
    dropping = tiny_config(tiny_model, data_file, data={"bad_golds": "drop"})
    assert "1 prompts dropped" in run(dropping)
    assert rows_of().height == QUESTIONS
    assert "nothing to do" in run(dropping)
    assert engines.loaded == 1


def test_a_data_set_without_any_usable_answer_is_refused(
    tiny_model: Path, tmp_path: Path, engines: Engines
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "How far?", "answer": "far"}\n')
    with pytest.raises(
        UserError, match="no prompt is left: the grader can use none of the reference answers"
    ):
        run(tiny_config(tiny_model, path, data={"bad_golds": "drop"}))
    assert engines.loaded == 0


def test_a_failed_write_of_the_artifact_leaves_none_and_loses_no_sample(
    tiny_model: Path, data_file: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stage1_vstar.run.write_vstar", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run(tiny_config(tiny_model, data_file))
    assert not run_paths("test").vstar.exists()
    run(tiny_config(tiny_model, data_file))
    assert engines.loaded == 1
    assert rows_of().height == QUESTIONS


def test_rewards_of_a_users_own_may_be_any_number(
    tiny_model: Path, data_file: Path, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stage1_test_reward.py").write_text(
        "def length(prompt, completion, answer):\n    return -1e6 if len(completion) % 2 else 0.25\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    engines.next = ScriptedEngine(lambda request: "x" * (request.seed % 5))
    run(tiny_config(tiny_model, data_file, grader={"name": "stage1_test_reward:length"}))
    rewards = set(stored().filter(pl.col("outcome") != "truncated")["reward"])
    assert rewards == {-1e6, 0.25}
    assert rows_of()["vstar"].max() <= 0.25  # type: ignore[operator]


def test_missing_samples_keep_each_prompts_together(tiny_model: Path, data_file: Path) -> None:
    from common.data.prompts import load_prompts
    from common.data.rendering import PromptRenderer

    config = tiny_config(tiny_model, data_file)
    prompts = load_prompts(config.data, config, PromptRenderer(tiny_model, config.data))[:3]
    missing = Missing(prompts, np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=bool))
    assert len(missing) == 4
    requests = list(missing.requests(seed=7))
    assert [request.key for request in requests] == [
        (prompts[0].id, 0),
        (prompts[0].id, 2),
        (prompts[2].id, 1),
        (prompts[2].id, 2),
    ]
    assert requests[3].seed == derive_seed(7, prompts[2].id, 2)
    assert [prompt.id for prompt in missing.incomplete().prompts] == [prompts[0].id, prompts[2].id]
    assert [request.seed for request in missing.incomplete().of({prompts[2].id}).requests(seed=7)] == [
        derive_seed(7, prompts[2].id, 1),
        derive_seed(7, prompts[2].id, 2),
    ]


def test_the_rows_do_not_depend_on_the_order_in_which_samples_came() -> None:
    samples = sample_rows({"a": ["correct", "wrong", "wrong"], "b": ["wrong", "correct", "correct"]})
    rows = rows_of_samples(samples, num_samples=3)
    shuffled = rows_of_samples(samples.sample(fraction=1, shuffle=True, seed=4), num_samples=3)
    assert shuffled.sort("prompt_id").equals(rows)


def test_a_samples_seed_follows_from_its_address_alone() -> None:
    assert derive_seed(0, "p", 1) == derive_seed(0, "p", 1)
    seeds = {derive_seed(seed, prompt, index) for seed in range(3) for prompt in "abc" for index in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(1, "2", 3) != derive_seed(12, "", 3)


TOML = """
run = "test"
[model]
path = "{model}"
dtype = "float32"
[data]
format = "generic"
path = "{data}"
template = "line"
max_prompt_tokens = 64
[sampling]
max_completion_tokens = 12
[grader]
name = "gsm8k"
[vstar]
num_samples = 4
"""


def test_stage_one_with_vllm_gives_the_same_rows_whatever_else_is_in_the_batch(
    tiny_model: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(TOML.format(model=tiny_model, data=write_questions(tmp_path / "data.jsonl", 8)))
    first = run_cli("vstar", "--config", config, timeout=240)
    assert first.returncode == 0, first.stderr
    rows, samples = rows_of(), stored()
    assert rows.height == 8
    assert samples.height == 32

    for sample in samples.iter_rows(named=True):
        marked = re.findall(r"#### (\d+)", sample["completion"])
        if sample["outcome"] == "truncated":
            assert sample["completion_tokens"] == 12
            assert sample["reward"] == 0.0
        else:
            assert sample["reward"] == float(bool(marked) and marked[-1] == sample["answer"]), sample
    assert 0 < samples["reward"].sum() < 32

    second = run_cli("vstar", "--config", config)
    assert second.returncode == 0, second.stderr
    assert "nothing to do" in second.stdout

    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines[::-1]))
    arguments = ("--config", config, "--run", "again", "--set", f"data.path={tmp_path / 'shuffled.jsonl'}")
    again = run_cli("vstar", *arguments, "--set", "engine.max_num_seqs=3", timeout=240, warm=True)
    assert again.returncode == 0, again.stderr
    assert stored("again").equals(samples)
    assert rows_of("again").reverse().equals(rows)


def test_stage_one_never_imports_the_trainer() -> None:
    script = (
        "import sys\n"
        "import stage1_vstar.run, common.sampling.generate, common.engines\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'deepspeed', 'stage2_train', 'vllm', 'torch'}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_a_grader_that_can_judge_nothing_stops_the_run_and_keeps_nothing(
    engines: Engines, data_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text(
        "def reward(prompt, completion, answer):\n    return completion.score\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(tiny_model, data_file, grader={"name": "broken_reward:reward"})
    with pytest.raises(
        UserError, match=r"the grader could judge none of the first .* 'str' object has no attribute"
    ):
        run(config)
    assert not list(run_paths("test").samples.glob("*.parquet"))
    assert not run_paths("test").vstar.exists()
    assert engines.loaded == 1


REWARD_WITHOUT_MERCY = """
def reward(prompt, completion, answer):
    if completion.endswith("4"): raise ValueError("no [/b] for [red]you")
    return 1.0
"""


@pytest.fixture
def merciless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stage1_test_reward.py").write_text(REWARD_WITHOUT_MERCY)
    monkeypatch.syspath_prepend(tmp_path)
    return "stage1_test_reward:reward"


def test_a_few_hard_samples_that_were_left_over_do_not_condemn_the_grader(
    tiny_model: Path, data_file: Path, engines: Engines, merciless: str
) -> None:
    engines.next = ScriptedEngine(lambda _: "1")
    run(tiny_config(tiny_model, data_file, grader={"name": merciless}))
    engines.next = ScriptedEngine(lambda _: "4")
    printed = run(tiny_config(tiny_model, data_file, grader={"name": merciless}, vstar={"num_samples": 5}))
    assert rows_of()["outcomes"].list.count_matches("verifier_crash").max() == 1
    assert "no [/b] for [red]you" in printed


def test_what_was_graded_when_the_engine_died_is_kept(
    tiny_model: Path, data_file: Path, engines: Engines
) -> None:
    engines.next = ScriptedEngine(dies_when=lambda: len(engines.next.drawn) == 12, sample_seconds=0.05)
    with pytest.raises(EngineDied):
        run(tiny_config(tiny_model, data_file))
    [fragment] = run_paths("test").samples.glob("part-*")
    assert pl.read_parquet(fragment).height >= 8


def test_a_folder_that_is_a_file_is_named(
    tiny_model: Path, data_file: Path, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(tmp_path / "file"))
    with pytest.raises(
        UserError,
        match=r"cannot write to .*file/test: a file stands where the path has a folder; .*ASTAR_PO_ARTIFACTS",
    ):
        run(tiny_config(tiny_model, data_file))
    monkeypatch.setenv("ASTAR_PO_ARTIFACTS", str(tmp_path / "artifacts"))
