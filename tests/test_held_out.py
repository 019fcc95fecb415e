"""Held-out prompts beside those for training: asked alike, other questions, and never none."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.held_out import remarks, remarks_beside_data
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.grading import GraderPool
from common.terminal.console import Terminal
from stage2_train.config import Config
from stage2_train.data import prepare
from stage2_train.evaluation.run import evaluate
from stage2_train.ranks import ALONE
from stage2_train.regime import describe_online
from tests.stage2_runs import tiny_config, write_tiny_vstar

TEMPLATE = "Q: {prompt}\nA: "


def configured(folder: Path, model: Path, held_out: dict[str, Any] | None = None, **sections: Any) -> Config:
    """`tiny_config` with these keys in [evaluate.data]; the files that it names lie there."""
    data = {"format": "generic", "path": str(folder / "test.jsonl"), **(held_out or {})}
    return tiny_config(folder, model, evaluate={"data": data}, **sections)


def write(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "answer": answer}) + "\n" for text, answer in rows))
    return str(path)


def refusal(config: Config, folder: Path) -> str:
    """What training says of its data before it loads a model; `evaluate` must say the same."""
    write_tiny_vstar(config, folder / "vstar.parquet")
    with pytest.raises(UserError) as of_training, GraderPool(config.grader) as pool:
        prepare(config, folder / "vstar.parquet").usable(config, pool, ALONE)
    with pytest.raises(UserError) as of_evaluation:
        evaluate(config, {"model": Path(config.model.path)}, Terminal(quiet=True))
    assert str(of_training.value) == str(of_evaluation.value)
    return str(of_training.value)


def test_held_out_prompts_are_asked_in_the_template_for_training_unless_told(
    tiny_model: Path, tmp_path: Path
) -> None:
    inherited = configured(tmp_path, tiny_model, data={"template": TEMPLATE})
    own = configured(tmp_path, tiny_model, {"template": "plain"}, data={"template": TEMPLATE})
    neither = configured(tmp_path, tiny_model)
    found = [config.held_out for config in (inherited, own, neither)]
    assert [data and data.template for data in found] == [TEMPLATE, "plain", None]
    assert (
        tiny_config(
            tmp_path, tiny_model, evaluate={"data": None, "num_samples": 8}, train={"evaluate_every": 10}
        ).held_out
        is None
    )

    write_tiny_vstar(inherited, tmp_path / "vstar.parquet")
    data = prepare(inherited, tmp_path / "vstar.parquet")
    renderer = PromptRenderer(tiny_model, inherited.data)
    assert [tuple(prompt.token_ids) for prompt in data.held_out] == [
        renderer.render(prompt.text) for prompt in data.held_out
    ]


def test_a_line_says_where_templates_differ(tiny_model: Path, tmp_path: Path) -> None:
    def lines(data: dict[str, Any], held_out: dict[str, Any]) -> list[str]:
        return remarks(configured(tmp_path, tiny_model, held_out, data=data), ["x"], ["y"])

    (line,) = lines({"format": "gsm8k"}, {"format": "math"})
    assert "held-out prompts are asked in another template" in line
    assert "####" in line
    assert "boxed" in line
    assert len(lines({"template": TEMPLATE}, {"template": "plain"})) == 1
    assert lines({"format": "gsm8k"}, {"format": "generic", "template": "gsm8k"}) == []
    assert lines({"format": "gsm8k", "template": "plain"}, {"format": "math"}) == []


def test_questions_that_are_also_trained_on_are_counted_whatever_their_answers_and_spaces(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = configured(tmp_path, tiny_model)
    training = ["How many  apples?", "How many pears?", "How many eggs?"]
    assert remarks(config, ["How many apples? ", "how many pears?", "How\nmany eggs?"], training) == [
        "2 of 3 held-out prompts are also training prompts: their accuracy says little about new questions; "
        "take other rows for evaluate.data"
    ]
    assert remarks(config, ["How many books?"], training) == []


def test_training_data_that_is_not_there_is_said_to_be_unknown(tiny_model: Path, tmp_path: Path) -> None:
    config = configured(tmp_path, tiny_model)
    assert remarks_beside_data(config, ["Tom has 0 apples."]) == [
        "1 of 1 held-out prompts are also training prompts: their accuracy says little about new questions; "
        "take other rows for evaluate.data"
    ]
    (tmp_path / "train.jsonl").unlink()
    (line,) = remarks_beside_data(config, ["Tom has 0 apples."])
    assert line.startswith(
        "whether held-out prompts are also training prompts cannot be told: there is no data file"
    )


def test_a_template_that_only_missing_training_data_could_tell_is_no_error(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = {"format": "auto", "path": str(tmp_path / "none.jsonl"), "template": None}
    (line,) = remarks_beside_data(configured(tmp_path, tiny_model, data=data), ["Tom has 0 apples."])
    assert line.startswith(
        "whether held-out prompts are also training prompts cannot be told: there is no data"
    )


def test_training_says_so_before_its_first_iteration(tiny_model: Path, tmp_path: Path) -> None:
    shared = write(tmp_path / "both.jsonl", ("Tom has 0 apples.", "3"), ("Tom has a hat.", "1"))
    config = configured(tmp_path, tiny_model, {"path": shared})
    write_tiny_vstar(config, tmp_path / "vstar.parquet")
    data = prepare(config, tmp_path / "vstar.parquet")
    assert any(line.startswith("1 of 2 held-out prompts") for line in describe_online(config, data))
    config = configured(tmp_path, tiny_model)
    assert not any(
        "held-out" in line for line in describe_online(config, prepare(config, tmp_path / "vstar.parquet"))
    )


@pytest.mark.parametrize(
    ("rows", "section", "expected"),
    [
        ((), {}, "test.jsonl is empty; check evaluate.data.path"),
        (
            (("How far?", "far"),),
            {},
            '1 of 1 reference answers of {file} cannot be used by the grader: "How far?"',
        ),
        (
            (("How far?", "far"),),
            {"bad_golds": "drop"},
            "no prompt of {file} is left: the grader can use none of the reference answers; check "
            "evaluate.data.answer_field and grader.name",
        ),
        (
            (("How far?", "1"),),
            {"long_prompts": "drop", "max_prompt_tokens": 2},
            "no prompt of {file} is left: all are longer than evaluate.data.max_prompt_tokens = 2; raise the limit",
        ),
        (
            (("How far?", "1"),),
            {"max_prompt_tokens": 2},
            'more than evaluate.data.max_prompt_tokens = 2: "How far?"; raise the limit or set '
            'evaluate.data.long_prompts = "drop"',
        ),
        ((("How far?", "1"),), {"template": "gsm9k"}, 'evaluate.data.template is "gsm9k": use one of'),
        (
            (("How far?", "1"),),
            {"answer_field": "gold"},
            "set evaluate.data.prompt_field and evaluate.data.answer_field",
        ),
        (
            ((" ".join(["far"] * 600), "1"),),
            {"max_prompt_tokens": 2000},
            "the longest prompt of [evaluate.data]",
        ),
    ],
    ids=[
        "empty",
        "bad answers",
        "no usable answer",
        "none short",
        "too long",
        "template",
        "field",
        "context",
    ],
)
def test_held_out_prompts_that_cannot_be_used_are_refused_before_a_model_loads(
    tiny_model: Path,
    tmp_path: Path,
    rows: tuple[tuple[str, str], ...],
    section: dict[str, Any],
    expected: str,
) -> None:
    config = configured(tmp_path, tiny_model, section)
    file = write(tmp_path / "test.jsonl", *rows)
    assert expected.format(file=file) in refusal(config, tmp_path)
