"""The configuration: every wrong value is refused with its place, what was found and what is possible."""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from common.errors import UserError
from common.section import Section
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
        ("vstar=3", "vstar should be a section, such as [vstar] with num_samples = …, found 3"),
        (
            "model=Qwen/Qwen2.5-1.5B",
            "model should be a section, such as [model] with path = …, found 'Qwen/Qwen2",
        ),
        (
            "train.objective=grpo",
            "train.objective should be a section, such as [train.objective] with name = …",
        ),
        ('run="a b"', 'run should be of letters, digits, ".", "_" and "-", and begin with a letter or digit'),
        ('data.few_shot=["Q"]', "data.few_shot.0 should be a table, such as { prompt = … }, found 'Q'"),
        ("sampling.top_p=0", "sampling.top_p should be greater than 0, found 0"),
        ("sampling.top_p=1.5", "sampling.top_p should be less than or equal to 1, found 1.5"),
        ("sampling.temperature=-1", "sampling.temperature should be greater than or equal to 0, found -1"),
        ("sampling.max_completion_tokens=0", "sampling.max_completion_tokens should be greater than"),
        (
            "data.format=csv",
            "data.format should be 'auto', 'gsm8k', 'math', 'openr1', 'generic', 'word_problems' or 'mbpp'",
        ),
        ("data.limit=0", "data.limit should be greater than or equal to 1, found 0"),
        ("data.bad_golds=keep", "data.bad_golds should be 'error' or 'drop', found 'keep'"),
        ("grader.name=exact", "unknown grader 'exact': use one of gsm8k, math"),
        ("engine.backend=sglang", "engine.backend should be 'vllm' or 'transformers', found 'sglang'"),
        ("train.batch_size=100", "batch_size 100 is not a multiple of mini_batch_size 128"),
        ("run=../elsewhere", "run "),
        ("seed=-1", "seed should be greater than or equal to 0, found -1"),
        ("seed=4294967296", "seed should be less than 4294967296, found 4294967296"),
        ("data.seed=4294967296", "data.seed should be less than 4294967296, found 4294967296"),
        ("data.seed=-1", "data.seed should be greater than or equal to 0, found -1"),
        ("sampling.temperature=inf", "sampling.temperature should be a finite number, found inf"),
        ("sampling.temperature=0.001", "sampling: temperature should be 0 or at least 0.01"),
        ("engine.cpu_kv_cache_gib=inf", "engine.cpu_kv_cache_gib should be a finite number, found inf"),
        ("grader.timeout_seconds=inf", "grader.timeout_seconds should be a finite number, found inf"),
        ("grader.memory_gib=nan", "grader.memory_gib should be a finite number, found nan"),
        ("train.learning_rate=nan", "train.learning_rate should be a finite number, found nan"),
        ("train.weight_decay=inf", "train.weight_decay should be a finite number, found inf"),
        ("train.max_grad_norm=inf", "train.max_grad_norm should be a finite number, found inf"),
        ("train.adam_betas=[0.9, 1.0]", "train.adam_betas.1 should be less than 1, found 1.0"),
        ("train.adam_betas=[nan, 0.9]", "train.adam_betas.0 should be a finite number, found nan"),
        ("train.objective.beta2=inf", "train.objective.beta2 should be a finite number, found inf"),
        ("train.lora.alpha=inf", "train.lora.alpha should be a finite number, found inf"),
        ("train.lora.dropout=nan", "train.lora.dropout should be a finite number, found nan"),
        ("vstar.num_samples=true", "vstar: num_samples should be a number, found True"),
        ("seed=false", "the file: seed should be a number, found False"),
        ("data.limit=true", "data: limit should be a number, found True"),
        ("sampling.temperature=false", "sampling: temperature should be a number, found False"),
        ("grader.workers=true", "grader: workers should be a number, found True"),
        ("train.zero_stage=true", "train: zero_stage should be a number, found True"),
        ("train.adam_betas=[false, 0.9]", "train: adam_betas should be a number, found [False, 0.9]"),
        ("train.objective.group_size=true", "train.objective: group_size should be a number, found True"),
        ("model.path=''", "model: path should not be empty, found ''"),
        ("model.revision=' '", "model: revision should not be empty, found ' '; leave it out"),
        (
            "data.path=''",
            "data: path should not be empty; give a .jsonl, .json, .parquet, .csv file, a folder of them, or a hub",
        ),
        ("data.path=3", "data.path: should be a path or a list of paths, found 3"),
        ("data.path=['x.jsonl', 3]", "data.path: should be a path or a list of paths, found ['x.jsonl', 3]"),
        ("data.path=[]", "data: path should not be empty; give a .jsonl"),
        ("data.split=''", "data: split should not be empty, found ''; leave it out"),
        ("data.template=''", "data: template should not be empty, found ''; leave it out"),
        ("data.prompt_field=''", "data: prompt_field should not be empty, found ''; leave it out"),
        ("data.answer_field=''", "data: answer_field should not be empty, found ''; leave it out"),
        ("data.format=''", "data.format should be 'auto', 'gsm8k', 'math', 'openr1'"),
        ("grader.name=''", "grader: name should not be empty, found ''"),
        ("train.wandb_project=''", "train: wandb_project should not be empty, found ''; leave it out"),
        (
            "train.lora.target_modules=['q_proj', '']",
            "train.lora: target_modules should not be empty, found ['q_proj', '']; leave it out",
        ),
        (
            "vstar.num_samples=10000000000000",
            "vstar.num_samples should be less than or equal to 1000000, found 10000000000000",
        ),
        ("evaluate.num_samples=1000001", "evaluate.num_samples should be less than or equal to 1000000"),
        ("sampling.top_k=-1", "sampling.top_k should be greater than or equal to 0, found -1"),
        ("sampling.min_p=1.5", "sampling.min_p should be less than or equal to 1, found 1.5"),
        ("sampling.stop='\\n'", "sampling.stop should be a valid list, found '\\\\n'"),
        ("sampling.stop=['a', '']", "sampling: stop should not be empty, found ['a', '']; leave it out"),
        (
            f"sampling.stop={['x'] * 17}",
            "sampling.stop should have at most 16 items, found 17",
        ),
        ("data.system_prompt=' '", "data: system_prompt should not be empty, found ' '; leave it out"),
        ("data.prefill=''", "data: prefill should not be empty, found ''; leave it out"),
        ("data.few_shot=[{prompt='x'}]", "data.few_shot.0.completion is missing"),
        (
            "data.few_shot=[{prompt='x', answer='y'}]",
            "unknown key data.few_shot.0.answer; use one of prompt, completion",
        ),
        (
            "data.chat_template_kwargs=1",
            "data.chat_template_kwargs should be a section of keys and values, found 1",
        ),
        (
            "sampling.max_completion_tokens=99999999999999999999999",
            "sampling.max_completion_tokens should be less than or equal to 2147483647, found 999",
        ),
        ("data.limit='2147483648'", "data.limit should be less than or equal to 2147483647, found '2147"),
        ("train.iterations=2147483648", "train.iterations should be less than or equal to 2147483647"),
        ("grader.workers=2147483648", "grader.workers should be less than or equal to 1024"),
        ("grader.timeout_seconds=1e-7", "grader.timeout_seconds should be greater than or equal to 0.1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_was_found(
    minimal: Path, override: str, expected: str
) -> None:
    assert expected in refusal(minimal, override)


