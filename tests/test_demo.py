"""The demo: exact answers, disjoint splits, a tokenizer that survives its reload, builds that repeat."""

from __future__ import annotations

import random
import re
import resource
from itertools import islice
from pathlib import Path

import pytest

from common.demo import word_problems
from common.demo.base_model import END_OF_TEXT, PADDING, Pretraining, build_base_model, build_tokenizer
from common.errors import UserError

AWKWARD_TEXTS = [
    "Tom has 12 apples. He buys 3 more apples. How many apples are left?\n",
    "12345 apples, 1,234.5 pears; x=100-99",
    "naïve café e\u0301 日本語 🎉 \u00a0\u2028",
    "NUL \x00 and tabs\t\tand\r\n\n  spaces  ",
    f"typed by a user: {END_OF_TEXT} and {PADDING}.",
    "",
]
TINY = Pretraining(steps=3, textbook_steps=2, batch_size=4, warmup_steps=1)


def _silent(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "base"
    build_base_model(path, seed=0, recipe=TINY, progress=_silent)
    return path


def test_a_disk_that_is_full_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Here no file may grow beyond a size; a full disk fails in the same call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*/base: File too large; "):
            build_base_model(tmp_path / "base", seed=0, recipe=TINY, progress=_silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def _follow(solution: str, start: int) -> int:
    """The answer of a worked solution, each step checked and starting where the last one ended."""
    steps, answer = solution.split(" #### ")
    total = start
    for step in steps.split(", "):
        match = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step)
        assert match is not None, step
        left, sign, right, result = match.groups()
        assert int(left) == total
        total = total + int(right) if sign == "+" else total - int(right)
        assert int(result) == total
    assert int(answer) == total
    return total


def test_every_worked_solution_uses_the_numbers_of_its_question_and_adds_up() -> None:
    for row in word_problems.generate("train", 500, seed=1):
        numbers = [int(number) for number in re.findall(r"\d+", row["question"])]
        assert [int(number) for number in re.findall(r"[+-](\d+)", row["answer"])] == numbers[1:]
        assert 0 <= _follow(row["answer"], numbers[0]) <= word_problems.MAX_NUMBER


def test_gains_are_added_and_losses_are_taken_away() -> None:
    gains = re.compile(r"buys|finds|gets|wins|brings")
    for row in word_problems.generate("train", 200, seed=2):
        changes = row["question"].split(". ")[1:-1]
        signs = re.findall(r"\d([+-])\d", row["answer"])
        assert signs == ["+" if gains.search(sentence) else "-" for sentence in changes]


def test_the_splits_share_no_question_and_repeat_none() -> None:
    questions = {
        split: [row["question"] for seed in range(2) for row in word_problems.generate(split, 1000, seed)]
        for split in ("train", "test")
    }
    assert not set(questions["train"]) & set(questions["test"])
    rows = word_problems.generate("test", 1000, seed=0)
    assert len({row["question"] for row in rows}) == 1000


def test_the_same_seed_gives_the_same_rows_and_another_seed_gives_others() -> None:
    rows = word_problems.generate("train", 50, seed=3)
    assert word_problems.generate("train", 50, seed=3) == rows
    assert word_problems.generate("train", 60, seed=3)[:50] == rows
    assert word_problems.generate("train", 50, seed=4) != rows


def test_some_demonstrations_guess_and_some_reasoned_ones_slip() -> None:
    rng = random.Random(0)
    problems = list(islice(word_problems.stream("train", rng), 4000))
    guesses = reasoned = slipped = 0
    for problem in problems:
        text = word_problems.demonstration(problem, rng)
        assert re.fullmatch(r"(\d+[+-]\d+=\d+(, )?)*( )?#### \d+", text), text
        guesses += text.startswith("####")
        reasoned += text == problem.worked_solution
        slipped += not text.startswith("####") and text != problem.worked_solution
    assert guesses / 4000 == pytest.approx(word_problems.GUESS_PROBABILITY, abs=0.03)
    steps = sum(len(problem.changes) for problem in problems) / 4000
    assert 0 < slipped / (slipped + reasoned) < steps * word_problems.SLIP_PROBABILITY


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_words_and_whole_numbers_are_single_tokens() -> None:
    tokenizer = build_tokenizer()
    for number in range(word_problems.MAX_NUMBER + 1):
        assert len(tokenizer(str(number)).input_ids) == 1
    for row in word_problems.generate("train", 300, seed=5):
        words = re.findall(r"\w+|[.?]", row["question"])
        assert len(tokenizer(row["question"]).input_ids) == len(words)


def test_auto_tokenizer_gives_the_ids_that_the_model_was_trained_on(folder: Path) -> None:
    from transformers import AutoTokenizer

    built, reloaded = build_tokenizer(), AutoTokenizer.from_pretrained(folder)
    questions = [row["question"] + "\n" for row in word_problems.generate("test", 50, seed=0)]
    for text in AWKWARD_TEXTS + questions:
        assert reloaded(text).input_ids == built(text).input_ids
        assert reloaded(text, add_special_tokens=False).input_ids == built(text).input_ids
        assert reloaded.decode(reloaded(text).input_ids) == text


def test_the_folder_names_the_end_of_text_and_the_padding_alike_everywhere(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END_OF_TEXT, PADDING, None)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_a_base_model_loads_and_scores_every_token_of_its_vocabulary(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    logits = model(torch.tensor([tokenizer("Tom has 12 pens.\n").input_ids])).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()


def test_the_same_seed_builds_the_same_weights_whatever_the_global_generator(
    folder: Path, tmp_path: Path
) -> None:
    import torch

    torch.manual_seed(12345)
    state = torch.random.get_rng_state()
    build_base_model(tmp_path / "again", seed=0, recipe=TINY, progress=_silent)
    assert torch.equal(torch.random.get_rng_state(), state)
    build_base_model(tmp_path / "other", seed=1, recipe=TINY, progress=_silent)
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt):
        build_base_model(tmp_path / "base", seed=0, recipe=TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        build_base_model(tmp_path, seed=0, recipe=TINY)
