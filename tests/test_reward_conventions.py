"""Reward functions as other libraries call them: each convention, unchanged, through the grading of both stages."""

import io
import json
import re
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.data.datasets import read_data_set, read_pairs
from common.data.prompts import longest_allowed_completion, longest_allowed_prompt
from common.errors import UserError
from common.grading import GraderConfig, GraderPool, GradingTask, Outcome, fingerprint, row_needs
from common.grading.conventions import recognise
from common.grading.reference import Reference, reference_of
from common.rollout import Prompt
from common.runs import run_paths
from common.terminal.console import Terminal
from stage1_vstar.regrade import run_regrade
from stage2_train.config import Config
from stage2_train.sources.rollouts import as_json, collect_rollouts, from_json
from tests import stage2_runs
from tests.conftest import RunCli
from tests.fakes import ScriptedEngine, tiny_config
from tests.stage1_runs import Engines, run, stored

FUNCTIONS = """
import asyncio, os, time

# As TRL calls them: lists in, a list out, the other columns of the data set by name.

def trl_text(prompts, completions, answer, **kwargs):
    assert sorted(kwargs) == ["completion_ids", "completions_ids", "level", "log_extra", "log_metric",
                              "tags", "trainer_state"], sorted(kwargs)
    kwargs["log_metric"]("seen", 1.0)
    return [float(right in said) for said, right in zip(completions, answer, strict=True)]

def trl_messages(prompts, completions, level, **kwargs):
    assert prompts[0][-1]["role"] == "user", prompts
    return [float(turns[0]["content"].count("so")) / how for turns, how in zip(completions, level, strict=True)]

def trl_only_completions(completions, **kwargs):
    return [float(len(said)) for said in completions]

def trl_token_ids(completions, completion_ids, trainer_state=None):
    return [float(len(ids)) for ids in completion_ids]

async def trl_async(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.5 for _ in completions]

def trl_sometimes_none(completions, **kwargs):
    return [None if "1" in said else 1.0 for said in completions]

def trl_lone_messages(completions):
    return [float(len(turns[-1]["content"])) for turns in completions]

def trl_by_place(completions, /, **kwargs):
    return [1.0]

def trl_missing_is_none(completions, level, **kwargs):
    return [0.5 if how is None else 1.0 for how in level]

def trl_too_many(completions, **kwargs):
    return [1.0, 1.0]

def trl_one_number(completions, **kwargs):
    return 1.0

# As verl calls it.

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert (data_source, extra_info) == ("mine", {"index": 7}), (data_source, extra_info)
    assert not kwargs
    return float(ground_truth in solution_str)

def compute_score_dict(data_source, solution_str, ground_truth, extra_info=None):
    right = ground_truth in solution_str
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str[-1:]}

def compute_score_of_list(data_source, solution_str, ground_truth, extra_info=None):
    assert isinstance(ground_truth, list)
    return float(any(each in solution_str for each in ground_truth))

def compute_score_partly(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.25, "acc": 0.25}

def compute_score_of_number(solution_str, ground_truth, **kwargs):
    assert kwargs == {"data_source": "mine", "extra_info": {"index": 7}}, kwargs
    return float(int(solution_str[-1]) == ground_truth)

def compute_score_without_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"acc": True}

# As verifiers calls them: any of these by name, messages.

def verifiers_contains(completion, answer):
    return 1.0 if answer in completion[-1]["content"] else 0.0

def verifiers_of_list(completion, answer):
    assert answer == ["4", "3"], answer
    return float(completion[-1]["content"][-1] in answer)

def verifiers_kwargs(completion, **kwargs):
    return float(kwargs["info"]["weight"] * kwargs["answer"])

async def verifiers_with_all(completion, prompt, answer, state, info, task, **kwargs):
    assert state["completion"] == completion and state["prompt"] == prompt
    assert prompt[-1]["role"] == "user"
    await asyncio.sleep(0)
    return float(info["weight"]) if task == "sums" else 0.0

# As we call them.

def plain(prompt, completion, answer):
    assert isinstance(prompt, str) and isinstance(completion, str)
    return float(answer in completion)

def plain_with_column(prompt, completion, answer, level, missing="nothing"):
    assert missing == "nothing"
    return float(level)

async def plain_async(prompt, completion, answer):
    await asyncio.sleep(0.01)
    return float(answer in completion)

class Counting:
    def __call__(self, completions, **kwargs):
        return [2.0 for _ in completions]

counting = Counting()

# Faults, told by the completion.

def _fault(said):
    if "raise" in said: raise RuntimeError("no")
    if "none" in said: return None
    if "nan" in said: return float("nan")
    if "list" in said: return [1.0]
    if "loop" in said:
        while True: pass
    if "sleep" in said: time.sleep(1000)
    if "exit" in said: os._exit(3)
    return 1.0

def trl_faulty(completions, **kwargs): return [_fault(said) for said in completions]
def verl_faulty(solution_str, ground_truth): return _fault(solution_str)
def verifiers_faulty(completion): return _fault(completion[0]["content"])
def plain_faulty(prompt, completion, answer): return _fault(completion)

async def async_faulty(completions, **kwargs):
    if "forever" in completions[0]:
        await asyncio.sleep(1000)
    if "leave" in completions[0]:
        await asyncio.sleep(0.01)
        raise SystemExit(1)
    while "stubborn" in completions[0]:
        try:
            await asyncio.sleep(1000)
        except BaseException:
            pass
    return [_fault(said) for said in completions]
"""

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with these functions."""
    (tmp_path / "their_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_rewards"


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(model: Path, path: Path, grader: dict[str, Any], **data: Any) -> Config:
    return tiny_config(
        model,
        path,
        data={"format": "auto", "template": "line", **data},
        grader=grader,
        vstar={"num_samples": 2},
    )


TRL_ROW = {"prompt": "How many is 3?", "answer": "3", "level": 2, "tags": ["easy"]}
VERL_ROW = {
    "data_source": "mine",
    "prompt": [{"role": "user", "content": "How many is 3?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 7},
}
CASES = [
    ("trl_text", TRL_ROW, 1.0, "correct"),
    ("trl_messages", {"prompt": MESSAGES[1:], "level": 4}, 0.25, "wrong"),
    ("trl_only_completions", {"prompt": "How many is 3?"}, 9.0, "correct"),
    ("trl_async", TRL_ROW, 0.5, "wrong"),
    ("counting", TRL_ROW, 2.0, "correct"),
    ("compute_score", VERL_ROW, 1.0, "correct"),
    ("compute_score_dict", VERL_ROW, 1.0, "correct"),
    (
        "compute_score_of_list",
        VERL_ROW | {"reward_model": {"ground_truth": ["4", "3"]}},
        1.0,
        "correct",
    ),
    ("compute_score_partly", VERL_ROW, 0.25, "wrong"),
    ("compute_score_of_number", VERL_ROW | {"reward_model": {"ground_truth": 3}}, 1.0, "correct"),
    ("verifiers_of_list", {"question": "How many is 3?", "answer": ["4", "3"]}, 1.0, "correct"),
    ("verifiers_kwargs", {"prompt": "How?", "answer": 3, "info": {"weight": 0.25}}, 0.75, "wrong"),
    ("trl_lone_messages", {"prompt": MESSAGES[1:], "answer": "3"}, 9.0, "correct"),
    ("verifiers_contains", {"question": "How many is 3?", "answer": "3"}, 1.0, "correct"),
    (
        "verifiers_with_all",
        {"prompt": "How many is 3?", "answer": "3", "info": json.dumps({"weight": 0.75}), "task": "sums"},
        0.75,
        "wrong",
    ),
    ("plain", TRL_ROW, 1.0, "correct"),
    ("plain_async", TRL_ROW, 1.0, "correct"),
    ("plain_with_column", TRL_ROW, 2.0, "correct"),
]


@pytest.mark.parametrize(("function", "row", "reward", "outcome"), CASES, ids=[case[0] for case in CASES])
def test_a_function_of_each_convention_grades_in_both_stages(
    tmp_path: Path,
    functions: str,
    engines: Engines,
    tiny_model: Path,
    function: str,
    row: dict[str, Any],
    reward: float,
    outcome: str,
) -> None:
    engines.next = ScriptedEngine(lambda request: "so #### 3")
    config = config_of(tiny_model, rows_file(tmp_path, [row]), {"name": f"{functions}:{function}"})
    run(config)
    samples = stored()
    graded = samples.filter(samples["outcome"] != "truncated")
    assert {*graded["reward"]} <= {reward}
    assert {*graded["outcome"]} <= {outcome}

    # Stage 2 knows the prompt from stage 1's file alone.
    text, answer = samples["prompt"][0], samples["answer"][0]
    with GraderPool(config.grader) as pool:
        ((rollout,),) = collect_rollouts(
            [Prompt(id="x", text=text, answer=answer, token_ids=[1], token_hash="")],  # type: ignore[arg-type]
            ScriptedEngine(lambda request: "so #### 3"),
            pool,
            config.sampling,
            seed=3,
            places=[0],
        )
    if rollout.graded.outcome != Outcome.TRUNCATED:
        assert (rollout.reward, rollout.graded.outcome) == (reward, outcome)


def grade(name: str, *completions: str, answer: str = "3", **options: Any) -> list[tuple[str, float, str]]:
    config = GraderConfig(name=name, **{"timeout_seconds": 1.0, **options})
    with GraderPool(config) as pool:
        tasks = [GradingTask(prompt="How many?", completion=each, answer=answer) for each in completions]
        return [(each.outcome.value, each.reward, each.reason or "") for each in pool.grade_all(tasks)]


@pytest.mark.parametrize("function", ["trl_faulty", "verl_faulty", "verifiers_faulty", "plain_faulty"])
def test_a_fault_costs_its_own_completion_and_says_what_it_was(functions: str, function: str) -> None:
    faults = ["good", "raise", "none", "nan", "loop", "good", "exit", "list", "sleep", "good"]
    grades = dict(zip(range(10), grade(f"{functions}:{function}", *faults), strict=True))
    assert [grades[place][:2] for place in (0, 5, 9)] == [("correct", 1.0)] * 3
    reasons = {
        1: "RuntimeError: no",
        2: "None",
        3: "the reward is nan",
        4: "over 1 s",
        6: "the grading process left with exit status 3",
        7: "not ",
        8: "over 1 s",
    }
    for place, reason in reasons.items():
        assert grades[place][:2] == ("verifier_timeout" if reason == "over 1 s" else "verifier_crash", 0.0)
        assert reason in grades[place][2]


def test_faults_of_an_async_function_leave_the_others_alone(functions: str) -> None:
    """They are under way together: one waits for ever, one lets no other run, one ends the process of all."""
    faults = ["good", "forever", "raise", "good", "loop", "nan", "good", "exit", "good", "leave", "stubborn"]
    grades = grade(f"{functions}:async_faulty", *faults)
    assert [each[0] for each in grades if each[0] == "correct"] == ["correct"] * 4
    assert [grades[place][0] for place in (1, 4, 10)] == ["verifier_timeout"] * 3
    assert [grades[place][0] for place in (2, 5, 7, 9)] == ["verifier_crash"] * 4


@pytest.mark.parametrize("name", ["busy", ["busy_sync", "busy_not"]])
def test_many_that_keep_the_process_busy_for_a_while_are_not_late(
    tmp_path: Path, functions: str, name: Any
) -> None:
    """32 at a time take longer together than one of them may."""
    (tmp_path / "busy_rewards.py").write_text(
        "import asyncio, time\n"
        "async def busy(prompt, completion, answer):\n"
        "    await asyncio.sleep(0); time.sleep(0.035); return 1.0\n"
        "def busy_sync(prompt, completion, answer):\n"
        "    time.sleep(0.035); return 1.0\n"
        "async def busy_not(prompt, completion, answer):\n"
        "    await asyncio.sleep(0.01); return 1.0\n"
    )
    names = [f"busy_rewards:{each}" for each in ([name] if isinstance(name, str) else name)]
    grades = grade(names, *("x" * 64), timeout_seconds=1.0)  # type: ignore[arg-type]
    assert {each[0] for each in grades} == {"correct"}


def test_async_functions_wait_together(functions: str, tmp_path: Path) -> None:
    (tmp_path / "slow_rewards.py").write_text(
        "import asyncio\nnow = most = 0\n"
        "async def reward(completions, **kwargs):\n"
        "    global now, most\n"
        "    now += 1; most = max(most, now)\n"
        "    await asyncio.sleep(0.2)\n"
        "    now -= 1\n"
        "    return [float(most)]\n"
    )
    rewards = [each[1] for each in grade("slow_rewards:reward", *("x" * 24), max_concurrent=8)]
    assert max(rewards) == 8


def test_token_ids_reach_a_function_that_names_them(functions: str) -> None:
    with GraderPool(GraderConfig(name=f"{functions}:trl_token_ids")) as pool:
        assert pool.reads_token_ids
        task = GradingTask(prompt="", completion="abc", answer="", token_ids=(5, 6, 7))
        (found,) = pool.grade_all([task])
    assert found.reward == 3.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("trl_too_many", "2 rewards for 1 completion"),
        ("trl_one_number", "a float, not a list of rewards"),
        ("compute_score_without_score", "a dict with acc, without score"),
    ],
)
def test_a_function_that_breaks_its_convention_is_refused_before_anything_is_drawn(
    functions: str, function: str, reason: str
) -> None:
    with (
        GraderPool(GraderConfig(name=f"{functions}:{function}")) as pool,
        pytest.raises(UserError, match=f"returns what is no reward: {reason}"),
    ):
        pool.try_out("How many?", "3")


def test_a_function_that_no_name_reaches_is_refused(functions: str) -> None:
    with pytest.raises(UserError, match="called by name as trl does, it gets no completions"):
        row_needs(GraderConfig(name=f"{functions}:trl_by_place"))


def test_a_cell_that_a_row_lacks_is_none_as_in_trl(tmp_path: Path, functions: str) -> None:
    path = rows_file(tmp_path, [TRL_ROW, {"prompt": "x", "answer": "3"}])
    config = config_of(Path("m"), path, {"name": f"{functions}:trl_missing_is_none"})
    answers = [answer for _, answer in read_pairs(config.data, config)]
    assert [grade(config.grader.names[0], "x", answer=answer)[0][1] for answer in answers] == [1.0, 0.5]


def test_names_of_columns_that_no_file_can_hold_are_replaced() -> None:
    text = Reference(answer="3", columns={"\ud800": {"\udfff": "\ud800"}}).to_text()
    assert reference_of(text).columns == {"?": {"?": "?"}}
    text.encode()


def test_an_answer_with_nothing_beside_it_is_held_as_its_text() -> None:
    assert Reference(answer="3").to_text() == "3"
    row = Reference(answer="3", columns={"level": 2}).to_text()
    assert reference_of(Reference(answer=row).to_text()) == Reference(answer=row)


def test_token_ids_reach_a_function_after_a_process_has_died(tmp_path: Path, functions: str) -> None:
    (tmp_path / "dying_rewards.py").write_text(
        "import os\n"
        "def reward(completions, completion_ids, **kwargs):\n"
        "    if 'exit' in completions[0]: os._exit(3)\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    with GraderPool(GraderConfig(name="dying_rewards:reward")) as pool:
        for number in range(200):
            said = "exit" if number == 20 else "x"
            pool.submit(number, prompt="", completion=said, answer="", truncated=False, token_ids=(1, 2, 3))
            time.sleep(0.001)
        rewards = {number: found.reward for number, found in pool.drain()}
    assert rewards == {number: 0.0 if number == 20 else 3.0 for number in range(200)}


def test_a_sum_that_is_no_number_is_no_reward(tmp_path: Path, functions: str) -> None:
    (tmp_path / "large_rewards.py").write_text("def reward(prompt, completion, answer): return 1e308\n")
    (found,) = grade(["large_rewards:reward", "gsm8k"], "#### 3", weights=[10.0, 1.0])  # type: ignore[arg-type]
    assert found == ("verifier_crash", 0.0, "the sum of the rewards is inf")


def test_rewards_of_several_functions_are_added_with_their_weights(functions: str) -> None:
    names = ["gsm8k", f"{functions}:trl_only_completions", f"{functions}:plain"]
    right, wrong = grade(names, "#### 3", "#### 4", weights=[1.0, 0.1, -2.0])  # type: ignore[arg-type]
    assert (right[0], wrong[0]) == ("correct", "wrong")
    assert [right[1], wrong[1]] == pytest.approx([1 + 0.6 - 2, 0.6])
    assert right[2] == f"gsm8k 1, {names[1]} 6, {names[2]} 1"


WEIGHTS: list[list[float] | None] = [None, [1, 1], [1, 0.5]]


def test_weights_are_one_by_default_and_belong_to_the_grader(functions: str) -> None:
    names = ["gsm8k", f"{functions}:plain"]
    (both,) = grade(names, "#### 3")  # type: ignore[arg-type]
    assert both[1] == 2.0
    prints = [fingerprint(GraderConfig(name=names, weights=weights)) for weights in WEIGHTS]
    assert prints[0] == prints[1] != prints[2]
    assert prints[2].startswith("1 gsm8k/4 + 0.5 their_rewards:plain@")
    assert fingerprint(GraderConfig(name=names[1:])) == fingerprint(GraderConfig(name=names[1]))


def test_graders_that_differ_have_results_of_their_own() -> None:
    """Weights that differ in a late digit or in their sign, marks that differ in their brackets, and many names."""
    names = ["gsm8k", "math"]
    configs = [
        *({"name": names, "weights": [1.0, weight]} for weight in (0.1234567, 0.1234568, 1.0, -1.0)),
        *({"name": "gsm8k", "answer_after": mark} for mark in ("<think>", "[think]")),
    ]
    prints = [fingerprint(GraderConfig.model_validate(config)) for config in configs]
    prints += [f"{'module.' * 60}:{name} + 1 math/3" for name in names]
    folders = {run_paths("test").regraded_by(each).root.name for each in prints}
    assert len({*prints}) == len(folders) == len(prints)
    assert max(map(len, folders)) < 200
    assert run_paths("test").regraded_by("math/3").root.name == "math-3"


def test_a_reward_that_does_not_apply_is_left_out_and_a_failure_is_not(functions: str) -> None:
    names = ["gsm8k", f"{functions}:trl_sometimes_none"]
    without, with_both = grade(names, "#### 1", "#### 3")  # type: ignore[arg-type]
    assert (without[:2], with_both[:2]) == (("wrong", 0.0), ("correct", 2.0))
    (failed,) = grade(["gsm8k", f"{functions}:plain_faulty"], "raise #### 3")  # type: ignore[arg-type]
    assert failed[:2] == ("verifier_crash", 0.0)
    assert failed[2] == "RuntimeError: no"
    (alone,) = grade(names[1], "#### 1")
    assert alone == ("verifier_crash", 0.0, "None: the reward does not apply")


def test_the_parts_of_a_reward_survive_a_checkpoint(functions: str) -> None:
    prompt = Prompt(id="x", text="?", answer="3", token_ids=[1], token_hash="")  # type: ignore[arg-type]
    config = GraderConfig(name=["gsm8k", f"{functions}:plain"])
    with GraderPool(config) as pool:
        ((rollout,),) = collect_rollouts(
            [prompt],
            ScriptedEngine(lambda request: "#### 3"),
            pool,
            tiny_config(Path("m"), Path("d")).sampling,
            seed=3,
            places=[0],
        )
    assert rollout.graded.parts == (("gsm8k", 1.0), (f"{functions}:plain", 1.0))
    again = from_json(json.loads(json.dumps(as_json(rollout))), {"x": prompt})
    assert again.grade == rollout.grade


def test_what_follows_the_thinking_is_graded_by_rules_and_functions_get_all(functions: str) -> None:
    completions = [
        "<think>#### 4</think>#### 3",
        "<think>#### 3</think>#### 4",
        "#### 3",
        "</think> <think> </think>",
    ]
    found = grade("gsm8k", *completions, answer_after="</think>")
    assert [each[0] for each in found] == ["correct", "wrong", "unparsed", "unparsed"]
    assert found[2][2] == "there is no </think>"
    both = grade(["gsm8k", f"{functions}:trl_only_completions"], completions[0], answer_after="</think>")  # type: ignore[arg-type]
    assert both[0][1] == 1 + len(completions[0])
    plain, after = (fingerprint(GraderConfig(name="gsm8k", answer_after=mark)) for mark in (None, "</think>"))
    assert (plain, after) == ("gsm8k/4", "gsm8k/4 after </think>")


def test_an_answer_after_long_thinking_is_found() -> None:
    thinking = "wait, " * 30_000
    (found,) = grade("math", f"{thinking}</think>\\boxed{{3}} {'.' * 40_000}", answer_after="</think>")
    assert found[0] == "correct"


@pytest.mark.parametrize(
    ("function", "convention"),
    [
        ("lambda prompt, completion, answer: 1", "plain"),
        ("lambda question, response, gold: 1", "plain"),
        ("lambda prompt, completion, answer, level: 1", "plain"),
        ("lambda prompt, completion, answer, parser=None: 1", "plain"),
        ("lambda *arguments: 1", "plain"),
        ("lambda completions, **kwargs: 1", "trl"),
        ("lambda prompts, completions, solution: 1", "trl"),
        ("lambda data_source, solution_str, ground_truth, extra_info=None: 1", "verl"),
        ("lambda solution_str, ground_truth, **kwargs: 1", "verl"),
        ("lambda completion, answer: 1", "verifiers"),
        ("lambda completion, **kwargs: 1", "verifiers"),
        ("lambda state: 1", "verifiers"),
        ("lambda completion, prompt, answer: 1", "verifiers"),
    ],
)
def test_a_function_is_recognised_by_the_names_of_its_parameters(function: str, convention: str) -> None:
    assert recognise(eval(function)).convention == convention


@pytest.mark.parametrize(
    "function", ["lambda parser, completion, answer, **kwargs: 1", "lambda completion, answer, parser: 1"]
)
def test_a_function_that_needs_verifiers_parser_is_refused(function: str) -> None:
    with pytest.raises(ValueError, match="called as verifiers does, it gets no parser"):
        recognise(eval(function))


@pytest.mark.parametrize("name", ["state", "info", "task", "parser"])
def test_a_function_that_may_be_of_two_conventions_is_refused_until_one_is_named(name: str) -> None:
    function = eval(f"lambda prompt, completion, answer, {name}: 1")
    with pytest.raises(ValueError, match=r"may be ours, with texts, or verifiers.*set grader\.convention"):
        recognise(function)
    assert recognise(function, "plain").needs.columns == (name,)
    if name != "parser":
        assert recognise(function, "verifiers").convention == "verifiers"


def test_a_convention_that_is_named_decides(functions: str) -> None:
    (found,) = grade(f"{functions}:plain", "#### 3", convention="verifiers")
    assert found[0] == "verifier_crash"
    assert "AssertionError" in found[2]
    named = fingerprint(GraderConfig(name=f"{functions}:plain", convention="verifiers"))
    assert named.endswith(" as verifiers")


def test_only_what_a_function_reads_of_a_row_is_stored(tmp_path: Path, functions: str) -> None:
    path = rows_file(tmp_path, [TRL_ROW])

    def stored_of(function: str, **grader: Any) -> Reference:
        config = config_of(Path("m"), path, {"name": f"{functions}:{function}", **grader})
        ((_, answer),) = read_pairs(config.data, config)
        return reference_of(answer)

    assert stored_of("plain") == Reference(answer="3")
    assert stored_of("plain_with_column").columns == {"level": 2}
    assert stored_of("trl_text").columns == {"answer": "3", "level": 2, "tags": ["easy"]}
    assert stored_of("trl_only_completions", columns=["level"]).columns == {"level": 2}
    assert stored_of("trl_token_ids").columns == {}
    needs = row_needs(GraderConfig(name=f"{functions}:verifiers_with_all"))
    assert (needs.columns, needs.optional_columns) == ((), ("info", "task"))


def test_columns_that_would_swell_the_samples_are_refused_with_what_to_set(
    tmp_path: Path, functions: str
) -> None:
    path = rows_file(tmp_path, [TRL_ROW | {"generations": ["x" * 70_000]}])
    config = config_of(Path("m"), path, {"name": f"{functions}:trl_only_completions"})
    with pytest.raises(UserError, match=r"row 1: has 70,\d+ characters in its columns.* grader\.columns"):
        read_pairs(config.data, config)


def test_a_column_that_is_not_there_is_named(tmp_path: Path, functions: str) -> None:
    path = rows_file(tmp_path, [{"prompt": "x", "answer": "3"}])
    config = config_of(Path("m"), path, {"name": f"{functions}:plain_with_column"})
    expected = r"has no column level, which grader\.name = '.*' takes; it has prompt, answer"
    with pytest.raises(UserError, match=expected):
        read_pairs(config.data, config)


def test_prompts_without_answers_are_for_functions_alone(tmp_path: Path, functions: str) -> None:
    path = rows_file(tmp_path, [{"prompt": "x"}, {"prompt": "y"}])
    config = config_of(Path("m"), path, {"name": f"{functions}:trl_only_completions"})
    found = read_data_set(config.data, config)
    assert [question for question, _ in found.pairs] == ["x", "y"]
    assert [reference_of(answer).answer for _, answer in found.pairs] == ["", ""]
    config = config_of(Path("m"), path, {"name": ["gsm8k", f"{functions}:trl_only_completions"]})
    with pytest.raises(UserError, match="has prompts and no answers, which grader"):
        read_pairs(config.data, config)


def test_an_answer_of_nothing_is_for_functions_alone(tmp_path: Path, functions: str) -> None:
    path = rows_file(tmp_path, [{"prompt": "x", "answer": None}, {"prompt": "y", "answer": "3"}])
    config = config_of(Path("m"), path, {"name": f"{functions}:verifiers_contains"})
    assert [reference_of(answer).answer for _, answer in read_pairs(config.data, config)] == ["", "3"]
    config = config_of(Path("m"), path, {"name": "gsm8k"})
    with pytest.raises(UserError, match="row 1: answer is missing"):
        read_pairs(config.data, config)


def test_an_answer_of_any_kind_reaches_functions_and_is_refused_for_rules(
    tmp_path: Path, functions: str
) -> None:
    path = rows_file(tmp_path, [VERL_ROW | {"reward_model": {"ground_truth": {"a": [1, None, True]}}}])
    config = config_of(Path("m"), path, {"name": f"{functions}:compute_score_of_list"})
    ((_, answer),) = read_pairs(config.data, config)
    assert reference_of(answer).given == {"a": [1, None, True]}
    assert json.loads(reference_of(answer).answer) == {"a": [1, None, True]}
    config = config_of(Path("m"), path, {"name": "math"})
    with pytest.raises(UserError, match=r"reward_model\.ground_truth is a dict, not a text or a number"):
        read_pairs(config.data, config)


@pytest.mark.parametrize(
    ("text", "answer"),
    [('["3"]', "3"), ('["3", "4"]', '["3", "4"]'), ('["3"', '["3"'), ('["3"] or 4', '["3"] or 4')],
)
def test_verls_functions_get_the_text_of_a_list_as_it_is(
    tmp_path: Path, functions: str, text: str, answer: str
) -> None:
    """They read it as JSON themselves; ours get its one element."""
    path = rows_file(tmp_path, [VERL_ROW | {"reward_model": {"ground_truth": text}}])
    config = config_of(Path("m"), path, {"name": f"{functions}:compute_score"})
    ((_, stored),) = read_pairs(config.data, config)
    assert (reference_of(stored).given, reference_of(stored).answer) == (text, answer)


@pytest.mark.parametrize(
    ("number", "scale", "given"),
    [
        ("3.50", 2, 3.5),
        ("3", 0, 3),
        ("0.1", 1, 0.1),
        ("12345678901234567890", 0, 12345678901234567890),
        ("12345678901234567.89", 2, "12345678901234567.89"),
    ],
)
def test_a_decimal_reaches_functions_as_a_number_unless_that_would_round_it(
    tmp_path: Path, functions: str, number: str, scale: int, given: Any
) -> None:
    path = tmp_path / "decimals.parquet"
    rows = pl.DataFrame(
        {"prompt": ["x"], "ground_truth": [Decimal(number)]},
        schema_overrides={"ground_truth": pl.Decimal(30, scale)},
    )
    rows.write_parquet(path)
    config = config_of(Path("m"), path, {"name": f"{functions}:compute_score_of_number"})
    ((_, stored),) = read_pairs(config.data, config)
    found = reference_of(stored)
    assert (found.given, type(found.given), found.answer) == (given, type(given), number)


def test_a_rule_beside_functions_extracts_the_answer_that_both_get(tmp_path: Path, functions: str) -> None:
    path = rows_file(tmp_path, [{"question": "How many?", "answer": "1 + 2 = 3\n#### 3", "level": 5}])
    names = ["gsm8k", f"{functions}:plain_with_column"]
    config = config_of(Path("m"), path, {"name": names})
    ((_, answer),) = read_pairs(config.data, config)
    assert (reference_of(answer).answer, reference_of(answer).columns) == ("3", {"level": 5})
    assert grade(names, "#### 3", answer=answer)[0][:2] == ("correct", 6.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 3}',
        '{"answer": ',
        "3",
        '{"answer": "3", "raw": null, "columns": {}}',
        '{"answer": ' + "[" * 9999,
    ],
)
def test_an_answer_that_only_looks_like_a_row_is_an_answer(text: str) -> None:
    assert reference_of(text) == Reference(answer=text)


def test_regrade_with_a_function_of_another_convention_and_without_token_ids(
    tmp_path: Path, functions: str, engines: Engines, tiny_model: Path
) -> None:
    path = rows_file(tmp_path, [TRL_ROW])
    run(config_of(tiny_model, path, {"name": "gsm8k"}))
    console = Terminal(file=io.StringIO(), width=200)

    def warned(function: str) -> str:
        console.file.truncate(0)
        run_regrade(config_of(tiny_model, path, {"name": f"{functions}:{function}"}), console)
        return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]

    assert "warning" not in warned("plain")
    (about,) = re.findall("warning: these samples hold (.*?),", warned("verifiers_contains"))
    assert about.startswith("answers as texts: grader.name =")
    assert about.endswith("gets '3'")
    assert "hold no columns of the data set, and grader.name" in warned("trl_only_completions")
    config = config_of(tiny_model, path, {"name": f"{functions}:verifiers_contains"})
    assert run_paths("test").regraded_by(fingerprint(config.grader)).vstar.is_file()
    for function, missing in (("trl_token_ids", "completion_ids"), ("plain_with_column", "the column level")):
        with pytest.raises(UserError, match=f"reads {missing}, which these samples do not hold"):
            run_regrade(config_of(tiny_model, path, {"name": f"{functions}:{function}"}), console)


def test_regrade_names_the_columns_that_a_function_may_read_and_the_samples_lack(
    tmp_path: Path, functions: str, engines: Engines, tiny_model: Path
) -> None:
    """Also where they hold others."""
    path = rows_file(tmp_path, [VERL_ROW | {"level": 2}])
    run(config_of(tiny_model, path, {"name": f"{functions}:plain_with_column"}))
    console = Terminal(file=io.StringIO(), width=200)
    run_regrade(config_of(tiny_model, path, {"name": f"{functions}:compute_score_dict"}), console)
    printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "warning: these samples hold no data_source, extra_info, and grader.name" in printed


@pytest.mark.parametrize(
    ("grader", "expected"),
    [
        ({"name": ["gsm8k", "gsm8k"]}, "'gsm8k' is there twice"),
        ({"name": ["gsm8k", "math"], "weights": [1.0]}, "weights should be 2, one per name, found 1"),
        ({"name": "judge"}, 'the name "judge" needs a section [grader.judge]'),
        ({"name": "gsm8k", "convention": "trl"}, "would have no effect: no reward function is named"),
        (
            {"name": "a:b", "answer_after": "</think>"},
            "would have no effect: a reward function gets the whole",
        ),
        ({"name": []}, "at least 1 item"),
        ({"name": ["gsm8k", "nothing"]}, "unknown grader 'nothing'"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(grader: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        GraderConfig.model_validate(grader)


def test_functions_of_three_conventions_take_a_model_through_both_stages_and_evaluation(
    tmp_path: Path, functions: str, tiny_model: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = [
        {"prompt": f"How many is {number}?", "answer": str(1 + number % 4), "level": number, "tags": []}
        for number in range(8)
    ]
    path = rows_file(tmp_path, rows)
    config = stage2_runs.tiny_config(
        tmp_path,
        tiny_model,
        data={"format": "auto", "path": str(path), "template": "line"},
        engine={"backend": "transformers"},
        grader={
            "name": [
                f"{functions}:{name}" for name in ("trl_text", "verifiers_contains", "plain_with_column")
            ],
            "weights": [1.0, 0.5, 0.01],
        },
        train={"batch_size": 4, "mini_batch_size": 4, "iterations": 1, "evaluate_every": 1},
        evaluate={"num_samples": 1, "data": {"format": "auto", "path": str(path)}},
    )
    document = config.model_dump(mode="json", exclude_none=True)
    document["evaluate"]["benchmarks"] = {
        "easy": {
            "data": {"path": str(path), "format": "generic", "max_prompt_tokens": 40},
            "grader": {"name": "gsm8k"},
            "num_samples": 2,
            "sampling": {"temperature": 0.5, "max_completion_tokens": 8},
            "every": 1,
        }
    }
    config = Config.model_validate(document)
    assert (longest_allowed_prompt(config), longest_allowed_completion(config)) == (256, 8)
    file = tmp_path / "run.toml"
    file.write_text(stage2_runs.as_toml(config))
    for command in ("vstar", "train", "evaluate"):
        finished = run_cli(command, "--config", file, timeout=120, warm=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    (metrics,) = (
        values
        for line in run_paths("tiny").metrics.read_text().splitlines()
        if "reward/mean" in (values := json.loads(line))
    )
    means = {name: metrics[f"reward/{functions}:{name}"] for name in ("trl_text", "plain_with_column")}
    assert 0 <= means["trl_text"] <= 1
    assert 0 <= means["plain_with_column"] <= 7
    assert 0 <= metrics["evaluate/easy/accuracy"] <= 1
