"""Chat and reasoning models: what is put around a question, what is refused, and both stages with a small one."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from common.config import DataConfig
from common.data.held_out import remarks
from common.data.messages import text_of_turns
from common.data.prompts import load_prompts
from common.data.rendering import PromptRenderer
from common.errors import UserError
from common.provenance import Provenance, sampling_identity
from common.rollout import Prompt
from common.runs import WHOLE
from common.store import SampleStore
from common.terminal.console import Terminal
from common.vstar_file import read_vstar
from stage1_vstar.run import hints, read_prompts
from stage2_train.config import Config
from tests.chat_model import NO_THOUGHTS, TEMPLATE, save_chat_model
from tests.conftest import RunCli
from tests.fakes import change_json, tiny_config
from tests.stage2_runs import as_toml
from tests.stage2_runs import tiny_config as stage2_config

SHOTS = [
    {"prompt": "1 + 1?", "completion": "1 and 1 #### 2"},
    {"prompt": "2 + 2?", "completion": "2 and 2 #### 4"},
]
FRAMING: dict[str, Any] = {
    "system_prompt": "You add.",
    "instruction": "Answer after ####.",
    "few_shot": SHOTS,
    "prefill": "<think>\n",
}
ASKED = "<|im_start|>user\n{}\nAnswer after ####.<|im_end|>\n"
ANSWERED = "<|im_start|>assistant\n{}<|im_end|>\n"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_chat_model(folder)
    return folder


def data_of(model: Path, **data: Any) -> DataConfig:
    return tiny_config(model, Path("none.jsonl"), data={"template": "chat", **data}).data


def shown(model: Path, question: str = "3 + 3?", **data: Any) -> str:
    return PromptRenderer(model, data_of(model, **data)).in_template(question)


def refusal(model: Path, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        PromptRenderer(model, data_of(model, **data))
    return str(caught.value)


def with_template(model: Path, folder: Path, template: str) -> Path:
    """The model's tokenizer with another chat template."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_everything_that_is_put_around_a_question_under_a_chat_template(chat_model: Path) -> None:
    assert shown(chat_model, **FRAMING) == (
        "<|im_start|>system\nYou add.<|im_end|>\n"
        + ASKED.format("1 + 1?")
        + ANSWERED.format("1 and 1 #### 2")
        + ASKED.format("2 + 2?")
        + ANSWERED.format("2 and 2 #### 4")
        + ASKED.format("3 + 3?")
        + "<|im_start|>assistant\n<think>\n"
    )


def test_everything_that_is_put_around_a_question_under_a_text_template(chat_model: Path) -> None:
    framing = {key: value for key, value in FRAMING.items() if key != "system_prompt"}
    assert shown(chat_model, template="Q: {prompt}\nA: ", **framing) == (
        "Q: 1 + 1?\nAnswer after ####.\nA: 1 and 1 #### 2\n\n"
        "Q: 2 + 2?\nAnswer after ####.\nA: 2 and 2 #### 4\n\n"
        "Q: 3 + 3?\nAnswer after ####.\nA: <think>\n"
    )


def test_a_rows_own_messages_keep_their_system_prompt_and_their_order(chat_model: Path) -> None:
    turns = [
        {"role": "user", "content": "4 + 4?"},
        {"role": "assistant", "content": "8"},
        {"role": "user", "content": "and 1?"},
    ]
    own = [{"role": "system", "content": "You count."}, *turns]
    rest = (
        ASKED.format("1 + 1?")
        + ANSWERED.format("2")
        + "<|im_start|>user\n4 + 4?<|im_end|>\n"
        + ANSWERED.format("8")
        + ASKED.format("and 1?")
        + "<|im_start|>assistant\n"
    )
    framing: dict[str, Any] = {
        **FRAMING,
        "few_shot": [{"prompt": "1 + 1?", "completion": "2"}],
        "prefill": None,
    }
    assert shown(chat_model, text_of_turns(own), **framing) == (
        f"<|im_start|>system\nYou count.<|im_end|>\n{rest}"
    )
    assert shown(chat_model, text_of_turns(turns), **framing) == (
        f"<|im_start|>system\nYou add.<|im_end|>\n{rest}"
    )


