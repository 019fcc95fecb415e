"""Steps of solutions: where StepCutter ends them, and which texts end inside a block."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from common.demo.base_model import build_tokenizer
from common.segments.config import SEPARATORS
from common.segments.split import StepCutter, is_open

GOLDEN = Path(__file__).parent / "golden" / "31beced" / "run" / "base_model"

Tokeniser = tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]
"""Encode and decode."""


def cut(tokens: Sequence[str], rule: str | Sequence[str] = "line") -> list[str]:
    """The steps of a text that is given by its tokens."""
    separators = SEPARATORS[rule] if isinstance(rule, str) else rule
    cutter = StepCutter(separators, lambda ids: "".join(tokens[number] for number in ids))
    ends = [0, *cutter.ends(range(len(tokens))), len(tokens)]
    return ["".join(tokens[start:end]) for start, end in pairwise(ends) if start < end]


def by_character(text: str, rule: str | Sequence[str] = "line") -> list[str]:
    return cut(list(text), rule)


@pytest.mark.parametrize(
    ("text", "open_"),
    [
        ("", False),
        ("x = 1", False),
        ("```python\nx = 1\n", True),
        ("```python\nx = 1\n```", False),
        ("```\n$$ \\begin{a} \\[\n```", False),
        ("$$ x", True),
        ("$$ x $$", False),
        ("$$ x $$ and $$ y", True),
        (r"\[ x", True),
        (r"\[ x \]", False),
        (r"\] x", False),
        (r"\begin{align} x", True),
        (r"\begin{align} x \end{align}", False),
        (r"\begin{align*} x \end{align}", True),
        (r"\begin{a} \begin{b} \end{b}", True),
        (r"\begin{a} \begin{b} \end{b} \end{a}", False),
        (r"\begin{a} \begin{a} \end{a}", True),
        (r"\[ \begin{aligned} x \\[2pt] y \end{aligned} \]", False),
        (r"$$ \begin{cases} 1 \\ 2 \end{cases} $$", False),
        (r"x \\[2pt]", False),
        (r"x \\\[ y", True),
        (r"\\begin{a}", False),
        (r"\end{a}", False),
        (r"\end{}", False),
        (r"\begin{}", False),
        (r"\end{", False),
        (r"He pays \$$x$.", False),
        (r"It costs $5\$$.", False),
        ("a ``` b", True),
        ("```` a", True),
    ],
)
def test_a_text_is_open_inside_of_code_formulas_and_environments(text: str, open_: bool) -> None:
    assert is_open(text) is open_


def test_a_line_is_a_step_with_its_line_break() -> None:
    assert by_character("a = 1\nb = 2\nso c") == ["a = 1\n", "b = 2\n", "so c"]
    assert by_character("one step") == ["one step"]
    assert by_character("ends\n") == ["ends\n"]
    assert by_character("") == []


def test_blank_lines_begin_the_next_step_so_that_only_a_last_one_can_be_blank() -> None:
    assert by_character("a\n\n\nb\n") == ["a\n", "\n\nb\n"]
    assert by_character("\n \n a\nb") == ["\n \n a\n", "b"]
    assert by_character("a\n\n") == ["a\n", "\n"]
    assert by_character("\n\n") == ["\n\n"]


def test_a_paragraph_ends_with_a_blank_line() -> None:
    assert by_character("a\nb\n\nc\n\n\nd", "paragraph") == ["a\nb\n\n", "c\n\n", "\nd"]


def test_a_sentence_ends_with_the_space_or_the_line_break_after_its_mark() -> None:
    text = "It is 3.5 now. Is it? Yes!\nThe end."
    assert by_character(text, "sentence") == ["It is 3.5 now. ", "Is it? ", "Yes!\n", "The end."]


def test_texts_of_ones_own_end_steps() -> None:
    assert by_character("Step 1 ки Step 2 ки done", ["ки"]) == ["Step 1 ки", " Step 2 ки", " done"]
    assert by_character("a; b| c", [";", "|"]) == ["a;", " b|", " c"]


@pytest.mark.parametrize(
    "block",
    [
        "```python\nx = 1\n\ny = 2\n```",
        "$$\nx = 1\n$$",
        "\\[\nx = 1\n\\]",
        "\\begin{align}\nx &= 1 \\\\\ny &= 2 \\\\[2pt]\n\\end{align}",
        "\\[\n\\begin{cases}\n1 \\\\\n2\n\\end{cases}\n\\]",
        "\\begin{tabular}{c}\n\\begin{tabular}{c}\n1\n\\end{tabular}\n2\n\\end{tabular}",
    ],
)
@pytest.mark.parametrize("rule", ["line", "paragraph"])
def test_a_block_is_not_cut(block: str, rule: str) -> None:
    end = SEPARATORS[rule][0]
    assert by_character(f"So{end}{block}{end}then{end}", rule) == [f"So{end}", f"{block}{end}", f"then{end}"]
    assert by_character(f"So {block} is{end}then", rule) == [f"So {block} is{end}", "then"]


def test_a_block_that_never_closes_is_one_step_with_all_that_follows() -> None:
    assert by_character("a\n$$ x\nb\nc") == ["a\n", "$$ x\nb\nc"]


def test_escaped_dollars_and_ends_without_a_name_open_nothing() -> None:
    assert by_character("It is $5\\$$ now\nthen\n\\end{}\nlast") == [
        "It is $5\\$$ now\n",
        "then\n",
        "\\end{}\n",
        "last",
    ]


@pytest.mark.parametrize(
    ("tokens", "rule", "steps"),
    [
        (["a", "\n", "\n", "b"], "paragraph", ["a\n\n", "b"]),
        (["a", "\n\n", "b"], "line", ["a\n\n", "b"]),
        (["a", ".\n", "b"], "line", ["a.\n", "b"]),
        (["a", ".", " The", " b"], "sentence", ["a. The", " b"]),
        (["a", "\nb", " c", "\n"], "line", ["a\nb", " c\n"]),
        (["a", " b\nc\nd", " e\n"], "line", ["a b\nc\nd", " e\n"]),
        (["a", "\n```", "x", "\n", "```", "\n", "b"], "line", ["a\n```x\n```\n", "b"]),
        (["$$", "x", "\n$$\n", "b"], "line", ["$$x\n$$\n", "b"]),
        (["$$", "x", "\n$$\n\\[", "b", "\\]\n", "c"], "line", ["$$x\n$$\n\\[b\\]\n", "c"]),
        (["`", "``x", "\n", "``", "`\n", "b"], "line", ["```x\n```\n", "b"]),
        (["a", "", "\n", "", "b"], "line", ["a\n", "b"]),
    ],
)
def test_a_step_ends_with_the_first_token_after_which_the_text_holds_a_separator(
    tokens: list[str], rule: str, steps: list[str]
) -> None:
    assert cut(tokens, rule) == steps


@pytest.mark.parametrize("name", ["the demo's", "with byte fallback"])
@pytest.mark.parametrize("separator", ["。", "🙂", "é\n"])
def test_a_separator_of_several_tokens_each_a_part_of_a_character_is_found(name: str, separator: str) -> None:
    encode, decode = TOKENISERS[name]()
    assert len(encode(separator)) > 1
    token_ids = encode(f"x = 1{separator}数 = 2{separator}{separator}end")
    ends = [0, *StepCutter([separator], decode).ends(token_ids), len(token_ids)]
    steps = [decode(token_ids[:end])[len(decode(token_ids[:start])) :] for start, end in pairwise(ends)]
    assert steps == [f"x = 1{separator}", f"数 = 2{separator}", separator, "end"]


PIECES = [
    *(
        "x",
        " = 1",
        ". ",
        "? ",
        *["\n", "\n\n"] * 5,
        " ",
        "```",
        "$$",
        "\\[",
        "\\]",
        "\\\\",
        "\\\\[2pt]",
        "$",
        "\\$",
    ),
    *("\\begin{a}", "\\end{a}", "\\begin{b}", "\\end{b}", "\\end{}", "é", "½", "数", "🙂", "\t", "!\n"),
]


def texts(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(PIECES, k=generator.randint(0, 40))) for _ in range(count)]


def sentencepiece_like() -> Tokeniser:
    """A tokenizer that drops the space before a text's first word, and falls back to bytes, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁", "▁x", "x", "▁=", "=", "1", ".", "?", "$", "$$", "\\", "```", "begin", "end"):
        vocabulary[piece] = len(vocabulary)
    merges = [("▁", "x"), ("▁", "="), ("$", "$")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode


def of_folder(folder: Path) -> Tokeniser:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text).input_ids, lambda ids: str(tokenizer.decode(ids))


