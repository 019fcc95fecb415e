"""From a data set to what the model reads: the same text, ids and tokens every time, or a row named in an error."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import mistral_common
import polars as pl
import pytest
from tokenizers import AddedToken, Regex, normalizers, processors
from transformers import PreTrainedTokenizerFast

from common.config import DataConfig
from common.data import rendering
from common.data.prompts import check_fit, load_prompts, longest_allowed_prompt, prompt_id, usable_prompts
from common.data.rendering import BATCH, TEMPLATES, PromptRenderer
from common.demo.base_model import build_tokenizer
from common.errors import UserError
from common.grading import GraderPool
from common.provenance import sampling_identity
from common.rollout import Prompt
from stage2_train.config import Config
from tests.fakes import change_json, tiny_config

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(20)]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", ROWS)


def load(config: Config) -> list[Prompt]:
    return load_prompts(config.data, config, PromptRenderer(Path(config.model.path), config.data))


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        load(config)
    return str(caught.value)


def model_with(tiny_model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the model's folder without weights, whose tokenizer has these attributes; `bos` makes it add one."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    tokenizer = build_tokenizer()
    if token := changes.pop("bos", None):
        tokenizer.add_special_tokens({"bos_token": token})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, tokenizer.bos_token_id)]
        )
        tokenizer.split_special_tokens = False
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_prompts_id_is_a_hash_of_its_content_and_stays_what_it_is() -> None:
    assert prompt_id("What is 2 + 2?", "4") == "7196e5f92aa9a022c594a671"
    assert prompt_id("é", "½") == "aa558409a4f8f9ef4bcb1102"
    assert prompt_id("ab", "c") != prompt_id("a", "bc")


def test_the_papers_templates_are_exact() -> None:
    assert (
        TEMPLATES["gsm8k"] == '{prompt} Let\'s think step by step and output the final answer after "####".'
    )
    assert (
        TEMPLATES["math"] == "{prompt} Let's think step by step and output the final answer within \\boxed{}."
    )
    assert TEMPLATES["openr1"] == "<｜begin▁of▁sentence｜><｜User｜>{prompt}<｜Assistant｜><think>\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("gsm8k", '2 {braces}? Let\'s think step by step and output the final answer after "####".'),
        ("math", "2 {braces}? Let's think step by step and output the final answer within \\boxed{}."),
        ("plain", "2 {braces}?"),
        ("line", "2 {braces}?\n"),
        ("Q: {prompt}\nA: {\\LaTeX}", "Q: 2 {braces}?\nA: {\\LaTeX}"),
    ],
)
def test_a_question_is_rendered_in_its_template_and_nothing_is_added(
    tiny_model: Path, data_file: Path, template: str, expected: str
) -> None:
    config = tiny_config(tiny_model, data_file, data={"template": template})
    renderer = PromptRenderer(tiny_model, config.data)
    assert renderer.decode(renderer.render("2 {braces}?")) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("gsm8k", "gsm8k"), ("math", "math"), ("openr1", "openr1"), ("generic", "plain")]
)
def test_each_format_has_its_own_template_unless_told(
    tiny_model: Path, data_file: Path, name: str, expected: str
) -> None:
    config = tiny_config(tiny_model, data_file, data={"format": name, "template": None})
    assert PromptRenderer(tiny_model, config.data).template == TEMPLATES[expected]


def test_a_template_without_a_place_for_the_prompt_is_refused(tiny_model: Path, data_file: Path) -> None:
    config = tiny_config(tiny_model, data_file, data={"template": "gsm9k"})
    assert 'data.template is "gsm9k": use one of plain, line, gsm8k' in refusal(config)


def test_the_tokenizers_bos_comes_first_and_comes_once(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "bos", bos="<s>")
    plain = PromptRenderer(folder, tiny_config(folder, data_file).data)
    written = PromptRenderer(folder, tiny_config(folder, data_file, data={"template": "<s>{prompt}\n"}).data)
    without = PromptRenderer(tiny_model, tiny_config(tiny_model, data_file).data)
    bos = plain.tokenizer.bos_token_id
    assert plain.render("How many?") == (bos, *without.render("How many?"))
    assert written.render("How many?") == plain.render("How many?")


def test_the_chat_template_is_the_tokenizers_own(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    folder = model_with(tiny_model, tmp_path / "chat", chat_template=template)
    renderer = PromptRenderer(folder, tiny_config(folder, data_file, data={"template": "chat"}).data)
    assert renderer.decode(renderer.render("How many?")) == "[user] How many?\n[assistant] "
    assert renderer.identity()["template"] == template


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}", "cannot render a question (TemplateSyntaxError:"),
        (
            "{{ raise_exception('System role is needed') }}",
            "cannot render a question (TemplateError: System role is",
        ),
        ("{{ messages[0]['content'][0]['text'] }}", 'renders every question to the same text, ""'),
        ("{{ messages[1].content }}", "cannot render a question (UndefinedError:"),
        ("{{ messages[0]['content'] // 2 }}", "cannot render a question (TypeError:"),
        ("{% if false %}{{ messages }}{% endif %}", 'renders every question to the same text, ""'),
        ("[user] hello", 'renders every question to the same text, "[user] hello"'),
        (
            "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}\n",
            "renders every question to the same text",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_named_with_its_file(
    tiny_model: Path, data_file: Path, tmp_path: Path, template: str, expected: str
) -> None:
    folder = model_with(tiny_model, tmp_path / "chat", chat_template=template)
    message = refusal(tiny_config(folder, data_file, data={"template": "chat"}))
    assert message.startswith(f"{folder / 'chat_template.jinja'}: the chat template {expected}")
    assert message.endswith('correct it, or set data.template to a text containing "{prompt}"')
    assert "\n" not in message


def test_a_chat_template_that_one_question_breaks_is_named_too(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    template = (
        "{% if '7' in messages[0].content %}{{ raise_exception('no 7') }}{% endif %}{{ messages[0].content }}"
    )
    folder = model_with(tiny_model, tmp_path / "chat", chat_template=template)
    message = refusal(tiny_config(folder, data_file, data={"template": "chat"}))
    assert "the chat template cannot render a question (TemplateError: no 7)" in message


def test_a_question_that_the_tokenizer_makes_nothing_of_is_refused(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "deaf")
    config = tiny_config(folder, data_file, data={"template": "plain"})
    renderer = PromptRenderer(folder, config.data)
    renderer.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[a-z]"), "")
    assert renderer.render("1?")
    with pytest.raises(UserError, match=r'the tokenizer makes no token of "one"; correct data\.template'):
        renderer.render("one")


def test_the_tokens_of_an_answer_format_stay_in_the_text_and_those_that_end_it_do_not(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "model", bos="<s>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 600]}))
    plain = PromptRenderer(folder, tiny_config(folder, data_file).data)
    words = ("<answer>", "</answer>", "<|begin_of_solution|>", "<|im_end|>")
    tokenizer = plain.tokenizer
    tokenizer.add_tokens([AddedToken(word, special=True) for word in words])
    ids = {word: tokenizer.added_tokens_encoder[word] for word in words}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids["<|im_end|>"]]}))
    tokenizer.save_pretrained(folder)
    taught = PromptRenderer(folder, tiny_config(folder, data_file).data)
    body = tokenizer.encode("7 + 5", add_special_tokens=False)
    control = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, ids["<|im_end|>"])
    written = [
        control[0],
        ids["<|begin_of_solution|>"],
        *body,
        ids["<answer>"],
        *body,
        ids["</answer>"],
        *control,
    ]
    assert taught.decode(written) == "<|begin_of_solution|>7 + 5<answer>7 + 5</answer>"
    assert plain.decode([*control[:3], *body, *control[:3]]) == "7 + 5"


def test_an_end_token_that_is_a_word_stays_in_the_text(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "model")
    word = PromptRenderer(folder, tiny_config(folder, data_file).data).tokenizer.encode("}")[-1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, word]}))
    renderer = PromptRenderer(folder, tiny_config(folder, data_file).data)
    assert word in renderer.eos_token_ids
    assert renderer.decode([*renderer.tokenizer.encode("{7"), word, 0]) == "{7}"


def test_text_without_added_tokens_is_what_the_tokenizer_gives_without_special_ones(
    tiny_model: Path, data_file: Path
) -> None:
    renderer = PromptRenderer(tiny_model, tiny_config(tiny_model, data_file).data)
    random = Random(0)
    for _ in range(200):
        ids = [random.randrange(len(renderer.tokenizer)) for _ in range(random.randrange(40))]
        assert renderer.decode(ids) == renderer.tokenizer.decode(ids, skip_special_tokens=True)


def test_chat_without_a_chat_template_is_refused(tiny_model: Path, data_file: Path) -> None:
    assert "has no chat template; set data.template" in refusal(
        tiny_config(tiny_model, data_file, data={"template": "chat"})
    )


def test_a_completion_may_end_in_the_tokenizers_eos_or_the_generation_configs(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "model")
    eos = PromptRenderer(folder, tiny_config(folder, data_file).data).tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, eos]}))
    assert PromptRenderer(folder, tiny_config(folder, data_file).data).eos_token_ids == tuple(
        sorted({eos, 7})
    )
    (folder / "generation_config.json").write_text("{}")
    assert PromptRenderer(folder, tiny_config(folder, data_file).data).eos_token_ids == (eos,)


def test_a_tokenizer_that_is_missing_damaged_or_has_no_eos_is_named(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = model_with(tiny_model, tmp_path / "model", eos_token=None)
    (folder / "generation_config.json").unlink()
    assert load(tiny_config(folder, data_file))  # config.json names one
    change_json(folder / "config.json", eos_token_id=None)
    assert "config.json names an EOS token, so no completion could end" in refusal(
        tiny_config(folder, data_file)
    )
    (folder / "tokenizer.json").write_text('{"model": {}}')
    assert f"{folder} has no usable tokenizer" in refusal(tiny_config(folder, data_file))
    (folder / "generation_config.json").write_text("{")
    shutil.copy(tiny_model / "tokenizer.json", folder)
    assert f"cannot read {folder}/generation_config.json" in refusal(tiny_config(folder, data_file))


def test_a_chat_template_that_writes_the_date_makes_the_same_prompt_every_day(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    template = "{{ strftime_now('%d %b %Y %f') }} {{ messages[0].content }}"
    folder = model_with(tiny_model, tmp_path / "model", chat_template=template)
    config = tiny_config(folder, data_file, data={"template": "chat"})
    renderer = PromptRenderer(folder, config.data)
    assert renderer.decode(renderer.render("How far?")) == "26 Jul 2024 000000 How far?"


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_tokenizer_that_is_a_pointer_or_missing_is_said_to_be(
    tiny_model: Path, data_file: Path, tmp_path: Path, is_missing: bool
) -> None:
    folder = model_with(tiny_model, tmp_path / "model")
    if is_missing:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    else:
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    expected = "has no tokenizer" if is_missing else "tokenizer.json is a Git LFS pointer"
    assert expected in refusal(tiny_config(folder, data_file))


def test_mistrals_own_tokenizer_is_not_taken_where_there_is_another_and_refused_where_there_is_none(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    """Transformers prefers it, and it has neither a chat template nor a place in an export."""
    folder = model_with(tiny_model, tmp_path / "model")
    change_json(folder / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    expected = [prompt.token_ids for prompt in load(tiny_config(folder, data_file))]
    own = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    shutil.copy(own, folder / "tekken.json")
    assert [prompt.token_ids for prompt in load(tiny_config(folder, data_file))] == expected
    (folder / "tokenizer.json").unlink()
    assert "a tokenizer in Mistral's own format alone, tekken.json" in refusal(tiny_config(folder, data_file))


def test_what_the_rendering_depends_on_is_in_its_identity(tiny_model: Path, data_file: Path) -> None:
    config = tiny_config(tiny_model, data_file, sampling={"temperature": 0.7})
    identity = sampling_identity(config, PromptRenderer(tiny_model, config.data), {"weights": "w"}, "gsm8k/1")
    assert identity == {
        "model": {"weights": "w"},
        "prompt": {"template": "{prompt}\n", "eos_token_ids": [0]},
        "sampling": {"temperature": 0.7, "top_p": 1.0, "max_completion_tokens": 12},
        "grader": "gsm8k/1",
    }


def test_json_jsonl_and_parquet_give_the_same_prompts(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    pl.DataFrame(ROWS).write_parquet(tmp_path / "data.parquet")
    (tmp_path / "gaps.jsonl").write_text("\n" + data_file.read_text().replace("\n", "\n\n"))
    files = [data_file, *(tmp_path / name for name in ("data.json", "data.parquet", "gaps.jsonl"))]
    first, *others = [load(tiny_config(tiny_model, file)) for file in files]
    assert [(prompt.text, prompt.answer) for prompt in first] == [
        (row["prompt"], row["answer"]) for row in ROWS
    ]
    assert others == [first] * 3


def test_any_field_can_be_the_prompt_and_the_answer(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"q": "How many?", "gold": 12, "prompt": "no"}])
    config = tiny_config(tiny_model, path, data={"prompt_field": "q", "answer_field": "gold"})
    assert [(prompt.text, prompt.answer) for prompt in load(config)] == [("How many?", "12")]


def test_a_limit_draws_the_same_rows_for_the_same_seed_in_file_order(
    tiny_model: Path, data_file: Path
) -> None:
    def texts(**data: Any) -> list[str]:
        return [prompt.text for prompt in load(tiny_config(tiny_model, data_file, data=data))]

    everything = texts()
    five = texts(limit=5, seed=3)
    assert len(five) == 5
    assert texts(limit=5, seed=3) == five
    assert texts(limit=5, seed=4) != five
    assert [text for text in everything if text in five] == five
    assert texts(limit=20) == texts(limit=1000) == everything


def test_a_question_that_comes_twice_is_one_prompt_and_another_answer_makes_another(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS, *ROWS[:7], {**ROWS[0], "answer": "99"}])
    prompts = load(tiny_config(tiny_model, path))
    assert len(prompts) == 21
    assert len({prompt.id for prompt in prompts}) == 21


def test_a_long_prompt_is_refused_or_dropped(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS[:3], {"prompt": "many " * 100, "answer": "1"}])
    message = refusal(tiny_config(tiny_model, path))
    assert "tokens, more than data.max_prompt_tokens = 64" in message
    assert 'raise the limit or set data.long_prompts = "drop"' in message
    assert len(load(tiny_config(tiny_model, path, data={"long_prompts": "drop"}))) == 3
    nothing_left = {"long_prompts": "drop", "max_prompt_tokens": 1}
    assert "no prompt of" in refusal(tiny_config(tiny_model, path, data=nothing_left))


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_batches_give_the_token_ids_that_the_tokenizer_gives_one_question(
    tiny_model: Path, data_file: Path, tmp_path: Path, is_plain: bool, splits: bool
) -> None:
    """Whatever the tokenizer's file says of truncation, and whether `<s>` in a question is a token or text."""
    folder = model_with(tiny_model, tmp_path / "model", bos="<s>", split_special_tokens=splits)
    renderer = PromptRenderer(folder, tiny_config(folder, data_file).data)
    renderer.tokenizer.backend_tokenizer.enable_truncation(4)
    renderer.tokenizer.backend_tokenizer.enable_padding(length=50)
    renderer._is_plain = is_plain
    texts = [
        f"Tom has {number} pens and <s> buys {'more ' * (number % 7)}" for number in range(2 * BATCH + 3)
    ]
    found = [tuple(ids or ()) for ids in renderer.render_all(texts)]
    assert found == [
        (
            renderer.tokenizer.bos_token_id,
            *renderer.tokenizer(f"{text}\n", add_special_tokens=False).input_ids,
        )
        for text in texts
    ]
    assert max(map(len, found)) > len(found[0]) > 5
    assert [renderer.render(text) for text in texts[:9]] == found[:9]


