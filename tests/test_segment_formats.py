"""export-segments and import-segments: step-level data of TRL, Math-Shepherd and PRM800K."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest

from common.data.messages import text_of_turns
from common.data.prompts import prompt_id
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.grading import Outcome
from common.provenance import Provenance, read_provenance
from common.runs import run_paths
from common.segments.files import SEGMENTS, SEGMENTS_TABLE, state_id
from common.segments.formats import LabelledSolution, read_labelled
from common.segments.labelled import StepTokeniser, separator_of
from common.terminal.console import Terminal
from stage1_vstar.export_segments import export_segments
from stage1_vstar.import_segments import import_segments
from stage2_train.config import Config
from stage2_train.critic_job.figures import labelled_solutions
from stage2_train.critic_job.states import read_critic_data
from tests.conftest import RunCli
from tests.fakes import CONTEXT, IDENTITY, tiny_config

SHEPHERD = {
    "input": "Tom has 3 apples and eats 1. How many? Step 1: 3 - 1 = 2. ки\nStep 2: It is 2. The answer is: 2 ки",
    "label": "Tom has 3 apples and eats 1. How many? Step 1: 3 - 1 = 2. +\nStep 2: It is 2. The answer is: 2 -",
    "task": "GSM8K",
}
TRL = {"prompt": "Which is larger?", "completions": ["It is 9.", "So 9."], "labels": [True, False]}


def rated(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": None}


PRM800K: dict[str, Any] = {
    "labeler": "a",
    "generation": 9,
    "question": {"problem": "What is 2 + 2?", "ground_truth_answer": "4"},
    "label": {
        "steps": [
            {"completions": [rated("Add.", 0)], "human_completion": None, "chosen_completion": 0},
            {
                "completions": [rated("It is 5.", -1), rated("2 + 2 = 4.", 1), rated("Who knows.", None)],
                "human_completion": None,
                "chosen_completion": 1,
            },
            {
                "completions": [rated("So 5.", -1)],
                "human_completion": {**rated("So 4.", None), "source": "human", "corrected_rating": None},
                "chosen_completion": None,
            },
        ],
        "total_time": 1,
        "finish_reason": "solution",
    },
}
FOUND_ERROR = {
    **PRM800K,
    "label": {
        "steps": [
            {"completions": [rated("Add.", 0)], "human_completion": None, "chosen_completion": 0},
            {"completions": [rated("So 5.", -1)], "human_completion": None, "chosen_completion": None},
        ],
        "finish_reason": "found_error",
    },
}


def labels(solution: LabelledSolution) -> list[tuple[str, float | None]]:
    return [(step.text, step.value) for step in solution.steps]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def config_of(model: Path, **sections: Any) -> Config:
    return tiny_config(model, Path("unused.jsonl"), sampling={"max_completion_tokens": 200}, **sections)


def imported(config: Config, file: Path, capsys: pytest.CaptureFixture[str]) -> tuple[pl.DataFrame, str]:
    """The table that the import writes, and what it says."""
    import_segments(config, file, Terminal(width=1000))
    return SEGMENTS_TABLE.read(run_paths(config.run).segments)[0], capsys.readouterr().out


def test_a_row_of_trl_is_a_solution_with_a_value_after_each_step() -> None:
    (solution,) = read_labelled([TRL]).solutions
    assert (solution.question, solution.answer, solution.is_whole) == ("Which is larger?", "", False)
    assert labels(solution) == [("It is 9.", 1.0), ("So 9.", 0.0)]
    (soft,) = read_labelled([{**TRL, "labels": [0.25, 1], "answer": "9"}]).solutions
    assert labels(soft) == [("It is 9.", 0.25), ("So 9.", 1.0)]
    assert soft.answer == "9"


@pytest.mark.parametrize(
    ("text", "marks", "question", "steps"),
    [
        (SHEPHERD["input"], "+-", "Tom has 3 apples and eats 1. How many?", 2),
        ("Add 1 and 1. step 1: 2 ки", "+", "Add 1 and 1.", 1),
        ("How many is 1 + 1? It is 2. ки\nIt is two. ки\n", "+-", "How many is 1 + 1?", 2),
        ("Let $a$ ки be 1. Find $a$. Step 1: 1 ки\nStep 2: 1 ки", "+-+", "Let $a$  be 1. Find $a$.", 2),
    ],
    ids=["Step 1:", "step 1:", "a question mark", "a label inside the question"],
)
def test_the_question_of_math_shepherd_is_told_from_the_first_step(
    text: str, marks: str, question: str, steps: int
) -> None:
    label = text
    for mark in marks:
        label = label.replace("ки", mark, 1)
    (solution,) = read_labelled([{"input": text, "label": label}]).solutions
    assert solution.question == question
    assert solution.is_whole
    assert [step.value for step in solution.steps] == [float(mark == "+") for mark in marks[-steps:]]
    assert all("ки" not in step.text and step.text == step.text.strip() for step in solution.steps)


def test_the_steps_of_math_shepherd_are_what_is_between_its_marks() -> None:
    (solution,) = read_labelled([SHEPHERD]).solutions
    assert labels(solution) == [("Step 1: 3 - 1 = 2.", 1.0), ("Step 2: It is 2. The answer is: 2", 0.0)]
    rest = {key: f"{SHEPHERD[key]}\nStep 3: more" for key in ("input", "label")}
    (unfinished,) = read_labelled([rest]).solutions
    assert labels(unfinished) == labels(solution)
    assert not unfinished.is_whole


def test_prm800k_gives_the_labellers_solution_and_the_alternatives_to_its_steps() -> None:
    """A neutral step counts as correct, a labeller's own step too; a step without a rating has no value."""
    wrong, worst, whole = read_labelled([PRM800K]).solutions
    assert labels(wrong) == [("Add.", None), ("It is 5.", 0.0)]
    assert labels(worst) == [("Add.", None), ("2 + 2 = 4.", None), ("So 5.", 0.0)]
    assert labels(whole) == [("Add.", 1.0), ("2 + 2 = 4.", 1.0), ("So 4.", 1.0)]
    assert [each.is_whole for each in (wrong, worst, whole)] == [False, False, True]
    assert {(each.question, each.answer) for each in (wrong, worst, whole)} == {("What is 2 + 2?", "4")}
    error, begun = read_labelled([FOUND_ERROR]).solutions
    assert labels(error) == [("Add.", None), ("So 5.", 0.0)]
    assert labels(begun) == [("Add.", 1.0)]
    assert not begun.is_whole


