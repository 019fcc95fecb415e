"""Data files of other projects, with their own field names: recognised, rendered and graded as they are."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from common.data.datasets import format_of, read_data_set, read_pairs
from common.data.formats import DISTINCT, PAIRS, DataFormat
from common.data.held_out import remarks
from common.data.messages import text_of_turns, turns_of
from common.data.prompts import load_prompts, prompts_from_pairs
from common.data.rendering import TEMPLATES, PromptRenderer
from common.errors import UserError
from common.grading import Outcome, find_grader
from common.runs import WHOLE
from common.terminal.console import Terminal
from stage1_vstar.run import read_prompts
from stage2_train.config import Config
from tests.conftest import ROOT
from tests.fakes import tiny_config
from tests.test_prompts import model_with, write_jsonl

DATA = ROOT.parent / "shared" / "data"
BOXED = " Let's think step by step and output the final answer within \\boxed{}."
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
USER = [{"role": "user", "content": "What is 2 + 3?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
ASKED = "[user] What is 2 + 3?\n[assistant] "


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row of a project's files, what it is taken for, what the model reads of it, and two completions."""

    row: Any
    name: str
    rendered: str
    answer: str = "5"
    grader: str = "math"
    right: str = "so \\boxed{5}"
    wrong: str = "so \\boxed{6}"
    options: dict[str, Any] = field(default_factory=dict)


CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(0, 1) == 1\n"
PROGRAMS: dict[str, Any] = {
    "grader": "code",
    "right": "```python\ndef add(a, b):\n    return a + b\n```",
    "wrong": "```python\ndef add(a, b):\n    return a * b\n```",
}