def test_a_tokenizer_with_calls_of_its_own_is_called(
    tiny_model: Path, data_file: Path, tmp_path: Path
) -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, *arguments: Any, **options: Any) -> Any:
            return super()._encode_plus(*arguments, **options)

    tokenizer = PromptRenderer(tiny_model, tiny_config(tiny_model, data_file).data).tokenizer
    assert rendering._is_plain(tokenizer)
    own = Own(tokenizer_object=tokenizer.backend_tokenizer)  # type: ignore[no-untyped-call]
    assert not rendering._is_plain(own)


@pytest.mark.parametrize("text", ["many " * 800_000, " " * 4_000_000 + "x", "9" * 4_000_000, "é" * 4_000_000])
def test_a_prompt_of_megabytes_is_told_by_its_beginning(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    tokenised: list[int] = []
    token_ids = PromptRenderer.token_ids

    def counted(renderer: PromptRenderer, texts: list[str]) -> Any:
        tokenised.extend(map(len, texts))
        return token_ids(renderer, texts)

    monkeypatch.setattr(PromptRenderer, "token_ids", counted)
    path = write_jsonl(tmp_path / "data.jsonl", [*ROWS[:3], {"prompt": text, "answer": "1"}, *ROWS[3:]])
    message = refusal(tiny_config(tiny_model, path))
    assert "a prompt has far more tokens, more than data.max_prompt_tokens = 64" in message
    dropping = tiny_config(tiny_model, path, data={"long_prompts": "drop"})
    assert [prompt.text for prompt in load(dropping)] == [row["prompt"] for row in ROWS]
    assert sum(tokenised) < 600_000


@pytest.mark.parametrize("length", [500, 5_000])
def test_a_long_text_of_few_tokens_is_a_prompt(
    tiny_model: Path, data_file: Path, tmp_path: Path, length: int
) -> None:
    """A beginning that ends inside of a long token has many tokens there, of one character each."""
    folder = model_with(tiny_model, tmp_path / "model")
    renderer = PromptRenderer(folder, tiny_config(folder, data_file, data={"template": "plain"}).data)
    renderer.tokenizer.add_tokens(["z" * length])
    (ids,) = renderer.render_all(["z" * 20_000], limit=2)
    assert ids is not None
    assert len(ids) == 20_000 / length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"prompt": "x"', "cannot read"),
        ("[1, 2]\n", "line 1 is a list, not an object with a prompt and an answer"),
        (
            '{"question": "x", "answer": "1"}\n',
            "has no field prompt, it has question, answer; set data.prompt_field",
        ),
        (
            '{"prompt": "x"}\n',
            "has no field answer, it has prompt; set data.prompt_field and data.answer_field",
        ),
        ('{"prompt": "x", "answer": "1"}\n{"prompt": "y"}\n', "row 2: answer is missing"),
        ('{"prompt": "x", "answer": "1"}\n{"prompt": null, "answer": "1"}\n', "row 2: prompt is missing"),
        ('{"prompt": ["x"], "answer": "1"}\n', "row 1: prompt is a list, not a text"),
        ('{"prompt": " ", "answer": "1"}\n', "row 1: prompt is empty"),
        ('{"prompt": "x \\ud83d", "answer": "1"}\n', "row 1: prompt holds half of a UTF-16 pair"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_its_place(
    tiny_model: Path, tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    message = refusal(tiny_config(tiny_model, path))
    assert expected in message
    assert str(path) in message


def test_a_file_that_is_missing_or_no_parquet_is_named(tiny_model: Path, tmp_path: Path) -> None:
    assert "there is no data file" in refusal(tiny_config(tiny_model, tmp_path / "none.jsonl"))
    (tmp_path / "data.parquet").write_text("no parquet")
    assert "cannot read" in refusal(tiny_config(tiny_model, tmp_path / "data.parquet"))
    unnamed = tiny_config(tiny_model, tmp_path).model_copy(update={"data": DataConfig(format="generic")})
    assert "data.path is missing" in refusal(unnamed)


def test_the_reference_answer_is_read_out_of_a_worked_solution(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "How many?", "answer": "1+1=2\n#### 2,000"}])
    assert load(tiny_config(tiny_model, path, data={"format": "gsm8k"}))[0].answer == "2,000"
    path = write_jsonl(tmp_path / "math.jsonl", [{"problem": "x?", "solution": r"so \boxed{\frac{1}{2}}."}])
    config = tiny_config(tiny_model, path, data={"format": "math"}, grader={"name": "math"})
    assert load(config)[0].answer == r"\frac{1}{2}"


def test_a_solution_without_an_answer_is_refused_with_its_row_or_dropped(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"problem": f"{number}?", "solution": rf"\boxed{{{number}}}"} for number in range(6)]
    rows[2]["solution"], rows[4]["solution"] = r"\boxed{}", r"\boxed{1} or \boxed{2}"
    path = write_jsonl(tmp_path / "math.jsonl", rows)
    sections: dict[str, Any] = {"data": {"format": "math"}, "grader": {"name": "math"}}
    message = refusal(tiny_config(tiny_model, path, **sections))
    assert "2 of 6 reference answers" in message
    assert "row 3: an empty or unclosed" in message
    assert "row 5: several different boxes" in message
    assert 'set data.bad_golds = "drop"' in message
    sections["data"]["bad_golds"] = "drop"
    assert [prompt.answer for prompt in load(tiny_config(tiny_model, path, **sections))] == [
        "0",
        "1",
        "3",
        "5",
    ]
    # A limited run names the row of the file, not that of its selection.
    sections["data"] = {"format": "math", "limit": 5, "seed": 1}
    assert "row 5: several different boxes" in refusal(tiny_config(tiny_model, path, **sections))


