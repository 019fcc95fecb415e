"""The pool: every completion ends in one grade, whatever it does to the process that reads it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.grading import (
    Grade,
    GraderConfig,
    GraderPool,
    GradingTask,
    Outcome,
    find_grader,
    fingerprint,
    negative_rewards_warning,
)

ROOT = Path(__file__).parents[1]
HOSTILE = ROOT.parent / "shared" / "cases" / "hostile.jsonl"
GOOD = GradingTask(prompt="", completion=r"so \boxed{\frac{1}{2}}", answer="0.5")

REWARDS = """
import os, time

def by_command(prompt, completion, answer):
    if completion == "exit": os._exit(3)
    if completion == "abort": os.abort()
    if completion == "quit": raise SystemExit
    if completion.startswith("fork"):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        if completion == "fork and exit": os._exit(3)
        while completion == "fork and loop": pass
        return 1.0
    if completion == "raise": raise KeyError("no")
    if completion == "loop":
        while True: pass
    if completion == "swallow":
        while True:
            try: time.sleep(60)
            except BaseException: pass
    if completion == "memory": return len(bytearray(1 << 34))
    if completion == "nan": return float("nan")
    if completion == "text": return "1"
    if completion == "print": print("noise"); os.write(2, b"noise")
    return len(prompt) + 10 * len(completion) + float(answer)

def picky(prompt, completion, answer):
    return 1.0 if completion.endswith(answer) else -0.5