def test_the_chat_template_is_told_whether_the_model_thinks(chat_model: Path) -> None:
    for told, end in ((None, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, NO_THOUGHTS)):
        assert shown(chat_model, chat_template_kwargs=told).endswith(f"<|im_start|>assistant\n{end}")


def test_a_prompt_keeps_its_text_and_its_tokens_are_those_of_all_of_it(
    chat_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "3 + 3?", "answer": "6"}))
    config = tiny_config(chat_model, path, data={"template": "chat", "max_prompt_tokens": 200, **FRAMING})

    def prompts(of: Config) -> list[Prompt]:
        return load_prompts(of.data, of, PromptRenderer(chat_model, of.data))

    (prompt,) = prompts(config)
    (plain,) = prompts(tiny_config(chat_model, path))
    assert (prompt.text, prompt.id) == ("3 + 3?", plain.id)
    tokenizer = PromptRenderer(chat_model, config.data).tokenizer
    assert tokenizer.decode(list(prompt.token_ids)) == shown(chat_model, **FRAMING)
    specials = [tokenizer.added_tokens_encoder[name] for name in ("<|im_start|>", "<think>")]
    assert prompt.token_ids[0] == specials[0]
    assert specials[1] in prompt.token_ids[-3:]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"template": "gsm8k", "system_prompt": "x"},
            'data.system_prompt needs data.template = "chat", found "gsm8k": put the text into the template',
        ),
        (
            {"template": "plain", "chat_template_kwargs": {"enable_thinking": False}},
            'data.chat_template_kwargs needs data.template = "chat", found "plain": only a chat template reads it',
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "thinking_budget": 3}},
            "data.chat_template_kwargs.thinking_budget would have no effect: the chat template ",
        ),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "data.chat_template_kwargs sets add_generation_prompt, which is set already; leave it out",
        ),
        (
            {"chat_template_kwargs": {"strftime_now": 1, "messages": []}},
            "sets strftime_now, messages, which is",
        ),
    ],
)
def test_what_the_template_does_not_read_is_refused(
    chat_model: Path, data: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(chat_model, **data)


@pytest.mark.parametrize(
    ("template", "data", "expected"),
    [
        (
            "{{ messages[-1].content }}",
            {"system_prompt": "x"},
            "data.system_prompt would have no effect: the chat template {file} does not read it; leave it out",
        ),
        ("{{ messages[-1].content }}", {"few_shot": SHOTS}, "data.few_shot would have no effect"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{{ messages[-1].content }}",
            {"system_prompt": "x"},
            "{file}: the chat template cannot render a question (TemplateError: no system role)",
        ),
    ],
)
def test_a_chat_template_that_does_not_show_what_is_set_is_named(
    chat_model: Path, tmp_path: Path, template: str, data: dict[str, Any], expected: str
) -> None:
    folder = with_template(chat_model, tmp_path / "model", template)
    assert expected.format(file=folder / "chat_template.jinja") in refusal(folder, **data)


def test_what_is_needed_or_may_make_a_difference_is_no_error(chat_model: Path, tmp_path: Path) -> None:
    needed = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"
    assert shown(with_template(chat_model, tmp_path / "a", needed), system_prompt="x") == "3 + 3?"
    rare = "{% if date is defined and false %}{{ date }}{% endif %}" + TEMPLATE
    shown(with_template(chat_model, tmp_path / "b", rare), chat_template_kwargs={"date": "today"})


def test_what_is_set_is_in_the_identity_and_an_old_identity_is_as_it_was(chat_model: Path) -> None:
    def identity(sampling: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
        config = tiny_config(
            chat_model, Path("none.jsonl"), data={"template": "chat", **data}, sampling=sampling or {}
        )
        return sampling_identity(config, PromptRenderer(chat_model, config.data), {}, "gsm8k/1")

    old = identity()
    assert old["prompt"].keys() == {"template", "eos_token_ids"}
    assert old["sampling"].keys() == {"temperature", "top_p", "max_completion_tokens"}
    assert identity(few_shot=[], chat_template_kwargs={}, sampling={"stop": [], "top_k": 0}) == old
    everything = {**FRAMING, "chat_template_kwargs": {"enable_thinking": False}}
    new = identity(**everything, sampling={"stop": ["\n\n"], "top_k": 20, "min_p": 0.1})
    assert json.loads(json.dumps(new)) == new
    assert new["prompt"].keys() - old["prompt"].keys() == everything.keys()
    assert new["sampling"].keys() - old["sampling"].keys() == {"stop", "top_k", "min_p"}
    ours, theirs = (Provenance(identity=each, context={}) for each in (old, new))
    with pytest.raises(UserError) as caught:
        ours.refuse_unless_same(theirs, what="it", advice="redo it")
    for key in (
        *(f"prompt.{key}" for key in everything),
        "sampling.stop",
        "sampling.top_k",
        "sampling.min_p",
    ):
        assert f"{key} is " in str(caught.value)
        assert f"--allow-mismatch {key}" in str(caught.value)
        assert key in set(ours.fields())


def test_held_out_prompts_are_shown_as_those_for_training_unless_told(
    chat_model: Path, tmp_path: Path
) -> None:
    def held_out(**own: Any) -> DataConfig:
        config = stage2_config(
            tmp_path,
            chat_model,
            data={"template": "chat", **FRAMING, "chat_template_kwargs": {"enable_thinking": False}},
            evaluate={"data": {"format": "generic", "path": str(tmp_path / "test.jsonl"), **own}},
        )
        lines.extend(remarks(config, [], []))
        assert config.held_out is not None
        return config.held_out

    lines: list[str] = []
    inherited = held_out()
    assert {key: getattr(inherited, key) for key in ("system_prompt", "instruction", "prefill")} == {
        key: FRAMING[key] for key in ("system_prompt", "instruction", "prefill")
    }
    assert inherited.few_shot is not None
    assert [shot.model_dump() for shot in inherited.few_shot] == SHOTS
    assert inherited.chat_template_kwargs == {"enable_thinking": False}
    assert not lines
    own = held_out(instruction="Be brief.", few_shot=[], chat_template_kwargs={"enable_thinking": True})
    assert (own.instruction, own.few_shot, own.chat_template_kwargs) == (
        "Be brief.",
        [],
        {"enable_thinking": True},
    )
    assert own.system_prompt == "You add."
    (line,) = lines
    assert line.startswith(
        "held-out prompts are shown with another chat_template_kwargs, few_shot, instruction than"
    )
    text = held_out(template="plain")
    assert (text.system_prompt, text.chat_template_kwargs, text.instruction) == (
        None,
        None,
        FRAMING["instruction"],
    )
    assert "asked in another template" in lines[-1]


def test_an_instruct_model_without_its_template_gets_a_hint_and_a_base_model_none(
    chat_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def hint(model: Path, template: str) -> str | None:
        return PromptRenderer(model, data_of(model, template=template)).hint()

    line = hint(chat_model, "gsm8k")
    assert line is not None
    assert line.startswith("hint: this is an instruct model")
    assert "end with <|im_end|>," in line
    assert 'set data.template = "chat"' in line
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "3 + 3?", "answer": "6"}))
    printed = io.StringIO()
    config = tiny_config(chat_model, path, data={"template": "gsm8k"})
    read_prompts(config, chat_model, WHOLE, Terminal(file=printed, width=300))
    assert line in printed.getvalue().splitlines()
    assert hint(chat_model, "chat") is None
    assert hint(chat_model, "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n") is None
    assert hint(tiny_model, "gsm8k") is None
    base = with_template(chat_model, tmp_path / "base", TEMPLATE)
    change_json(base / "tokenizer_config.json", eos_token="<|endoftext|>")
    change_json(base / "generation_config.json", eos_token_id=0)
    assert hint(base, "gsm8k") is None
    broken = with_template(chat_model, tmp_path / "broken", "{{ raise_exception('no') }}")
    assert hint(broken, "gsm8k") is None