def test_an_empty_step_ends_prm800ks_solution() -> None:
    nothing = {"completions": None, "human_completion": None, "chosen_completion": None}
    steps = [*PRM800K["label"]["steps"][:1], nothing]
    (begun,) = read_labelled([{**PRM800K, "label": {"steps": steps, "finish_reason": "give_up"}}]).solutions
    assert labels(begun) == [("Add.", 1.0)]


def changed_step(**values: Any) -> dict[str, Any]:
    step = {**PRM800K["label"]["steps"][0], **values}
    return {**PRM800K, "label": {"steps": [step], "finish_reason": "solution"}}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"text": "x"},
            "it has the columns text, not those of a format (prompt, completions, labels; input, label",
        ),
        ({}, "it has the columns of no row"),
        ({**TRL, "labels": [True]}, "it has 1 labels for 2 steps"),
        (
            {**TRL, "labels": [True, None]},
            "the label of its step 2 should be true, false or a number from 0 to 1",
        ),
        ({**TRL, "labels": [1.5, True]}, "the label of its step 1 should be"),
        ({**TRL, "labels": [float("nan"), True]}, "the label of its step 1 should be"),
        ({**TRL, "labels": ["+", "-"]}, "the label of its step 1 should be"),
        ({**TRL, "completions": ["a", " "]}, "its step 2 should be a text that is not blank"),
        ({**TRL, "completions": ["a", None]}, "its step 2 should be a text"),
        ({**TRL, "completions": [], "labels": []}, "it has no step with a label"),
        ({**TRL, "completions": "ab"}, "completions and labels should be lists"),
        ({**TRL, "prompt": [{"role": "user", "content": "x"}]}, "prompt should be a text"),
        ({"input": "x? Step 1: y", "label": "x? Step 1: y"}, "its input has no ки"),
        ({"input": "x? Step 1: y ки", "label": "x? Step 1: y"}, "its label is not its input with + or -"),
        ({"input": "x? Step 1: y ки", "label": "x? Step 1: z +"}, "its label is not its input with + or -"),
        ({"input": "x? Step 1: y ки", "label": "x? Step 1: y ки"}, "its label is not its input with + or -"),
        ({"input": "a? b? c ки", "label": "a? b? c +"}, "does not show where the question ends"),
        ({"input": "Step 1: y ки", "label": "Step 1: y +"}, "the question in its input should be a text"),
        ({"input": "x? Step 1: ки ки", "label": "x? Step 1: + -"}, "its step 2 should be a text"),
        ({"input": "x ки Step 1: y", "label": "x + Step 1: y"}, "it has no step with a label"),
        ({"input": None, "label": "x"}, "input should be a text"),
        ({"question": "x", "label": "y"}, "question and label should be objects"),
        ({**PRM800K, "label": {"steps": []}}, "none of its steps has a rating"),
        ({**PRM800K, "question": {}}, "question.problem should be a text"),
        (changed_step(chosen_completion=7), "the chosen completion of its step 1 is 7, of 1"),
        (changed_step(completions=[rated("x", 2)]), "with a rating other than -1, 0 or 1"),
        (changed_step(completions=[rated(" ", 1)]), "its step 1 should be a text"),
        (changed_step(completions=[rated("x", None)]), "none of its steps has a rating"),
        (changed_step(completions="x"), "its step 1 is not an object with completions"),
    ],
)
def test_a_wrong_row_is_counted_and_what_is_wrong_with_it_is_said(row: dict[str, Any], problem: str) -> None:
    found = read_labelled([TRL, row, TRL])
    assert (found.rows, len(found.solutions), found.wrong.total()) == (3, 2, 1)
    assert found.first_wrong.startswith("row 2: ")
    assert problem in found.first_wrong


