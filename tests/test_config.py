"""The configuration: every wrong value is refused with its place, what was found and what is possible."""

import json
import math
import re
import tomllib
from pathlib import Path

import pytest

from common.errors import UserError
from stage2_train.config import Config, load_config

ROOT = Path(__file__).parents[1]

MINIMAL = """
run = "test"
[model]
path = "some/model"
[data]
format = "gsm8k"
path = "train.jsonl"
[grader]
name = "gsm8k"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str, run: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, run)
    return str(caught.value)


def test_defaults_are_the_papers(minimal: Path) -> None:
    config = load_config(minimal)
    assert (config.vstar.num_samples, config.vstar.beta1, config.vstar.drop_unsolved) == (8, 0.5, False)
    assert (config.sampling.temperature, config.sampling.top_p) == (1.0, 1.0)
    assert (config.data.max_prompt_tokens, config.sampling.max_completion_tokens) == (256, 1024)
    assert (config.train.learning_rate, config.train.batch_size, config.train.mini_batch_size) == (
        1e-6,
        256,
        128,
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_of_the_checkout_is_valid_and_named_for_its_run(path: Path) -> None:
    assert load_config(path).run


def test_a_key_is_refused_with_the_keys_that_would_do(minimal: Path) -> None:
    message = refusal(minimal, "vstar.num_sample=4")
    assert str(minimal) in message
    assert "unknown key vstar.num_sample; use one of num_samples, beta1, drop_unsolved" in message


def test_an_unknown_section_is_refused_with_the_sections_there_are(minimal: Path) -> None:
    message = refusal(minimal, "stage1.beta1=4")
    assert "unknown key stage1; use one of run, seed, model, data, sampling, grader, engine, vstar" in message


def test_a_key_inside_the_objective_is_refused_with_the_objectives_keys(minimal: Path) -> None:
    message = refusal(minimal, "train.objective.name=astar_po", "train.objective.beta=1")
    assert "train.objective" in message
    assert "beta2" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("vstar.num_samples=0", "vstar.num_samples should be greater than or equal to 1, found 0"),
        ("vstar.num_samples=2.5", "vstar.num_samples"),
        ("vstar.beta1=-0.5", "vstar.beta1 should be greater than or equal to 0, found -0.5"),
        ("vstar.beta1=nan", "vstar.beta1"),
        ("vstar=3", "vstar should be a valid dictionary"),
        ("sampling.top_p=0", "sampling.top_p should be greater than 0, found 0"),
        ("sampling.top_p=1.5", "sampling.top_p should be less than or equal to 1, found 1.5"),
        ("sampling.temperature=-1", "sampling.temperature should be greater than or equal to 0, found -1"),
        ("sampling.max_completion_tokens=0", "sampling.max_completion_tokens should be greater than"),
        (
            "data.format=csv",
            "data.format should be 'gsm8k', 'math', 'openr1', 'generic', 'word_problems' or 'mbpp'",
        ),
        ("data.limit=0", "data.limit should be greater than or equal to 1, found 0"),
        ("data.bad_golds=keep", "data.bad_golds should be 'error' or 'drop', found 'keep'"),
        ("grader.name=exact", "unknown grader 'exact': use one of gsm8k, math"),
        ("engine.backend=sglang", "engine.backend should be 'vllm' or 'transformers', found 'sglang'"),
        ("train.batch_size=100", "batch_size 100 is not a multiple of mini_batch_size 128"),
        ("run=../elsewhere", "run "),
        ("seed=-1", "seed should be greater than or equal to 0, found -1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_was_found(
    minimal: Path, override: str, expected: str
) -> None:
    assert expected in refusal(minimal, override)


def test_all_problems_are_told_at_once(minimal: Path) -> None:
    message = refusal(minimal, "vstar.num_samples=0", "vstar.beta1=-1", "sampling.topp=1")
    assert all(key in message for key in ("vstar.num_samples", "vstar.beta1", "sampling.topp"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('run = "test"\n[model]\npath = "m"\n[data]\nformat = "gsm8k"\n')
    assert "grader is missing" in refusal(path)


def test_a_missing_file_and_invalid_toml_are_named(tmp_path: Path) -> None:
    assert f"cannot read the config {tmp_path / 'none.toml'}: No such file" in refusal(tmp_path / "none.toml")
    assert "Is a directory" in refusal(tmp_path)
    path = tmp_path / "broken.toml"
    path.write_text("run = \n")
    assert f"{path} is not valid TOML: Invalid value (at line 1" in refusal(path)
    path.write_bytes(b'run = "\xff"')
    assert f"{path} is not valid TOML" in refusal(path)


@pytest.mark.parametrize("override", ["beta1", "vstar.", ".beta1=1", "=1", "vstar..beta1=1"])
def test_an_override_without_a_key_or_a_value_is_told_how_to_write_it(minimal: Path, override: str) -> None:
    assert "write it as section.key=value" in refusal(minimal, override)


def test_an_override_below_a_value_is_refused(minimal: Path) -> None:
    assert "run is a value, not a section" in refusal(minimal, "run.name=1")


def test_overrides_are_typed_as_in_toml_and_bare_words_are_texts(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "vstar.beta1=inf",
            "vstar.num_samples=16",
            "vstar.drop_unsolved=true",
            "data.path=a=b.jsonl",
            'data.prompt_field="x"',
        ],
        run="other",
    )
    assert math.isinf(config.vstar.beta1)
    assert (config.vstar.num_samples, config.vstar.drop_unsolved) == (16, True)
    assert (config.data.path, config.data.prompt_field, config.run) == ("a=b.jsonl", "x", "other")


def test_the_run_given_apart_is_checked_too(minimal: Path) -> None:
    assert "run " in refusal(minimal, run="../../tmp")


@pytest.mark.parametrize("beta1", ["0", "inf", "1e-6", "1e6"])
def test_the_resolved_config_reads_back_as_itself(minimal: Path, beta1: str) -> None:
    config = load_config(minimal, [f"vstar.beta1={beta1}"])
    assert Config.model_validate(json.loads(config.to_json())) == config


def test_a_config_never_changes_after_validation(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.vstar.beta1 = 1.0


def test_each_config_says_how_it_is_run_and_what_it_needs() -> None:
    for path in (ROOT / "configs").glob("*.toml"):
        text = path.read_text()
        head = text[: text.index("run =")]
        assert "make " in head or "cli.py" in head, path
        assert "Hardware" in head, path
        assert "cost" in head.lower(), path
        assert tomllib.loads(text)["run"] == path.stem, path


def test_the_config_in_the_readme_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "mine.toml").write_text(block[1], encoding="utf-8")
    assert load_config(tmp_path / "mine.toml").model.path == "Qwen/Qwen2.5-1.5B"