def of_demo() -> Tokeniser:
    tokenizer = build_tokenizer()
    return lambda text: tokenizer(text).input_ids, lambda ids: str(tokenizer.decode(ids))


TOKENISERS = {
    "the demo's": of_demo,
    "a stored one": lambda: of_folder(GOLDEN),
    "with byte fallback": sentencepiece_like,
}


@pytest.mark.parametrize("rule", SEPARATORS)
@pytest.mark.parametrize("name", TOKENISERS)
def test_where_a_step_ends_depends_on_the_tokens_so_far_alone(name: str, rule: str) -> None:
    """A beginning of the tokens has the same ends, and from any end on the other ones are found again."""
    encode, decode = TOKENISERS[name]()
    cutter = StepCutter(SEPARATORS[rule], decode)
    generator, found = random.Random(1), 0
    for text in texts(100):
        token_ids = encode(text)
        ends = list(cutter.ends(token_ids))
        found += len(ends)
        assert ends == sorted(set(ends))
        for length in {0, len(token_ids), *generator.choices(range(len(token_ids) + 1), k=4)}:
            assert list(cutter.ends(token_ids[:length])) == [end for end in ends if end <= length]
        for start in ends:
            rest = [end - start for end in ends if end > start]
            assert list(cutter.ends(token_ids[start:])) == rest
            assert cutter.first_end(token_ids[start:]) == (rest[0] if rest else len(token_ids) - start)
    assert found > 40


@pytest.mark.parametrize("rule", SEPARATORS)
@pytest.mark.parametrize("name", TOKENISERS)
def test_each_step_but_the_last_holds_a_separator_and_more_and_closes_its_blocks(
    name: str, rule: str
) -> None:
    encode, decode = TOKENISERS[name]()
    cutter = StepCutter(SEPARATORS[rule], decode)
    for text in texts(100):
        token_ids = encode(text)
        start = 0
        for end in cutter.ends(token_ids):
            step = decode(token_ids[start:end])
            assert step.strip()
            assert any(separator in step for separator in SEPARATORS[rule])
            assert not is_open(step)
            start = end


def test_lines_of_a_solution_are_its_steps_for_each_tokenizer() -> None:
    text = "x = 1\nx = 1 1\n$$ x\n= 1 $$\nend"
    for build in TOKENISERS.values():
        encode, decode = build()
        token_ids = encode(text)
        ends = [0, *StepCutter(SEPARATORS["line"], decode).ends(token_ids), len(token_ids)]
        steps = [decode(token_ids[:end])[len(decode(token_ids[:start])) :] for start, end in pairwise(ends)]
        assert steps == ["x = 1\n", "x = 1 1\n", "$$ x\n= 1 $$\n", "end"]