def test_states_are_the_tokens_of_the_steps_so_far(
    tiny_model: Path, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_model)
    table, said = imported(config, write_rows(tmp_path / "prm.jsonl", [PRM800K, FOUND_ERROR]), capsys)
    renderer = PromptRenderer(tiny_model, config.data)
    by_text = {row["prefix"]: row for row in table.iter_rows(named=True)}
    assert {text: row["value"] for text, row in by_text.items()} == {
        "Add.\n": 1.0,
        "Add.\nIt is 5.\n": 0.0,
        "Add.\n2 + 2 = 4.\n": 1.0,
        "Add.\n2 + 2 = 4.\nSo 5.\n": 0.0,
        "Add.\n2 + 2 = 4.\nSo 4.": 1.0,
        "Add.\nSo 5.\n": 0.0,
    }
    for row in by_text.values():
        assert renderer.decode(row["prefix_token_ids"]) == row["prefix"]
        assert row["state_id"] == state_id(row["prompt_id"], row["prefix_token_ids"])
        assert row["prompt_id"] == prompt_id("What is 2 + 2?", "4")
        assert row["num_completions"] == len(row["rewards"]) == (2 if row["step"] == 1 else 1)
        assert row["is_terminal"] == (row["prefix"] == "Add.\n2 + 2 = 4.\nSo 4.")
        assert row["is_terminal"] == (row["prefix_token_ids"][-1] in renderer.eos_token_ids)
        assert row["action_texts"] == row["action_values"] == []
    along = sorted((row["prefix_token_ids"] for row in by_text.values() if 2 in row["solutions"]), key=len)
    assert len(along) == 3
    assert all(after[: len(before)] == before for before, after in pairwise(along))
    assert by_text["Add.\n"]["solutions"] == [0, 1, 2, 3, 4]
    assert "6 states of 5 solutions of 1 prompts, mean value 0.500" in said
    made = read_provenance(run_paths(config.run).segments, SEGMENTS_TABLE.version, {})
    assert made.identity["segments"]["imported"] == "prm.jsonl"


def test_labels_of_one_state_are_averaged(
    tiny_model: Path, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**TRL, "labels": [1.0, 0.5]}, {**TRL, "labels": [0, 0.25]}]
    table, _ = imported(config_of(tiny_model), write_rows(tmp_path / "a.jsonl", rows), capsys)
    assert table["value"].to_list() == [0.5, 0.375]
    assert table["rewards"].to_list() == [[1.0, 0.0], [0.5, 0.25]]
    assert table["outcomes"].to_list() == [["correct", "wrong"], ["correct", "wrong"]]
    assert table["solutions"].to_list() == [[0, 1], [0, 1]]
    assert (table["value_se"] > 0.1).all()