@pytest.mark.parametrize("name", ["grpo", "rebel", "ppo", "centred_residual", "pmd_mean", "spo", "qrpo"])
def test_no_number_of_an_objective_may_be_infinite_but_the_clip_that_this_switches_off(
    minimal: Path, name: str
) -> None:
    section = type(load_config(minimal, [f"train.objective.name={name}"]).train.objective)
    for key, field in section.model_fields.items():
        for value in ("inf", "nan") if field.annotation is float else ():
            override = f"train.objective.{key}={value}"
            if (key, value) == ("value_clip", "inf"):
                load_config(minimal, [f"train.objective.name={name}", override])
            else:
                assert f"train.objective.{key} should be" in refusal(
                    minimal, f"train.objective.name={name}", override
                )


UNUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "the split of a file": (
        ("data.split=test",),
        "data: split = 'test' would have no effect: train.jsonl is a local",
    ),
    "the name of a file": (
        ("data.name=main",),
        "data: name = 'main' would have no effect: train.jsonl is a local file",
    ),
    "the split of a held-out file": (
        ("evaluate.data.format=gsm8k", "evaluate.data.path=q.parquet", "evaluate.data.split=test"),
        "evaluate.data: split = 'test' would have no effect: q.parquet is a local file, which is read whole",
    ),
    "a seed without a limit": (
        ("data.seed=3",),
        "data: seed = 3 would have no effect: it chooses the prompts that",
    ),
    "a path of made-up problems": (
        ("data.format=word_problems",),
        "data: path = 'train.jsonl' would have no effect: word_problems are made up",
    ),
    "fields of made-up problems": (
        ("data.format=word_problems", "data.path=''", "data.prompt_field=q", "data.seed=1", "data.limit=8"),
        "data: prompt_field = 'q', seed = 1 would have no effect: word_problems are made up",
    ),
    "an unknown split of made-up problems": (
        ("data.format=word_problems", "data.path=''", "data.split=validation"),
        'word_problems have the splits "train" and "test", found "validation"',
    ),
    "top-p of greedy sampling": (
        ("sampling.temperature=0", "sampling.top_p=0.9"),
        "sampling: top_p = 0.9 would have no effect: temperature 0 takes",
    ),
    "top-k and min-p of greedy sampling": (
        ("sampling.temperature=0", "sampling.top_k=5", "sampling.min_p=0.1"),
        "sampling: top_k = 5, min_p = 0.1 would have no effect: temperature 0 takes",
    ),
    **{
        f"{key} without vLLM": (
            ("engine.backend=transformers", f"engine.{key}={value}"),
            f"engine: {key} = {shown} would have no effect: such settings need backend vllm, found transformers",
        )
        for key, value, shown in (
            ("gpu_memory_utilization", "0.5", "0.5"),
            ("training_gpu_memory_utilization", "0.5", "0.5"),
            ("cpu_kv_cache_gib", "4", "4.0"),
            ("tensor_parallel_size", "2", "2"),
            ("training_tensor_parallel_size", "2", "2"),
            ("sleep_while_training", "true", "True"),
            ("enforce_eager", "true", "True"),
        )
    },
    "samples of no held-out prompts": (
        ("evaluate.num_samples=4", "evaluate.training_prompts=9"),
        "evaluate: num_samples = 4, training_prompts = 9 would have no effect: there are no held-out prompts",
    ),
    "evaluations on no held-out prompts": (
        ("train.evaluate_every=3",),
        "evaluate_every = 3 would have no effect: there are no held-out prompts; add a section [evaluate.data]",
    ),
    "a time that programs never see": (
        ("grader.name=code", "grader.timeout_seconds=3"),
        'grader: timeout_seconds should be above 4, which the grader "code" gives a program itself, found 3',
    ),
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_setting_that_would_have_no_effect_is_refused_with_where_it_belongs(
    minimal: Path, name: str
) -> None:
    overrides, expected = UNUSED[name]
    assert expected in refusal(minimal, *overrides)