@pytest.mark.parametrize("thinks", [True, False])
def test_a_chat_model_goes_through_both_stages_and_is_evaluated(
    chat_model: Path, artifacts: Path, run_cli: RunCli, tmp_path: Path, thinks: bool
) -> None:
    config = stage2_config(
        tmp_path,
        chat_model,
        data={
            "template": "chat",
            "max_prompt_tokens": 200,
            "system_prompt": "You add.",
            "instruction": "Answer after ####.",
            "few_shot": SHOTS[:1],
            "chat_template_kwargs": {"enable_thinking": thinks},
            **({"prefill": "<think>\n"} if thinks else {}),
        },
        sampling={"max_completion_tokens": 6, "stop": ["7", "\n\n"]},
        engine={"backend": "vllm" if thinks else "transformers"},
        train={"iterations": 1, "evaluate_every": 1},
        evaluate={
            "num_samples": 2,
            "data": {"format": "generic", "path": str(tmp_path / "test.jsonl"), "max_prompt_tokens": 200},
        },
    )
    file = tmp_path / "run.toml"
    file.write_text(as_toml(config))
    finished = run_cli("vstar", "--config", file, warm=True)
    assert finished.returncode == 0, finished.stderr
    (line,) = (line for line in finished.stdout.splitlines() if line.startswith("first prompt: "))
    assert "system\\nYou add." in line
    assert line.endswith("assistant\\n<think>\\n'" if thinks else "</think>\\n\\n'")
    assert ("hint: the chat template lets the model think" in finished.stdout) is thinks
    assert "hint: this is an instruct model" not in finished.stdout

    table, provenance = read_vstar(artifacts / "tiny" / "vstar.parquet")
    assert table["prompt"].str.starts_with("Tom has").all()
    assert ["enable_thinking", thinks] in provenance.identity["prompt"]["chat_template_kwargs"]
    assert provenance.identity["sampling"]["stop"] == ["7", "\n\n"]
    samples = SampleStore(artifacts / "tiny" / "samples", provenance).read()
    assert not samples["completion"].str.contains("7", literal=True).any()
    assert "correct" in set(samples["outcome"])

    inspected = run_cli("inspect", "--run", "tiny").stdout
    assert "system prompt" in inspected
    assert f"[['enable_thinking', {thinks}]]" in inspected

    other = ("--set", f"data.chat_template_kwargs={{ enable_thinking = {str(not thinks).lower()} }}")
    refused = run_cli("train", "--config", file, *other, warm=True)
    assert refused.returncode == 2
    assert "prompt.chat_template_kwargs is " in refused.stderr
    trained = run_cli("train", "--config", file, warm=True)
    assert trained.returncode == 0, trained.stderr
    metrics = (artifacts / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["engine/logprob_gap"] < 1e-4
    cut = [] if thinks else ["--set", "sampling.top_k=20"]
    evaluated = run_cli("evaluate", "--config", file, *cut, warm=True)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "pass@1, avg@2" in evaluated.stdout
    said = (
        "and a forward pass by transformers of"
        if thinks
        else "KL is of the whole models, without sampling.top_k"
    )
    assert said in evaluated.stderr


def test_a_model_that_thinks_gets_a_hint_until_its_thinking_is_left_out_of_the_grading(
    chat_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "3 + 3?", "answer": "6"}))

    def lines(grader: dict[str, Any] | None = None, **data: Any) -> list[str]:
        config = tiny_config(chat_model, path, data={"template": "chat", **data}, grader=grader or {})
        return hints(config, PromptRenderer(chat_model, config.data))

    (line,) = lines()
    assert 'set grader.answer_after = "</think>" to grade only the text after it' in line
    assert lines({"answer_after": "</think>"}) == []
    assert lines(chat_template_kwargs={"enable_thinking": False}) == []
    assert lines(prefill="<think>\n") != []
    assert lines({"name": "package.rewards:reward"}) == []