def test_what_is_left_out_is_said(
    tiny_model: Path, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        TRL,
        {**TRL, "labels": [True]},
        {**TRL, "completions": ["one", "two " * 300]},
        {**TRL, "prompt": "many " * 200},
        SHEPHERD,
    ]
    config = config_of(tiny_model, data={"long_prompts": "drop"})
    table, said = imported(config, write_rows(tmp_path / "a.jsonl", rows), capsys)
    assert "1 of 5 rows left out, the first of them row 2: it has 1 labels for 2 steps" in said
    assert (
        "1 solutions are cut off at sampling.max_completion_tokens = 200: later states are left out" in said
    )
    assert "1 prompts left out: longer than 64 tokens" in said
    assert table["prefix"].to_list() == [
        "It is 9.\n",
        "It is 9.\nSo 9.\n",
        "one\n",
        "Step 1: 3 - 1 = 2.\n",
        "Step 1: 3 - 1 = 2.\nStep 2: It is 2. The answer is: 2",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no .*steps.jsonl; correct the path"),
        ("", "has no rows"),
        (
            '{"text": "x"}\n',
            "1 of 1 rows are not labelled steps that can be read; row 1: it has the columns text",
        ),
        (
            json.dumps(TRL)
            + "\n"
            + json.dumps({**TRL, "labels": []}) * 1
            + "\n"
            + json.dumps({"a": 1})
            + "\n",
            "2 of 3 rows are not labelled steps that can be read; row 2: it has 0 labels for 2 steps",
        ),
        ("{\n", "cannot read .*line 1 is no JSON"),
        (json.dumps({**TRL, "prompt": "many " * 200}), "more than data.max_prompt_tokens = 64"),
        (json.dumps({**TRL, "completions": ["two " * 300, "x"]}), "no state is left, as all are longer than"),
    ],
)
def test_a_file_that_cannot_be_imported_leaves_nothing(
    tiny_model: Path, artifacts: Path, tmp_path: Path, content: str | None, problem: str
) -> None:
    file = tmp_path / "steps.jsonl"
    if content is not None:
        file.write_text(content)
    config = config_of(tiny_model)
    with pytest.raises(UserError, match=problem):
        import_segments(config, file, Terminal(quiet=True))
    assert not run_paths(config.run).segments.exists()


def test_states_that_are_there_are_not_replaced(tiny_model: Path, artifacts: Path, tmp_path: Path) -> None:
    config, file = config_of(tiny_model), write_rows(tmp_path / "a.jsonl", [TRL])
    import_segments(config, file, Terminal(quiet=True))
    before = run_paths(config.run).segments.read_bytes()
    with pytest.raises(UserError, match="exists; import into another --run, or remove it"):
        import_segments(config, file, Terminal(quiet=True))
    assert run_paths(config.run).segments.read_bytes() == before


@pytest.mark.parametrize(
    ("separators", "between"),
    [(["\n"], "\n"), (["\n\n"], "\n\n"), ([". ", "! "], " "), ([" ки"], " ки")],
)
def test_steps_are_joined_as_the_runs_own_steps_end(separators: list[str], between: str) -> None:
    assert separator_of(separators) == between


@pytest.mark.parametrize(
    ("separators", "texts"),
    [
        ([". ", "! "], ["a. ", "b ", "c; "]),
        ([", "], ["a. ", "b ", "c; "]),
        ([";"], ["a.;", "b;", "c;"]),
        (["\n"], ["a.\n", "b\n", "c;\n"]),
    ],
)
def test_a_step_ends_as_one_of_the_run_and_a_whole_solution_with_the_end_token(
    tiny_model: Path, separators: list[str], texts: list[str]
) -> None:
    renderer = PromptRenderer(tiny_model, config_of(tiny_model).data)
    tokenise = StepTokeniser(renderer, separators)
    assert tokenise.texts(["a.", "b", "c;"], is_whole=False) == texts
    assert tokenise.texts(["a.", "b", "c;"], is_whole=True) == [*texts[:2], "c;"]
    words = [" Tom\n", " buys"]
    first, last = tokenise.token_ids(words, is_whole=True)
    assert tokenise.token_ids(words, is_whole=False) == [first, last[:-1]]
    assert last[-1] == renderer.eos_token_ids[0]