not_a_function = 3
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with rewards."""
    (tmp_path / "pool_test_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return "pool_test_rewards"


def workers_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                status = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if b"common.grading.worker" in command and int(status[1]) == parent and status[0] != "Z":
                found.append(int(folder.name))
    return found


def task(completion: str, answer: str = "0") -> GradingTask:
    return GradingTask(prompt="", completion=completion, answer=answer)


def hostile_tasks(*, keep: int) -> list[GradingTask]:
    """Every `keep`-th hostile completion, each followed by a good one."""
    if not HOSTILE.is_file():
        pytest.skip(f"{HOSTILE} is not on this machine")
    cases = [json.loads(line) for line in HOSTILE.read_text().splitlines()][::keep]
    return [
        each
        for case in cases
        for each in (
            GradingTask(prompt="", completion=eval(case["recipe"]), answer=case["gold"]),
            GOOD,
        )
    ]


def assert_survived(grades: list[Grade]) -> None:
    for grade in grades[0::2]:
        assert isinstance(grade.outcome, Outcome)
        (grade.extracted or "").encode()
        assert len(grade.extracted or "") <= 512
    assert {grade.outcome for grade in grades[1::2]} == {Outcome.CORRECT}


def test_every_hostile_completion_ends_in_an_outcome_from_a_thread() -> None:
    tasks = hostile_tasks(keep=1)
    before = set(workers_of(os.getpid()))
    grades: list[Grade] = []
    with GraderPool(GraderConfig(name="math", workers=2, timeout_seconds=1, memory_gib=1)) as pool:
        thread = threading.Thread(target=lambda: grades.extend(pool.grade_all(tasks)))
        thread.start()
        thread.join()
        peaks = [_peak_address_space_kib(worker) for worker in set(workers_of(os.getpid())) - before]
    assert len(grades) == len(tasks)
    assert len(peaks) == 2
    assert max(peaks) <= 1024**2
    assert_survived(grades)
    assert set(workers_of(os.getpid())) <= before


def test_hostile_completions_end_in_an_outcome_from_the_main_thread() -> None:
    tasks = hostile_tasks(keep=7)
    with GraderPool(GraderConfig(name="math", workers=2, timeout_seconds=1)) as pool:
        assert_survived(pool.grade_all(tasks))


def test_text_of_every_kind_reaches_the_rule_intact(rewards: str) -> None:
    texts = ["\ud800", "a\x00b", "x" * 1_000_000, "".join(map(chr, range(0x300, 0x11_0000, 257))), "", "\r\n"]
    with GraderPool(GraderConfig(name=f"{rewards}:picky")) as pool:
        grades = pool.grade_all([task(text, text) for text in texts])
    assert [grade.outcome for grade in grades] == [Outcome.CORRECT] * len(texts)


def test_a_crash_costs_one_grade_and_the_rest_of_the_batch_is_graded(rewards: str) -> None:
    commands = [
        "ok",
        "exit",
        "ok",
        "abort",
        "quit",
        "raise",
        "loop",
        "ok",
        "swallow",
        "memory",
        "nan",
        "text",
        "print",
    ]
    config = GraderConfig(name=f"{rewards}:by_command", timeout_seconds=1, memory_gib=0.5)
    with GraderPool(config) as pool:
        grades = pool.grade_all([task(command) for command in commands])
    outcomes = [grade.outcome for grade in grades]
    crash, timeout, fine = Outcome.VERIFIER_CRASH, Outcome.VERIFIER_TIMEOUT, Outcome.CORRECT
    assert outcomes == [
        fine, crash, fine, crash, crash, crash, timeout, fine, timeout, crash, crash, crash, fine
    ]  # fmt: skip
    assert grades[9].reason == "out of memory"
    assert "exit status 3" in str(grades[1].reason)
    assert "SIGABRT" in str(grades[3].reason)
    assert "KeyError" in str(grades[5].reason)
    assert grades[0].reward == 20.0


def test_processes_that_a_reward_starts_end_with_it_and_hold_nothing_up(rewards: str) -> None:
    commands = ["20", "fork", "fork and exit", "fork and loop", "20"]
    began = time.monotonic()
    with GraderPool(GraderConfig(name=f"{rewards}:by_command", workers=1, timeout_seconds=1)) as pool:
        grades = pool.grade_all([task(command, "0") for command in commands])
    assert [grade.outcome for grade in grades] == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.VERIFIER_CRASH,
        Outcome.VERIFIER_TIMEOUT,
        Outcome.CORRECT,
    ]
    assert "exit status 3" in str(grades[2].reason)
    assert time.monotonic() - began < 50  # the children sleep for 60


def test_a_worker_that_is_stopped_before_it_begins_has_a_deadline_too(rewards: str) -> None:
    with GraderPool(GraderConfig(name=f"{rewards}:by_command", workers=1, timeout_seconds=1)) as pool:
        [worker] = workers_of(os.getpid())
        os.kill(worker, signal.SIGSTOP)
        assert [grade.outcome for grade in pool.grade_all([task("20")])] == [Outcome.CORRECT]
        assert workers_of(os.getpid()) != [worker]


def test_a_custom_reward_keeps_its_value_and_sees_the_prompt(rewards: str) -> None:
    with GraderPool(GraderConfig(name=f"{rewards}:by_command")) as pool:
        [grade] = pool.grade_all([GradingTask(prompt="abc", completion="", answer="-3.25")])
        assert (grade.outcome, grade.reward) == (Outcome.WRONG, -0.25)
        assert pool.validate_golds(["anything"]) == [None]


@pytest.mark.parametrize("function", ["missing", "not_a_function"])
def test_a_reward_that_cannot_be_loaded_is_refused_at_once(rewards: str, function: str) -> None:
    with pytest.raises(ValueError, match=function):
        GraderPool(GraderConfig(name=f"{rewards}:{function}"))


def test_a_module_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"no module 'nowhere\.at_all'"):
        GraderPool(GraderConfig(name="nowhere.at_all:reward"))


BROKEN = """
import os
{at_import}
def by_two(question, answer): return 1.0
def batched(data_sources, solution_strs, ground_truths, extra_infos=None): return [1.0]
def parsing(completion, answer, parser): return 1.0
def dispatching(solution_str, ground_truth, model): return 1.0
def many(prompt, completion, answer): yield 1.0
def by_name(prompt, completion, answer, *, more=0, **rest): return 1.0
"""


@pytest.mark.parametrize(
    ("at_import", "function", "expected"),
    [
        (
            "",
            "missing",
            "cannot be loaded: AttributeError: module 'broken_rewards' has no attribute 'missing'",
        ),
        ("", "os", "is a module; docs/rewards.md lists the functions that can be called"),
        (
            "",
            "by_two",
            "takes (question, answer) (called as verifiers does, it gets no question); docs/rewards.md",
        ),
        ("", "many", "is a generator, whose result is no number"),
        ("", "batched", "takes a batch, as verl's batch reward manager gives it"),
        ("", "parsing", "takes (completion, answer, parser) (called as verifiers does, it gets no parser)"),
        (
            "",
            "dispatching",
            "takes (solution_str, ground_truth, model) (called as verl does, it gets no model)",
        ),
        (
            "import no_such_library",
            "by_two",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("open('none.json')", "by_two", "cannot be loaded: FileNotFoundError: [Errno 2]"),
        ("{}['key\\nof two lines']", "by_two", "cannot be loaded: KeyError: "),
        ("raise SystemExit(3)", "by_two", "cannot be loaded: SystemExit: 3"),
        ("def", "by_two", "cannot be loaded: SyntaxError: invalid syntax"),
    ],
)
def test_what_is_no_reward_function_is_refused_in_one_line_that_names_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_import: str, function: str, expected: str
) -> None:
    (tmp_path / "broken_rewards.py").write_text(BROKEN.format(at_import=at_import))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as told:
        GraderPool(GraderConfig(name=f"broken_rewards:{function}"))
    message = str(told.value)
    assert message.startswith(f"grader.name = 'broken_rewards:{function}' {expected}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("raising_package", "raise RuntimeError('set API_KEY')", "RuntimeError: set API_KEY"),
        ("leaving_package", "import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_whose_package_raises_says_why_it_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, reason: str
) -> None:
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text(code)
    (package / "rewards.py").write_text("def reward(prompt, completion, answer): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"no module '{name}\.rewards' .* \({reason}\)"):
        fingerprint(GraderConfig(name=f"{name}.rewards:reward"))


def test_a_module_that_is_missing_is_no_fault_of_the_reference_answers(
    tmp_path: Path, tiny_model: Path
) -> None:
    from common.data.datasets import read_pairs
    from tests.fakes import tiny_config

    data = {"format": "word_problems", "path": "", "limit": 8, "bad_golds": "drop"}
    config = tiny_config(tiny_model, tmp_path, data=data, grader={"name": "nowhere:reward"})
    with pytest.raises(UserError, match=r"^grader\.name = 'nowhere:reward': no module 'nowhere'") as told:
        read_pairs(config.data, config)
    assert "reference answers" not in str(told.value)


RETURNS = """
def reward(prompt, completion, answer):
    return eval(answer)
