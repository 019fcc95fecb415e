"""A completion ended as the engine says; where its tokens say something else, nothing is graded."""

from collections.abc import Sequence

import pytest

from common.demo.base_model import build_tokenizer
from common.engines.endings import StopStrings, is_truncated
from common.errors import UserError

EOS = (0, 7)


def letters(token_ids: Sequence[int]) -> str:
    """Token 0 is "a", token 1 is "b"; those from 100 are three letters, of which 102 begins "cde"."""
    return "".join(
        chr(97 + token) if token < 100 else "abcdefgh"[token - 100 : token - 97] for token in token_ids
    )


def ids(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


def test_the_engines_word_decides() -> None:
    assert not is_truncated("stop", (5, 7), 2, EOS)
    assert not is_truncated("stop", (0,), 9, EOS)
    assert is_truncated("length", (5, 5, 5), 3, EOS)


@pytest.mark.parametrize(
    ("reason", "token_ids", "message"),
    [
        (
            "stop",
            (5, 5),
            r'of 2 tokens that it ended by "stop", but it ends with token 5, where completions end at \[0, 7\]',
        ),
        ("length", (5, 5), r'it ended by "length", but it ends with token 5, .*max_completion_tokens = 3'),
        ("stop", (), r'of 0 tokens that it ended by "stop", but it is empty'),
        ("abort", (5, 5, 5), r'ended by "abort"'),
        (None, (5, 5, 5), r'ended by "None"'),
    ],
)
def test_a_contradiction_stops_the_run(reason: str | None, token_ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        is_truncated(reason, token_ids, 3, EOS)


def test_a_stop_string_may_be_of_several_tokens_and_end_within_one() -> None:
    stop = StopStrings(["bcd", "hh"], letters)
    assert [stop.end(ids("xabc")[:length]) for length in range(5)] == [False] * 5
    assert stop.end(ids("xabcd"))
    assert stop.end([*ids("xab"), 102])
    assert stop.before("xabcde") == "xa"
    assert not stop.end([*ids("xa"), 102])
    assert stop.before("xacde") is None


def test_tokens_without_a_text_may_stand_within_a_stop_string() -> None:
    """A model may write padding between its letters; where it is overlooked, the end of the run contradicts it."""
    stop = StopStrings(["bcd"], lambda token_ids: letters([token for token in token_ids if token != 9]))
    assert stop.end([0, 1, 2, *[9] * 50, 3])


def test_the_stop_string_that_is_complete_first_ends_a_completion() -> None:
    stop = StopStrings(["cdef", "de", "e"], letters)
    assert stop.before("abcdef") == "abc"
    assert StopStrings(["e", "de"], letters).before("abcdef") == "abc"


def test_only_tokens_that_may_complete_a_stop_string_are_looked_at_closely() -> None:
    looked_at: list[int] = []

    def counted(token_ids: Sequence[int]) -> str:
        looked_at.append(len(token_ids))
        return letters(token_ids)

    stop = StopStrings(["bc"], counted)
    text = ids("abdefghxyz" * 200)
    for length in range(1, len(text) + 1):
        assert not stop.end(text[:length])
    assert set(looked_at) == {2}
    assert len(looked_at) == 10
    assert stop.end([*text, 1, 2])


def test_no_stop_string_is_no_end() -> None:
    stop = StopStrings([], letters)
    assert not stop
    assert not stop.end(ids("abc"))
    assert stop.before("abc") is None


@pytest.mark.parametrize("text", ["é", "中\n", "so 😀!", "a é", "\n\n", " é"])
def test_a_stop_string_is_found_in_bytes_whatever_the_tokens(text: str) -> None:
    tokenizer = build_tokenizer()
    stop = StopStrings([text], lambda found: str(tokenizer.decode(list(found))))
    token_ids = tokenizer.encode(f"How many apples 中é😀 has Tom{text}")
    ends = [length for length in range(1, len(token_ids) + 1) if stop.end(token_ids[:length])]
    first = next(
        length for length in range(1, len(token_ids) + 1) if text in tokenizer.decode(token_ids[:length])
    )
    assert ends[0] == first


def test_a_stop_string_is_an_end_and_no_limit() -> None:
    assert not is_truncated("stop", (5, 5), 2, EOS, holds_stop_string=True)
    with pytest.raises(
        UserError, match=r'ended by "length", but it ends with token 5 and holds a stop string'
    ):
        is_truncated("length", (5, 5), 2, EOS, holds_stop_string=True)