def state(
    prefix: str, value: float, solutions: Sequence[int], step: int, *, prompt: str = "1 + 1?", **columns: Any
) -> dict[str, Any]:
    name = prompt_id(prompt, "2")
    tokens = list(prefix.encode())
    return {
        "state_id": state_id(name, tokens),
        "prompt_id": name,
        "prompt": prompt,
        "answer": "2",
        "prompt_token_hash": "",
        "prefix": prefix,
        "prefix_token_ids": tokens,
        "step": step,
        "solutions": list(solutions),
        "is_terminal": False,
        "num_completions": 1,
        "rewards": [value],
        "outcomes": [Outcome.WRONG.value],
        "completion_tokens": [1],
        "value": value,
        "value_se": 0.1,
        **{field.name: [] for field in SEGMENTS if field.name.startswith("action_")},
        **columns,
    }


STATES = [
    state("", 0.5, [0, 3], 0),
    state("First.\n", 0.75, [0, 3], 1),
    state("First.\n\n  It is 2.\n", 1.0, [0], 2),
    state("First.\nIt is 3.", 0.0, [3], 2),
    state("First.\n\n  It is 2.\n ", 1.0, [0], 3, is_terminal=True),
    state("All at once", 0.25, [1], 1, prompt="Ünïcode “½”?"),
]


def table_of(
    path: Path, rows: Sequence[dict[str, Any]] = STATES, *, separators: Sequence[str] = ("\n",)
) -> Path:
    identity = {**IDENTITY, "segments": {"separators": list(separators)}}
    schema = pl.DataFrame(SEGMENTS.empty_table()).schema
    frame = pl.DataFrame(list(rows), schema=schema)
    SEGMENTS_TABLE.write(frame, Provenance(identity=identity, context=CONTEXT), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[True, True], [True, False], [True]]),
        ({"at_least": 0.75}, [[True, True], [True, False], [False]]),
        ({"soft": True}, [[0.75, 1.0], [0.75, 0.0], [0.25]]),
    ],
)
def test_each_chosen_solution_is_a_row_of_trls_stepwise_format(
    tmp_path: Path, suffix: str, options: dict[str, Any], expected: list[list[Any]]
) -> None:
    """As `datasets` loads it. A step that only ends the solution has no text, and is not written."""
    path = tmp_path / f"steps{suffix}"
    lines = export_segments(table_of(tmp_path / "segments.parquet"), path, **options)
    kind = "json" if suffix == ".jsonl" else "parquet"
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["prompt"] == ["1 + 1?", "1 + 1?", "Ünïcode “½”?"]
    assert rows["completions"] == [["First.", "It is 2."], ["First.", "It is 3."], ["All at once"]]
    assert rows["labels"] == expected
    assert rows["answer"] == ["2", "2", "2"]
    number = "float64" if "soft" in options else "bool"
    assert rows.features["labels"].feature.dtype == number
    assert "3 solutions for TRL, 5 steps" in lines[0]
    assert ("only the value 1 counts as correct there" in " ".join(lines)) == ("soft" in options)


def test_a_separator_that_is_no_line_break_is_said(tmp_path: Path) -> None:
    source = table_of(tmp_path / "segments.parquet", separators=["\n\n"])
    lines = export_segments(source, tmp_path / "steps.jsonl")
    assert lines[1].startswith('steps end with "\\n\\n", and are written without the white space around them')


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("steps.json", {}, r"give a file whose name ends in .jsonl or .parquet"),
        ("steps.jsonl", {"soft": True, "at_least": 0.5}, "leave one out"),
        ("steps.jsonl", {"at_least": 0.0}, "--at-least 0: give a value above 0, up to 1"),
        ("steps.jsonl", {"at_least": float("nan")}, "--at-least nan: give a value"),
        ("segments.parquet", {}, "is the table itself; give another file"),
    ],
)
def test_an_export_that_cannot_be_made_writes_nothing(
    tmp_path: Path, name: str, options: dict[str, Any], problem: str
) -> None:
    source = table_of(tmp_path / "segments.parquet")
    before = source.read_bytes()
    with pytest.raises(UserError, match=problem):
        export_segments(source, tmp_path / name, **options)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]


