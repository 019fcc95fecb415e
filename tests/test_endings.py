"""A completion ended as the engine says; where its tokens say something else, nothing is graded."""

import pytest

from common.engines.endings import is_truncated
from common.errors import UserError

EOS = (0, 7)


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
