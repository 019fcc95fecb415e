"""export-data: files of SPO, TRL and verl, which `data.format = "auto"` reads back to the same prompts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas
import polars as pl
import pytest

from common.data.datasets import format_of, read_pairs
from common.data.messages import text_of_turns
from common.data.prompts import prompt_id
from common.errors import UserError
from common.grading.reference import Reference
from common.provenance import Provenance, read_provenance
from common.runs import run_paths
from common.vstar_file import read_vstar, write_vstar
from stage1_vstar.export_data import export_data
from tests.conftest import RunCli
from tests.fakes import CONTEXT, IDENTITY, rows_of_samples, sample_rows, tiny_config, write_artifact
from tests.stage1_runs import Engines, run

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MATH = "{prompt} Put it into \\boxed{}."
TURNS = text_of_turns(
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]
)
LONE = {" What is 1 + 1?\n": ("2", "cw"), "Ünïcode “½”?": ("0.5", "cc"), "Twice?": ("7", "ww")}
"""Prompts with their answers, and whether their samples are correct or wrong."""


def artifact(
    path: Path,
    prompts: Mapping[str, tuple[str, str]],
    *,
    template: str = CHAT,
    grader: str = "math/1",
    framing: Mapping[str, Any] | None = None,
) -> Path:
    """A vstar.parquet of these prompts, under their real ids; those that no sample solves are not kept."""
    names = {prompt_id(text, answer): (text, answer, marks) for text, (answer, marks) in prompts.items()}
    samples = sample_rows(
        {
            name: ["correct" if mark == "c" else "wrong" for mark in marks]
            for name, (*_, marks) in names.items()
        }
    )
    for column, place in (("prompt", 0), ("answer", 1)):
        texts = {name: texts[place] for name, texts in names.items()}
        samples = samples.with_columns(pl.col("prompt_id").replace_strict(texts).alias(column))
    rows = rows_of_samples(samples, num_samples=max(len(marks) for _, marks in prompts.values()))
    rows = rows.with_columns(
        keep=pl.col("pass_at_n"), dropped_by=pl.when(~pl.col("pass_at_n")).then(pl.lit("pass@N = 0"))
    )
    prompt = {"template": template, "eos_token_ids": [0], **(framing or {})}
    identity = {**IDENTITY, "prompt": prompt, "grader": grader}
    write_vstar(rows, Provenance(identity=identity, context=CONTEXT), path)
    return path


def read_back(path: Path, **data: Any) -> list[tuple[str, str]]:
    config = tiny_config(path.parent, path, data={"format": "auto", "template": None, **data})
    return read_pairs(config.data, config)


@pytest.mark.parametrize("format_name", ["trl", "verl"])
@pytest.mark.parametrize("template", [CHAT, MATH])
@pytest.mark.parametrize("at_a_time", [1, 65_536])
def test_data_that_is_exported_is_read_back_as_the_same_prompts(
    tmp_path: Path, format_name: str, template: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.contract.BATCH_ROWS", at_a_time)
    prompts = {**LONE, TURNS: ("5", "cw")} if template == CHAT else LONE
    source = artifact(tmp_path / "vstar.parquet", prompts, template=template)
    path = tmp_path / "new" / "data.parquet"
    export_data(source, path, format_name, dropped_too=True)
    rows = read_vstar(source)[0]
    pairs = read_back(path)
    assert pairs == list(zip(rows["prompt"], rows["answer"], strict=True))
    assert [prompt_id(*pair) for pair in pairs] == rows["prompt_id"].to_list()
    assert read_provenance(path) == read_provenance(source)
    assert [each.name for each in path.parent.iterdir()] == ["data.parquet"]


@pytest.mark.parametrize(("format_name", "column"), [("trl", "answer"), ("verl", "reward_model")])
def test_answers_are_written_without_the_columns_that_reward_functions_read(
    tmp_path: Path, format_name: str, column: str
) -> None:
    held = Reference(answer="3", columns={"level": 2}).to_text()
    source = artifact(tmp_path / "vstar.parquet", {"1 + 2?": (held, "cc")})
    path = tmp_path / "data.parquet"
    *_, remark = export_data(source, path, format_name)
    found = pandas.read_parquet(path)[column][0]
    assert found == "3" if format_name == "trl" else found["ground_truth"] == "3"
    assert "read the columns level, which the file leaves out" in remark


def test_a_file_for_trl_has_messages_where_the_model_has_a_chat_template_and_texts_where_not(
    tmp_path: Path,
) -> None:
    chat = artifact(tmp_path / "chat.parquet", {TURNS: ("5", "cw"), "Solved?": ("1", "cc")})
    plain = artifact(tmp_path / "plain.parquet", LONE, template=MATH)
    export_data(chat, tmp_path / "1.parquet", "trl")
    first = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "1.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    vstar = read_vstar(chat)[0]["vstar"]
    assert first[0] == {
        "prompt": json.loads(TURNS),
        "answer": "5",
        "pass_rate": 0.5,
        "vstar": vstar[0],
        "num_samples": 2,
        "prompt_id": prompt_id(TURNS, "5"),
    }
    assert first[1]["prompt"] == [{"role": "user", "content": "Solved?"}]
    (line, remark) = export_data(plain, tmp_path / "2.parquet", "trl")
    assert pandas.read_parquet(tmp_path / "2.parquet")["prompt"].tolist() == [*LONE][:2]
    assert line == f"{tmp_path / '2.parquet'}: 2 prompts for TRL"
    assert "the file has the questions alone: --in-template writes them in it" in remark
    assert format_of(tiny_config(tmp_path, tmp_path / "2.parquet", data={"format": "auto"}).data).name == (
        "prompt and answer"
    )


def test_prompts_are_written_with_all_that_was_put_around_them(tmp_path: Path) -> None:
    framing = {
        "instruction": "Use ####.",
        "few_shot": [{"prompt": "1?", "completion": "#### 1"}],
        "prefill": "So ",
    }
    of_chat = {**framing, "system_prompt": "Add.", "chat_template_kwargs": [["enable_thinking", False]]}
    chat = artifact(tmp_path / "chat.parquet", {"2?": ("2", "cc")}, framing=of_chat)
    _, told, prefilled = export_data(chat, tmp_path / "1.parquet", "trl")
    assert pandas.read_parquet(tmp_path / "1.parquet")["prompt"][0].tolist() == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1?\nUse ####."},
        {"role": "assistant", "content": "#### 1"},
        {"role": "user", "content": "2?\nUse ####."},
    ]
    assert 'with chat_template_kwargs {"enable_thinking": false}, which messages cannot hold' in told
    assert 'with prefill "So "' in prefilled
    plain = artifact(
        tmp_path / "plain.parquet", {"2?": ("2", "cc")}, template="Q: {prompt} A: ", framing=framing
    )
    (_,) = export_data(plain, tmp_path / "2.parquet", "trl", in_template=True)
    assert pandas.read_parquet(tmp_path / "2.parquet")["prompt"].tolist() == [
        "Q: 1?\nUse ####. A: #### 1\n\nQ: 2?\nUse ####. A: So "
    ]
    _, remark = export_data(plain, tmp_path / "3.parquet", "trl")
    assert "with instruction, few_shot, prefill, the file has the questions alone" in remark


def test_a_file_for_verl_has_its_columns(tmp_path: Path) -> None:
    source = artifact(tmp_path / "vstar.parquet", {"Lost?": ("1", "ww"), **LONE}, grader="gsm8k/1")
    (line,) = export_data(source, tmp_path / "verl.parquet", "verl")
    assert line.endswith("verl.parquet: 2 prompts for verl, data_source openai/gsm8k")
    rows = pandas.read_parquet(tmp_path / "verl.parquet").to_dict("records")
    assert list(rows[1]["prompt"]) == [{"role": "user", "content": "Ünïcode “½”?"}]
    assert {name: value for name, value in rows[1].items() if name != "prompt"} == {
        "data_source": "openai/gsm8k",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "0.5"},
        "extra_info": {
            "index": 1,
            "split": "train",
            "pass_rate": 1.0,
            "vstar": 1.0,
            "num_samples": 2,
            "prompt_id": prompt_id("Ünïcode “½”?", "0.5"),
        },
    }


def test_what_verl_must_be_told_is_said(tmp_path: Path) -> None:
    source = artifact(
        tmp_path / "vstar.parquet", {"Which?": ('["a", "b"]', "cw")}, grader="1 math/3 + 0.5 mine:style@ab12"
    )
    path = tmp_path / "verl.parquet"
    lines = export_data(source, path, "verl")
    assert lines[1] == (
        "verl has no rule of its own for the grader 1 math/3 + 0.5 mine:style@ab12: set its custom_reward_function"
    )
    assert lines[2].startswith("1 answers look like JSON lists")
    fields = {"prompt_field": "prompt", "answer_field": "reward_model.ground_truth"}
    assert read_back(path, **fields) == [("Which?", '["a", "b"]')]


@pytest.mark.parametrize("at_a_time", [1, 65_536])
def test_spo_finds_each_prompts_rewards_under_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    """SPO looks up `raw_prompt[0]["content"].strip()`; prompts that differ in their answer alone are one to it."""
    monkeypatch.setattr("common.contract.BATCH_ROWS", at_a_time)
    source = artifact(tmp_path / "vstar.parquet", {**LONE, "What is 1 + 1?": ("3", "wwc")})
    lines = export_data(source, tmp_path / "values.json", "spo", dropped_too=True)
    values = json.loads((tmp_path / "values.json").read_bytes())
    assert values == {
        "What is 1 + 1?": [1.0, 0.0, 0.0, 0.0, 1.0],
        "Ünïcode “½”?": [1.0, 1.0],
        "Twice?": [0.0, 0.0],
    }
    assert lines[0].endswith(f"trainer.spo.offline_values={tmp_path / 'values.json'} trainer.spo.offline_N=2")
    assert lines[1].startswith("prompts have 2 to 5 scores")
    (line,) = export_data(artifact(source, LONE), tmp_path / "values.json", "spo")
    assert "2 prompts for SPO" in line
    assert set(json.loads((tmp_path / "values.json").read_bytes())) == {"What is 1 + 1?", "Ünïcode “½”?"}


def test_it_is_said_where_spo_will_take_a_part_of_a_reward_for_all_of_it(tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "vstar.parquet", {"p": ["wrong"] * 2}, rewards={"p": [0.0, 0.5]})
    lines = export_data(source, tmp_path / "values.json", "spo", dropped_too=True)
    assert lines[1] == "not all scores are 0 or 1: SPO counts each that is above 0 as a success"


def test_prompts_are_written_in_the_runs_template_where_that_is_asked_for(tmp_path: Path) -> None:
    source = artifact(tmp_path / "vstar.parquet", {"1 + 1?": ("2", "cc")}, template=MATH)
    shown = "1 + 1? Put it into \\boxed{}."
    for name in ("values.json", "trl.parquet", "verl.parquet"):
        (_,) = export_data(
            source, tmp_path / name, name.split(".")[0].replace("values", "spo"), in_template=True
        )
    assert list(json.loads((tmp_path / "values.json").read_text())) == [shown]
    assert read_back(tmp_path / "trl.parquet") == read_back(tmp_path / "verl.parquet") == [(shown, "2")]


@pytest.mark.parametrize(
    ("name", "format_name", "options", "problem"),
    [
        ("data.json", "csv", {}, "there is no format csv; choose one of spo, trl, verl"),
        ("data.json", "verl", {}, r"a file in the format verl ends in \.parquet; rename it"),
        ("vstar.parquet", "trl", {}, "is the artifact itself; give another file"),
        ("data.parquet", "trl", {"in_template": True}, "leave out --in-template"),
        ("data.json", "spo", {}, "has 2 messages, and SPO tells prompts apart by the first alone"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, format_name: str, options: dict[str, bool], problem: str
) -> None:
    source = artifact(tmp_path / "vstar.parquet", {TURNS: ("5", "cw")})
    before = source.read_bytes()
    with pytest.raises(UserError, match=problem):
        export_data(source, tmp_path / name, format_name, **options)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("name", ["values.json", "trl.parquet", "verl.parquet"])
def test_an_artifact_that_keeps_no_prompt_leaves_the_file_that_was_there(tmp_path: Path, name: str) -> None:
    source = artifact(tmp_path / "vstar.parquet", {"Hard?": ("1", "ww")})
    (tmp_path / name).write_text("before")
    with pytest.raises(
        UserError, match=r"no prompt is kept, so there is nothing to export; .* or give --all"
    ):
        export_data(source, tmp_path / name, name.split(".")[0].replace("values", "spo"))
    assert (tmp_path / name).read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["vstar.parquet", name])


@pytest.mark.parametrize("format_name", ["trl", "verl"])
def test_a_run_that_goes_on_with_the_exported_file_draws_no_sample_anew(
    engines: Engines, tiny_model: Path, data_file: Path, tmp_path: Path, format_name: str
) -> None:
    run(tiny_config(tiny_model, data_file))
    drawn = len(engines.next.drawn)
    exported = tmp_path / "exported.parquet"
    export_data(run_paths("test").vstar, exported, format_name, dropped_too=True)
    before = read_vstar(run_paths("test").vstar)[0]
    run(tiny_config(tiny_model, exported, data={"format": "auto"}))
    assert len(engines.next.drawn) == drawn
    assert read_vstar(run_paths("test").vstar)[0].equals(before)


def test_the_command_does_what_the_function_does(artifacts: Path, run_cli: RunCli, tmp_path: Path) -> None:
    artifact(artifacts / "demo" / "vstar.parquet", LONE)
    done = run_cli("export-data", "--format", "spo", "-o", tmp_path / "values.json", "--all")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 prompts for SPO" in done.stdout
    refused = run_cli("export-data", "--format", "verl", "-o", "/dev/null")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "ends in .parquet; rename it" in refused.stderr