def test_settings_that_have_an_effect_and_defaults_that_are_written_out_are_not_refused(
    minimal: Path,
) -> None:
    for overrides in (
        ("data.path=owner/data", "data.name=main", "data.split=test"),
        ("data.limit=8", "data.seed=4294967295"),
        ("data.split=train", "data.seed=0", "evaluate.num_samples=8", "train.evaluate_every=10"),
        ("engine.backend=transformers", "engine.enforce_eager=false", "engine.max_num_seqs=4"),
        ("sampling.temperature=0", "sampling.top_p=1", "sampling.top_k=0", "sampling.min_p=0"),
        ('sampling.stop=["\\n\\n", " "]', 'data.prefill="\\n"'),
        ("evaluate.data.format=word_problems", "evaluate.data.split=test", "evaluate.num_samples=4"),
        ("seed=4294967295", "grader.name=code", "grader.timeout_seconds=5"),
    ):
        load_config(minimal, overrides)


def test_all_problems_are_told_at_once(minimal: Path) -> None:
    message = refusal(minimal, "vstar.num_samples=0", "vstar.beta1=-1", "sampling.topp=1")
    assert all(key in message for key in ("vstar.num_samples", "vstar.beta1", "sampling.topp"))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('run = "test"\n[model]\npath = "m"\n[data]\nformat = "gsm8k"\n')
    assert "grader is missing" in refusal(path)


def tables(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a type holds, itself included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from tables(field.annotation)
    for inner in get_args(kind):
        yield from tables(inner)


def test_what_holds_for_every_table_holds_for_each() -> None:
    found = set(tables(Config))
    assert {"GraderConfig", "HeldOutConfig", "LoraConfig", "GRPO"} < {table.__name__ for table in found}
    assert [table for table in found if not issubclass(table, Section)] == []


def test_a_whole_number_may_be_as_large_as_the_libraries_count(minimal: Path) -> None:
    config = load_config(minimal, ["train.epochs=2147483647", "vstar.num_samples=1000000"])
    assert (config.train.epochs, config.vstar.num_samples) == (2**31 - 1, 1_000_000)


def test_a_byte_order_mark_is_no_part_of_the_config(minimal: Path) -> None:
    minimal.write_text(MINIMAL.lstrip(), encoding="utf-8-sig")
    assert load_config(minimal).run == "test"


def test_a_missing_file_and_invalid_toml_are_named(tmp_path: Path) -> None:
    assert f"cannot read the config {tmp_path / 'none.toml'}: No such file" in refusal(tmp_path / "none.toml")
    assert "Is a directory" in refusal(tmp_path)
    path = tmp_path / "broken.toml"
    path.write_text("run = \n")
    assert f"{path} is not valid TOML: Invalid value (at line 1" in refusal(path)
    for content in (b'run = "\xff"', b"seed = " + b"9" * 5000, b"seed = " + b"[" * 5000):
        path.write_bytes(content)
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


def test_valid_keys_are_listed_once_for_all_unknown_ones(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "demo.toml").read_text(encoding="utf-8")
    (tmp_path / "run.toml").write_text(f"sead = 1\nmodels = 2\n{text}", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_config(tmp_path / "run.toml", ["vstar.betta=1"])
    message = str(raised.value)
    assert "unknown keys sead, models; use one of run, seed, model, data, " in message
    assert "unknown key vstar.betta; use one of num_samples, beta1" in message
    assert message.count("use one of run,") == 1


def test_the_config_in_the_readme_is_valid(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "mine.toml").write_text(block[1], encoding="utf-8")
    assert load_config(tmp_path / "mine.toml").model.path == "Qwen/Qwen2.5-1.5B"