def test_solutions_that_trls_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    turns = text_of_turns([{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}])
    source = table_of(tmp_path / "a.parquet", [state("x\n", 1.0, [0], 1, prompt=turns)])
    with pytest.raises(UserError, match="has 2 messages, and TRL's stepwise rows hold texts alone"):
        export_segments(source, tmp_path / "steps.jsonl")
    source = table_of(tmp_path / "b.parquet", [state("", 1.0, [0], 0)])
    with pytest.raises(UserError, match="holds no solution with steps"):
        export_segments(source, tmp_path / "steps.jsonl")
    rows = [state("x\n", 1.0, [0], 1), state("y\nz\n", 1.0, [0], 2)]
    with pytest.raises(UserError, match="does not begin as the one before it"):
        export_segments(table_of(tmp_path / "c.parquet", rows), tmp_path / "steps.jsonl")
    assert not (tmp_path / "steps.jsonl").exists()


def test_solutions_that_cut_the_same_text_differently_keep_their_steps_in_order(
    tiny_model: Path, artifacts: Path, tmp_path: Path
) -> None:
    fine = {"prompt": "1?", "completions": ["a", "b", "c"], "labels": [True, False, True]}
    coarse = {"prompt": "1?", "completions": ["a\nb", "d", "e"], "labels": [True, True, False]}
    config = config_of(tiny_model)
    import_segments(config, write_rows(tmp_path / "a.jsonl", [fine, coarse]), Terminal(quiet=True))
    export_segments(run_paths(config.run).segments, tmp_path / "b.jsonl", soft=True)
    rows = pl.read_ndjson(tmp_path / "b.jsonl")
    assert rows["completions"].to_list() == [["a", "b", "c"], ["a\nb", "d", "e"]]
    assert rows["labels"].to_list() == [[1.0, 0.5, 1.0], [0.5, 1.0, 0.0]]


def test_the_first_wrong_step_of_a_solution_that_shares_a_state_with_a_coarser_one_is_its_own(
    tiny_model: Path, artifacts: Path, tmp_path: Path
) -> None:
    coarse = {"prompt": "1?", "completions": ["a\nb"], "labels": [False]}
    fine = {"prompt": "1?", "completions": ["a", "b"], "labels": [True, False]}
    config, table = config_of(tiny_model), run_paths("test").segments
    import_segments(config, write_rows(tmp_path / "a.jsonl", [coarse, fine]), Terminal(quiet=True))
    assert SEGMENTS_TABLE.read(table)[0]["step"].to_list() == [1, 1]
    data = read_critic_data(table, config.data, PromptRenderer(tiny_model, config.data), 0.0)
    assert [label for _, label in labelled_solutions(data.states(data.training))] == [1, 0]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("soft", [False, True])
def test_what_is_exported_is_imported_as_the_same_prompts_steps_and_labels(
    tiny_model: Path, artifacts: Path, tmp_path: Path, suffix: str, soft: bool
) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    export_segments(table_of(tmp_path / "segments.parquet"), first, soft=soft)
    config = config_of(tiny_model)
    import_segments(config, first, Terminal(quiet=True))
    table = SEGMENTS_TABLE.read(run_paths(config.run).segments)[0]
    assert set(table["prompt_id"]) == {row["prompt_id"] for row in STATES}
    export_segments(run_paths(config.run).segments, second, soft=soft)
    reader = pl.read_ndjson if suffix == ".jsonl" else pl.read_parquet
    assert reader(second).equals(reader(first))
    assert reader(first).height == 3


def test_the_commands_do_what_the_functions_do(
    tiny_model: Path, artifacts: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    table_of(run_paths("source").segments)
    file = tmp_path / "steps.jsonl"
    done = run_cli("export-segments", "--run", "source", "-o", file, "--at-least", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 solutions for TRL, 5 steps; share of true labels 0.600" in done.stdout
    config = write_rows(tmp_path / "config.toml", [])
    config.write_text(
        f'run = "new"\n[model]\npath = "{tiny_model}"\n[data]\nformat = "generic"\npath = "unused.jsonl"\n'
        'template = "line"\n[sampling]\nmax_completion_tokens = 200\n[grader]\nname = "gsm8k"\n'
    )
    done = run_cli("import-segments", file, "--config", config, warm=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 states of 3 solutions of 2 prompts" in done.stdout
    refused = run_cli("export-segments", "--run", "source", "-o", tmp_path / "steps.csv")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "give a file whose name ends in .jsonl or .parquet" in refused.stderr