"""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("'1'", "the reward is a str, not a number"),
        ("{'score': 1.0}", "the reward is a dict, not a number"),
        ("(1.0, 'because')", "a step's reward is 1.0, not (end of the step in characters, reward)"),
        ("[1.0]", "a step's reward is 1.0, not (end of the step in characters, reward)"),
        ("None", None),
        ("1 / 0", None),
        ("float('nan')", None),
        ("[]", None),
        ("-1", None),
        ("True", None),
    ],
)
def test_a_reward_that_is_no_number_whatever_the_completion_is_refused_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: str | None
) -> None:
    (tmp_path / "returning_rewards.py").write_text(RETURNS)
    monkeypatch.syspath_prepend(tmp_path)
    with GraderPool(GraderConfig(name="returning_rewards:reward")) as pool:
        if expected is None:
            pool.try_out("question", answer)
            return
        with pytest.raises(UserError) as told:
            pool.try_out("question", answer)
    assert str(told.value) == (
        f"grader.name = 'returning_rewards:reward' returns what is no reward: {expected}; "
        "docs/rewards.md lists the functions that can be called"
    )


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("np.bool_(True)", 1.0),
        ("np.float32(0.25)", 0.25),
        ("np.int64(-3)", -3.0),
        ("np.array(0.5)", 0.5),
        ("np.array(True)", 1.0),
        ("torch.tensor(0.5)", 0.5),
        ("torch.tensor(False)", 0.0),
        ("[(np.int64(1), np.bool_(True)), (torch.tensor(2), np.array(0.5))]", 1.5),
    ],
)
def test_a_scalar_of_another_library_is_the_number_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str, expected: float
) -> None:
    (tmp_path / "scalar_rewards.py").write_text(f"import numpy as np\nimport torch\n{RETURNS}")
    monkeypatch.syspath_prepend(tmp_path)
    grade = find_grader("scalar_rewards:reward").grade("", "two", returned)
    assert (grade.is_judged, grade.reward) == (True, expected)


@pytest.mark.parametrize(
    "returned", ["np.array([0.5])", "np.str_('1')", "np.array('1')", "torch.ones(2)", "np.datetime64('2024')"]
)
def test_an_array_and_a_scalar_that_is_no_number_are_no_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returned: str
) -> None:
    (tmp_path / "scalar_rewards.py").write_text(f"import numpy as np\nimport torch\n{RETURNS}")
    monkeypatch.syspath_prepend(tmp_path)
    grade = find_grader("scalar_rewards:reward").grade("", "two", returned)
    assert not grade.is_judged
    assert re.search(r"the reward is a \w+, not a number", str(grade.reason))


def test_a_reward_of_none_leaves_the_completion_unjudged_like_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "returning_rewards.py").write_text(RETURNS)
    monkeypatch.syspath_prepend(tmp_path)
    with GraderPool(GraderConfig(name="returning_rewards:reward")) as pool:
        none, raised = pool.grade_all([task("", "None"), task("", "1 / 0")])
    assert (none.outcome, none.reward, none.is_judged) == (raised.outcome, raised.reward, raised.is_judged)
    assert (none.outcome, none.reason) == (Outcome.VERIFIER_CRASH, "the reward is None")


@pytest.mark.parametrize(
    ("outcomes", "rewards", "expected"),
    [
        (["correct", "wrong"], [1.0, -1.0], None),
        (["correct", "truncated", "verifier_crash"], [1.0, 0.0, 0.0], None),
        ([], [], None),
        (
            ["wrong", "truncated"],
            [-0.5, 0.0],
            "rewards go down to -0.5, but the 1 of 2 completions that were cut off",
        ),
        (["correct", "wrong", "verifier_timeout"], [2.0, -3.0, 0.0], "rewards go down to -3, but the 1 of 3"),
    ],
)
def test_rewards_below_that_of_a_completion_that_was_cut_off_are_warned_of(
    outcomes: list[str], rewards: list[float], expected: str | None
) -> None:
    warning = negative_rewards_warning(outcomes, rewards)
    if expected is None:
        assert warning is None
    else:
        assert warning is not None
        assert expected in warning


def test_a_grader_whose_processes_die_at_once_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_rewards.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = r"'deadly_rewards:reward' die .*left with exit status 7.*memory_gib = 2"
    with pytest.raises(UserError, match=message) as told:
        GraderPool(GraderConfig(name="deadly_rewards:reward", memory_gib=2))
    assert "\n" not in str(told.value)


def test_an_edited_reward_has_another_fingerprint(rewards: str, tmp_path: Path) -> None:
    config = GraderConfig(name=f"{rewards}:picky")
    before = fingerprint(config)
    (tmp_path / "pool_test_rewards.py").write_text(REWARDS + "# edited\n")
    assert fingerprint(config) != before
    assert fingerprint(GraderConfig(name="gsm8k")) == fingerprint(GraderConfig(name="gsm8k", workers=3))
    assert fingerprint(GraderConfig(name="math")).startswith("math/4+math-verify-")


def test_truncated_completions_are_never_read() -> None:
    with GraderPool(GraderConfig(name="gsm8k")) as pool:
        pool.submit("cut", prompt="", completion="#### 5", answer="5", truncated=True)
        pool.submit("done", prompt="", completion="#### 5", answer="5", truncated=False)
        grades = dict(pool.drain())
    assert grades["cut"] == Grade(outcome=Outcome.TRUNCATED, reward=0.0)
    assert grades["done"] == Grade(outcome=Outcome.CORRECT, reward=1.0, extracted="5")


def test_finished_grades_can_be_collected_while_others_run() -> None:
    with GraderPool(GraderConfig(name="gsm8k")) as pool:
        assert pool.ready() == []
        pool.submit(("p", 0), prompt="", completion="#### 5", answer="5", truncated=False)
        collected: list[tuple[object, Grade]] = []
        deadline = time.monotonic() + 10
        while not collected and time.monotonic() < deadline:
            collected = pool.ready()
        assert [key for key, _ in collected] == [("p", 0)]
        assert pool.drain() == []


def test_callers_in_several_threads_get_their_own_grades_in_order() -> None:
    results: dict[int, list[float]] = {}

    def work(pool: GraderPool, offset: int) -> None:
        tasks = [
            task(f"#### {number}", str(number * (number % 2))) for number in range(offset, offset + 3000)
        ]
        results[offset] = [grade.reward for grade in pool.grade_all(tasks)]

    with GraderPool(GraderConfig(name="gsm8k", workers=2)) as pool:
        threads = [threading.Thread(target=work, args=(pool, offset)) for offset in (1, 2, 10_001)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = {
        offset: [float(number % 2) for number in range(offset, offset + 3000)] for offset in (1, 2, 10_001)
    }
    assert results == expected


def test_golds_are_validated_in_the_workers() -> None:
    with GraderPool(GraderConfig(name="math", timeout_seconds=1)) as pool:
        problems = pool.validate_golds([r"\frac{1}{2}", r"\frac{", ""])
    assert problems[0] is None
    assert "cannot parse" in str(problems[1])
    assert "empty" in str(problems[2])


def test_an_idle_pool_burns_no_processor_time() -> None:
    with GraderPool(GraderConfig(name="gsm8k")) as pool:
        pool.grade_all([task("#### 1", "1")])
        [worker] = workers_of(os.getpid())
        before = _processor_ticks(worker), time.process_time()
        time.sleep(0.5)
        assert _processor_ticks(worker) - before[0] <= 1
        assert time.process_time() - before[1] < 0.1


def test_a_closed_pool_refuses_work() -> None:
    pool = GraderPool(GraderConfig(name="gsm8k"))
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(0, prompt="", completion="", answer="", truncated=False)


def test_a_killed_worker_is_replaced() -> None:
    with GraderPool(GraderConfig(name="gsm8k")) as pool:
        [worker] = workers_of(os.getpid())
        os.kill(worker, signal.SIGKILL)
        grades = pool.grade_all([task(f"#### {number}", "1") for number in range(1000)])
    assert sum(grade.reward for grade in grades) == 1


def test_workers_die_with_their_parent_even_inside_a_grade(rewards: str, tmp_path: Path) -> None:
    script = f"""