CASES = {
    "verl": Case(
        row={
            "data_source": "openai/gsm8k",
            "prompt": USER,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"split": "train", "index": 0, "answer": "2 + 3 = 5\n#### 5", "question": "…"},
        },
        name="verl",
        rendered=ASKED,
    ),
    "DAPO-17k": Case(
        row={
            "data_source": "math_dapo",
            "prompt": USER,
            "ability": "MATH",
            "reward_model": {"ground_truth": "5", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        name="verl",
        rendered=ASKED,
    ),
    "DAPO-17k, processed": Case(
        row={
            "prompt": "What is 2 + 3?",
            "solution": "5",
            "data_source": "math_dapo",
            "source_prompt": USER,
            "ability": "MATH",
            "reward_model": {"ground_truth": "5", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        name="verl",
        rendered="What is 2 + 3?",
    ),
    "Skywork-OR1": Case(
        row={
            "data_source": "train-math-deepscaler",
            "prompt": USER,
            "ability": "math",
            "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]', "style": "rule"},
            "extra_info": {"index": 0, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 16}},
        },
        name="verl",
        rendered=ASKED,
        answer="\\frac{1}{2}",
        right="\\boxed{0.5}",
    ),
    "SkyRL": Case(
        row={
            "data_source": "openai/gsm8k",
            "prompt": SYSTEM,
            "env_class": "gsm8k",
            "reward_spec": {"method": "rule", "ground_truth": "5"},
            "extra_info": {"split": "train", "index": 0, "answer": "#### 5", "question": "…"},
        },
        name="SkyRL",
        rendered=f"[system] Be brief.\n{ASKED}",
    ),
    "open-instruct RLVR": Case(
        row={"messages": USER, "ground_truth": "5", "dataset": "gsm8k"},
        name="open-instruct RLVR",
        rendered=ASKED,
    ),
    "open-instruct RLVR, lists and a shown answer": Case(
        row={
            "messages": [*SYSTEM, {"role": "assistant", "content": "It is 5."}],
            "ground_truth": ["5"],
            "dataset": ["math"],
        },
        name="open-instruct RLVR",
        rendered=f"[system] Be brief.\n{ASKED}",
    ),
    "TRL, text": Case(
        row={"prompt": "What is 2 + 3?", "ground_truth": "5"},
        name="TRL, with ground_truth",
        rendered="What is 2 + 3?",
    ),
    "TRL, messages": Case(
        row={"prompt": SYSTEM, "solution": "$5$"},
        name="TRL, with solution",
        rendered=f"[system] Be brief.\n{ASKED}",
        answer="$5$",
    ),
    "TRL, worked solution": Case(
        row={"prompt": USER, "solution": "2 + 3 = \\boxed{5}."}, name="TRL, with solution", rendered=ASKED
    ),
    "prompt and answer": Case(row={"prompt": USER, "answer": 5}, name="prompt and answer", rendered=ASKED),
    "ORZ": Case(
        row=[
            {"from": "human", "value": "What is 2 + 3?"},
            {"from": "assistant", "ground_truth": {"value": "5", "pass_at_n": 0.5}},
        ],
        name="ORZ",
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "OpenR1": Case(
        row={
            "problem": "What is 2 + 3?",
            "solution": "It is \\boxed{5}.",
            "answer": "5",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "olympiads",
            "generations": ["<think>"],
            "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}],
        },
        name=PAIRS[0].name,
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "DeepScaleR": Case(
        row={"problem": "What is 2 + 3?", "answer": "5", "solution": "Add."},
        name=PAIRS[0].name,
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "Big-Math": Case(
        row={
            "problem": "What is 2 + 3?",
            "answer": "5",
            "source": "orca_math",
            "domain": ["Mathematics -> Algebra"],
            "llama8b_solve_rate": 0.5,
        },
        name=PAIRS[0].name,
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "NuminaMath-CoT": Case(
        row={
            "source": "synthetic_math",
            "problem": "What is 2 + 3?",
            "solution": "It is $\\boxed{5}$.",
            "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}],
        },
        name="MATH",
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "DeepMath": Case(
        row={
            "question": "What is 2 + 3?",
            "final_answer": "5",
            "difficulty": 1.0,
            "topic": "Algebra",
            "r1_solution_1": "…",
        },
        name="question and final answer, as of DeepMath",
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "OlympiadBench": Case(
        row={
            "id": 1606,
            "subfield": "Algebra",
            "context": None,
            "question": "What is 2 + 3?",
            "solution": ["Add."],
            "final_answer": ["$5$"],
            "is_multiple_answer": False,
            "unit": None,
            "answer_type": "Numerical",
            "error": None,
        },
        name="OlympiadBench",
        rendered=f"What is 2 + 3?{BOXED}",
        answer="$5$",
    ),
    "OlympiadBench, with its own grader": Case(
        row={
            "id": 2829,
            "subfield": "Algebra",
            "context": None,
            "question": "What is 2 + 3?",
            "solution": ["Add."],
            "final_answer": ["$5$,$6$"],
            "is_multiple_answer": True,
            "unit": "km",
            "answer_type": "Numerical",
            "error": "1e-1",
        },
        name="OlympiadBench",
        rendered=f"What is 2 + 3?{BOXED}",
        answer='{"answers": ["$5$,$6$"], "tolerance": [0.1], "unit": "km"}',
        grader="olympiadbench",
        right="so \\boxed{6.05, 5\\text{ km}}",
        wrong="so \\boxed{5, 7}",
    ),
    "slime": Case(
        row={"prompt": USER, "label": "5", "metadata": {"rm_type": "math"}}, name="slime", rendered=ASKED
    ),
    "NeMo Gym": Case(
        row={
            "responses_create_params": {"input": [{**USER[0], "type": "message"}]},
            "question": "What is 2 + 3?",
            "expected_answer": "5",
        },
        name="NeMo Gym",
        rendered=ASKED,
    ),
    "GSM8K": Case(
        row={"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        name="GSM8K",
        rendered='What is 2 + 3? Let\'s think step by step and output the final answer after "####".',
        grader="gsm8k",
        right="so #### 5",
        wrong="so #### 6",
    ),
    "question and answer": Case(
        row={"question": "What is 2 + 3?", "answer": "5"},
        name="question and answer",
        rendered="What is 2 + 3?",
    ),
    "MATH": Case(
        row={
            "problem": "What is 2 + 3?",
            "level": "Level 1",
            "type": "Algebra",
            "solution": "It is $\\boxed{5}$.",
        },
        name="MATH",
        rendered=f"What is 2 + 3?{BOXED}",
    ),
    "MBPP": Case(
        row={
            "task_id": 1,
            "text": "Add.",
            "code": "def add(a, b):\n    return a + b",
            "test_list": ["assert add(2, 3) == 5"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        name="MBPP",
        rendered="Add.\nYour code must pass this test, and others:\nassert add(2, 3) == 5\n"
        "Write the code in a ```python block.",
        answer='["assert add(2, 3) == 5"]',
        **PROGRAMS,
    ),
    "MBPP, sanitized": Case(
        row={
            "source_file": "Benchmark Questions Verification V2.ipynb",
            "task_id": 2,
            "prompt": "Add.",
            "code": "def add(a, b):\n    return a + b",
            "test_imports": ["import math"],
            "test_list": ["assert add(2, 3) == math.floor(5.5)"],
        },
        name="MBPP, sanitized",
        rendered="Add.\nYour code must pass this test, and others:\nassert add(2, 3) == math.floor(5.5)\n"
        "Write the code in a ```python block.",
        answer='{"setup": "import math", "tests": ["assert add(2, 3) == math.floor(5.5)"]}',
        **PROGRAMS,
    ),
    "HumanEval": Case(
        row={
            "task_id": "HumanEval/53",
            "prompt": 'def add(a: int, b: int):\n    """Add."""\n',
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
            "test": CHECK,
        },
        name="HumanEval",
        rendered='def add(a: int, b: int):\n    """Add."""\n\n'
        "Write the whole function, with its imports, in a ```python block.",
        answer=json.dumps({"setup": CHECK, "tests": ["check(add)"]}),
        **PROGRAMS,
    ),
}


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(tiny_model, tmp_path_factory.mktemp("chat") / "model", chat_template=CHAT)


def auto(model: Path, path: Path, grader: str = "math", **data: Any) -> Config:
    """A run whose [data] says nothing but where the rows are."""
    config = tiny_config(model, path, grader={"name": grader})
    settings = {"path": str(path), "max_prompt_tokens": 512, **data}
    return Config.model_validate({**config.model_dump(), "data": settings})


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_another_project_is_recognised_rendered_and_graded(
    chat_model: Path, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    config = auto(chat_model, write_jsonl(tmp_path / "data.jsonl", [case.row]), case.grader)
    assert format_of(config.data).name == case.name
    renderer = PromptRenderer(chat_model, config.data)
    (prompt,) = load_prompts(config.data, config, renderer)
    assert renderer.decode(prompt.token_ids) == case.rendered
    assert prompt.answer == case.answer
    grader = find_grader(case.grader)
    assert grader.validate_gold(prompt.answer) is None
    outcomes = [grader.grade(prompt.text, each, prompt.answer).outcome for each in (case.right, case.wrong)]
    assert outcomes == [Outcome.CORRECT, Outcome.WRONG]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case.row, dict)])
def test_parquet_and_the_datasets_library_give_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import datasets

    case = CASES[name]
    expected = pairs(write_jsonl(tmp_path / "data.jsonl", [case.row]), case.grader)
    pl.DataFrame([case.row]).write_parquet(tmp_path / "data.parquet")
    assert pairs(tmp_path / "data.parquet", case.grader) == expected
    found = datasets.Dataset.from_list([case.row])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    assert pairs(f"owner/{name}", case.grader) == expected


def test_data_are_read_without_torch_or_transformers(tmp_path: Path) -> None:
    """By the offline commands and `forecast`, which need the template."""
    path = write_jsonl(tmp_path / "data.jsonl", [CASES["verl"].row])
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from common.data.datasets import read_data_set\n"
        "from common.data.rendering import prompt_template\n"
        "from stage2_train.config import load_config\n"
        f"settings = ['data.path=' + {str(path)!r}, 'data.format=auto']\n"
        "config = load_config(Path('configs/openr1-r1-distill-qwen-1.5b.toml'), settings)\n"
        "assert prompt_template(config.data) == 'chat'\n"
        "assert read_data_set(config.data, config).pairs == [('What is 2 + 3?', '5')]\n"
        "heavy = {'torch', 'vllm', 'transformers', 'deepspeed', 'datasets'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_there_is_a_file_of_each_format() -> None:
    assert {case.name for case in CASES.values()} == {each.name for each in (*DISTINCT, *PAIRS)}


def test_the_table_in_the_docs_says_what_is_read() -> None:
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    shown = {
        tuple(cell.strip(" `") for cell in line.split("|")[3:6]) for line in lines if line.count("|") == 6
    }
    templates = {text: name for name, text in TEMPLATES.items()}
    for each in (*DISTINCT, *PAIRS):
        template = templates.get(prompt_template_of(each), "asks for the whole function")
        assert (each.prompt_field, each.answer_field, template) in shown


def prompt_template_of(each: DataFormat) -> str:
    return TEMPLATES.get(each.template, each.template)


def pairs(path: Path | str, grader: str = "math", **data: Any) -> list[tuple[str, str]]:
    config = auto(Path("model"), Path(path), grader, **data)
    return read_pairs(config.data, config)


def refusal(path: Path | str, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        pairs(path, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"input": "x", "output": "1"},
            "is of no format that is known by its columns: it has input, output; set",
        ),
        (
            {"prompt": "x"},
            "has prompts and no answers, which grader.name = 'math' compares with; it has prompt; set data.answer",
        ),
        ({"a": {"b": {"c": 1}, "d": 2}}, "it has a.b, a.d; set data.prompt_field and data.answer_field"),
        (
            {"prompt": "x", "label": "1", "answer": "1"},
            "may be of several formats: slime (prompt, label) or prompt and answer (prompt, answer); it has prompt, "
            "label, answer; set data.prompt_field and data.answer_field",
        ),
        (
            {"prompt": USER, "reward_model": {"ground_truth": "1"}, "reward_spec": {"ground_truth": "1"}}
            | {"env_class": "gsm8k"},
            "may be of several formats: verl (prompt, reward_model.ground_truth) or SkyRL (",
        ),
    ],
)
def test_columns_of_no_format_or_of_several_are_listed_with_what_to_set(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    assert f"the data set {path} " in refusal(path)
    assert expected in refusal(path)


def test_fields_that_are_set_replace_those_of_the_format_and_may_be_dotted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "verl.jsonl", [CASES["verl"].row])
    assert pairs(path, answer_field="extra_info.split") == [("What is 2 + 3?", "train")]
    both = {"prompt_field": "extra_info.question", "answer_field": "extra_info.index"}
    assert pairs(path, **both) == [("…", "0")]
    assert pairs(path, format="generic", answer_field="prompt.0.role") == [("What is 2 + 3?", "user")]
    assert "has no field extra_info.none, it has data_source, prompt" in refusal(
        path, **{**both, "answer_field": "extra_info.none"}
    )
    dotted = write_jsonl(tmp_path / "dotted.jsonl", [{"a.b": "x", "a": {"b": "y"}}])
    assert pairs(dotted, prompt_field="a.b", answer_field="a.b") == [("x", "x")]


def test_tests_may_stand_in_objects_and_what_is_no_test_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"task": {"text": "Add.", "tests": ["assert add(2, 3) == 5"]}}]
    )
    fields = {"prompt_field": "task.text", "answer_field": "task.tests"}
    ((question, tests),) = pairs(path, "code", format="mbpp", **fields)
    assert question == "Add.\nYour code must pass this test, and others:\nassert add(2, 3) == 5"
    assert json.loads(tests) == ["assert add(2, 3) == 5"]
    path = write_jsonl(tmp_path / "human.jsonl", [{**CASES["HumanEval"].row, "test": [1]}])
    assert refusal(path).startswith(f"{path}, row 1: test is a list, not a text or a number")


def test_columns_that_only_later_rows_have_count_and_empty_cells_decide_nothing(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": None},
        {"prompt": USER, "label": None},
        {"prompt": USER, "label": "5"},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert pairs(path, bad_golds="drop") == [("What is 2 + 3?", "5")]
    config = auto(Path("model"), path)
    assert format_of(config.data).template == "chat"


def test_a_format_that_is_named_reads_what_it_always_has(tmp_path: Path) -> None:
    """The columns of GSM8K without its mark, and of MATH beside an answer."""
    rows = [{"question": "x", "answer": "1"}, {"question": "y", "answer": "#### 2"}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert format_of(auto(Path("model"), path, format="gsm8k").data).template == "gsm8k"
    assert pairs(path, "gsm8k", format="generic", prompt_field="question") == [("x", "1"), ("y", "#### 2")]
    row = {"problem": "x", "solution": "\\boxed{1}", "answer": "2"}
    path = write_jsonl(tmp_path / "math.jsonl", [row])
    assert pairs(path, format="math") == [("x", "1")]
    assert pairs(path, format="openr1") == pairs(path) == [("x", "2")]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "prompt is a list, not a text or a number"),
        ([{"value": "x"}], "prompt is a list, not a text or a number"),
        ([{"role": "tool", "content": "x"}], "prompt has a turn 1 of 'tool', not of system, user, assistant"),
        ([{"role": "user", "content": None}], "prompt has a turn 1 whose content is a NoneType, not a text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "prompt has a turn 1 whose content is a list, not a text",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}],
            "prompt has a turn 1 with tool_calls, which would not reach the model",
        ),
        (
            [*USER, {"role": "assistant", "content": "5"}],
            "prompt ends with a turn of assistant, not of the user",
        ),
        (SYSTEM, 'prompt has the turns system, user, which only template = "chat" shows'),
        ([{"role": "user", "content": " "}], "prompt is empty"),
        ([{"role": "user", "content": "\ud83d"}], "prompt holds half of a UTF-16 pair"),
    ],
)
def test_messages_that_cannot_be_a_prompt_are_refused_with_their_row(
    tmp_path: Path, messages: Any, expected: str
) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": messages, "answer": "1"}]
    )
    assert refusal(path, template="plain").startswith(f"{path}, row 2: {expected}")


def test_few_shot_turns_reach_the_chat_template_and_stay_the_same_prompt_in_stage_2(
    chat_model: Path, tmp_path: Path
) -> None:
    turns = [*SYSTEM, {"role": "assistant", "content": "5"}, {"role": "user", "content": "And “1 + 1”?"}]
    config = auto(chat_model, write_jsonl(tmp_path / "data.jsonl", [{"prompt": turns, "answer": "2"}]))
    renderer = PromptRenderer(chat_model, config.data)
    (prompt,) = load_prompts(config.data, config, renderer)
    expected = "[system] Be brief.\n[user] What is 2 + 3?\n[assistant] 5\n[user] And “1 + 1”?\n[assistant] "
    assert renderer.decode(prompt.token_ids) == expected
    assert turns_of(prompt.text) == turns
    assert prompts_from_pairs([(prompt.text, prompt.answer)], config.data, renderer) == [prompt]


@pytest.mark.parametrize(
    "text", ['[{"role": "user"', '[{"role": "user", "content": "x"}]', '[{"role": "x"}, 1]']
)
def test_a_question_that_only_looks_like_messages_is_a_question(text: str) -> None:
    assert turns_of(text) == [{"role": "user", "content": text}]


def test_one_turn_of_the_user_is_the_same_prompt_as_its_text(chat_model: Path, tmp_path: Path) -> None:
    found = []
    prompts: dict[str, Any] = {"text": "What is 2 + 3?", "messages": USER}
    for name, prompt in prompts.items():
        config = auto(
            chat_model, write_jsonl(tmp_path / name / "d.jsonl", [{"prompt": prompt, "answer": "5"}])
        )
        config = config.model_copy(update={"data": config.data.model_copy(update={"template": "chat"})})
        found.append(load_prompts(config.data, config, PromptRenderer(chat_model, config.data)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "rows", "taken"),
    [
        ("gsm8k/test.jsonl", 1319, "GSM8K"),
        ("math/test.jsonl", 5000, "MATH"),
        ("math500/test.jsonl", 500, PAIRS[0].name),
        ("minerva_math/test.jsonl", 272, "MATH"),
        ("minerva_math/ocw_deepseek.jsonl", 272, PAIRS[0].name),
        ("olympiadbench/test.jsonl", 675, "OlympiadBench"),
        ("qwen_math_cot_100/math_cot_100.jsonl", 100, "question and answer"),
    ],
)
def test_real_data_sets_are_recognised_and_read_whole(name: str, rows: int, taken: str) -> None:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    config = auto(Path("model"), path, "gsm8k" if "gsm8k" in name else "math", bad_golds="drop")
    found = read_data_set(config.data, config)
    assert (found.format.name, len(found.pairs) + found.dropped) == (taken, rows)
    assert found.dropped < 0.01 * rows


def told(model: Path, path: Path, grader: str = "math", **data: Any) -> list[str]:
    """What stage 1 prints of its prompts."""
    printed = io.StringIO()
    read_prompts(auto(model, path, grader, **data), model, WHOLE, Terminal(file=printed, width=1000))
    return printed.getvalue().splitlines()


def test_stage_1_says_what_it_recognised_and_shows_the_first_prompt(chat_model: Path, tmp_path: Path) -> None:
    nothing = {"prompt": None}
    path = write_jsonl(tmp_path / "data.jsonl", [nothing, CASES["SkyRL"].row, CASES["SkyRL"].row, nothing])
    assert told(chat_model, path, bad_golds="drop") == [
        f"{path}: read as SkyRL: prompts from prompt, answers from reward_spec.ground_truth, template 'chat'",
        "rows left out for want of a prompt or of an answer that the grader can use: 2",
        r"first prompt: '[system] Be brief.\n[user] What is 2 + 3?\n[assistant] '",
        "1 of 2 rows left out: there twice",
    ]
    line = told(chat_model, path, bad_golds="drop", long_prompts="drop")[-1]
    assert line == "1 of 2 rows left out: longer than 512 tokens, or there twice"
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [CASES["GSM8K"].row])
    (line,) = told(chat_model, path, "gsm8k", format="gsm8k")
    assert line.startswith("first prompt: 'What is 2 + 3? Let")


def test_held_out_prompts_are_recognised_on_their_own(chat_model: Path, tmp_path: Path) -> None:
    training = write_jsonl(tmp_path / "train.jsonl", [CASES["verl"].row])
    held_out = write_jsonl(tmp_path / "test.jsonl", [CASES["GSM8K"].row])
    config = tiny_config(chat_model, training, evaluate={"data": {"path": str(held_out)}})
    assert config.held_out is not None
    lines = remarks(
        config, [question for question, _ in read_pairs(config.held_out, config)], ["What is 2 + 3?"]
    )
    assert lines[0].startswith(
        f"{held_out}: read as GSM8K: prompts from question, answers from answer, template"
    )
    assert lines[-1].startswith("1 of 1 held-out prompts are also training prompts")
    asked = text_of_turns([{"role": "system", "content": "Be brief."}, *USER])
    assert remarks(config, ["What is 2 + 3?"], [asked])[-1] == lines[-1]


def test_training_needs_the_data_for_its_template_only(chat_model: Path, tmp_path: Path) -> None:
    """Stage 1's file holds the prompts."""
    missing = tmp_path / "none.jsonl"
    with pytest.raises(UserError, match="there is no data file"):
        PromptRenderer(chat_model, auto(chat_model, missing).data)
    renderer = PromptRenderer(chat_model, auto(chat_model, missing, template="chat").data)
    assert renderer.decode(renderer.render("What is 2 + 3?")) == ASKED


def test_a_file_that_has_changed_is_recognised_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [CASES["verl"].row])
    assert format_of(auto(Path("model"), path).data).name == "verl"
    write_jsonl(path, [CASES["MATH"].row])
    assert format_of(auto(Path("model"), path).data).name == "MATH"