def test_answers_that_the_grader_cannot_read_are_refused_or_dropped_before_generation(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [*ROWS[:4], {"prompt": "How far?", "answer": "far"}, {"prompt": "How near?", "answer": ""}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    config = tiny_config(tiny_model, path)
    prompts = load(config)
    with GraderPool(config.grader) as pool:
        with pytest.raises(UserError) as caught:
            usable_prompts(prompts, config.data, pool)
        dropping = tiny_config(tiny_model, path, data={"bad_golds": "drop"})
        assert usable_prompts(prompts, dropping.data, pool) == prompts[:4]
        assert usable_prompts(prompts[:4], config.data, pool) == prompts[:4]
    message = str(caught.value)
    assert "2 of 6 reference answers" in message
    assert "\"How far?\": not a number: 'far'" in message
    assert 'set data.bad_golds = "drop"' in message


def test_the_context_has_room_for_the_longest_prompt_and_a_completion(
    tiny_model: Path, data_file: Path
) -> None:
    prompts = load(tiny_config(tiny_model, data_file))
    longest = max(len(prompt.token_ids) for prompt in prompts)

    def check(completion: int) -> None:
        config = tiny_config(tiny_model, data_file, sampling={"max_completion_tokens": completion})
        check_fit(prompts, config, tiny_model)

    check(512 - longest)
    with pytest.raises(UserError, match="need 513 tokens, more than the model's context of 512; lower"):
        check(513 - longest)


def test_the_engine_makes_room_for_held_out_prompts_that_are_longer_than_those_for_training(
    tiny_model: Path, data_file: Path
) -> None:
    config = tiny_config(tiny_model, data_file, data={"max_prompt_tokens": 20})
    assert longest_allowed_prompt(config) == 20
    held_out = config.data.model_copy(update={"max_prompt_tokens": 30})
    evaluate = config.evaluate.model_copy(update={"data": held_out})
    assert longest_allowed_prompt(config.model_copy(update={"evaluate": evaluate})) == 30


def real(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def test_gsm8k_loads_whole(tiny_model: Path) -> None:
    data = {"format": "gsm8k", "template": None, "max_prompt_tokens": 2048}
    prompts = load(tiny_config(tiny_model, real("gsm8k/train.jsonl"), data=data))
    assert len(prompts) == 7473
    assert (prompts[0].text[:20], prompts[0].answer) == ("Natalia sold clips t", "72")
    renderer = PromptRenderer(tiny_model, tiny_config(tiny_model, Path(), data=data).data)
    expected = f'{prompts[0].text} Let\'s think step by step and output the final answer after "####".'
    assert renderer.decode(prompts[0].token_ids) == expected


def test_math_loads_without_its_rows_that_have_no_answer_or_several(tiny_model: Path) -> None:
    data: dict[str, Any] = {"format": "math", "template": None, "max_prompt_tokens": 4096}
    sections = {"data": data, "grader": {"name": "math"}}
    path = real("math/train.jsonl")
    assert "of 7,500 reference answers" in refusal(tiny_config(tiny_model, path, **sections))
    data["bad_golds"] = "drop"
    kept = load(tiny_config(tiny_model, path, **sections))
    assert 7450 <= len(kept) < 7500