import os, sys, time
from common.grading import GraderConfig, GraderPool
pool = GraderPool(GraderConfig(name="{rewards}:by_command", timeout_seconds=600, workers=2))
for _ in range(2):
    pool.submit(0, prompt="", completion="swallow", answer="0", truncated=False)
time.sleep(0.3)
print(*[worker.pid for worker in pool._workers], flush=True)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    parent = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    workers = [int(pid) for pid in parent.stdout.split()]
    assert len(workers) == 2, parent.stderr
    deadline = time.monotonic() + 5
    while any(map(_is_worker, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_is_worker, workers))


def test_a_worker_for_gsm8k_never_loads_the_heavy_libraries() -> None:
    script = "import sys, common.grading.worker; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"sympy", "math_verify", "pydantic", "torch", "vllm"} & set(loaded.stdout.split())


def test_unknown_options_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown grader"):
        GraderConfig(name="latex")
    with pytest.raises(ValueError, match="Extra inputs"):
        GraderConfig.model_validate({"name": "gsm8k", "timeout": 3})


def _processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _peak_address_space_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))


def _is_worker(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return b"common.grading.worker" in command and state != "Z"


STEPS = """
def by_command(prompt, completion, answer):
    return eval(completion)
"""


def test_a_reward_of_steps_is_kept_with_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step_rewards_test.py").write_text(STEPS)
    monkeypatch.syspath_prepend(tmp_path)
    with GraderPool(GraderConfig(name="step_rewards_test:by_command", workers=1)) as pool:

        def graded(completion: str) -> Grade:
            (found,) = pool.grade_all([GradingTask(prompt="", completion=completion, answer="")])
            return found

        steps = graded("[(3, 0.25), (7, 0.75)]")
        assert (steps.outcome, steps.reward) == (Outcome.CORRECT, 1.0)
        assert steps.step_rewards == ((3, 0.25), (7, 0.75))
        assert graded("0.25").step_rewards is None
        for wrong, reason in {
            "[(3, 0.5), (3, 0.5)]": "a step ends at character 3 of 20, after one that ends at 3",
            "[(99, 0.5)]": "a step ends at character 99 of 11",
            "[0.5, 0.5]": "a step's reward is 0.5, not (end of the step in characters, reward)",
            "[(1, 'a')]": "the reward is a str, not a number",
            "[]": "the reward is a list without a step",
            "[(1, float('nan'))]": "the reward is nan",
        }.items():
            found = graded(wrong)
            assert (found.outcome, found.reward) == (Outcome.VERIFIER_CRASH, 0.0)
            assert reason in str(found.reason)
