"""A thread that makes what comes next, and one that finishes what came before."""

import threading
from collections.abc import Iterator

import pytest

from common.overlap import ahead, behind


def test_items_made_ahead_are_the_same_in_the_same_order() -> None:
    assert list(ahead(iter(range(5)))) == [0, 1, 2, 3, 4]
    assert list(ahead(iter([]))) == []
    assert list(ahead(iter([None, 0, []]))) == [None, 0, []]


def test_the_next_item_is_made_while_one_is_in_use_and_no_more_than_that() -> None:
    made: list[int] = []
    second = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    items = ahead(numbers())
    assert next(items) == 0
    assert second.wait(60)
    assert made == [0, 1]
    items.close()
    assert made == [0, 1]


def test_an_error_of_making_appears_in_the_place_of_its_item() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        raise ValueError("no more numbers")

    items = ahead(numbers())
    assert next(items) == 0
    with pytest.raises(ValueError, match="no more numbers"):
        next(items)


def test_work_behind_is_done_in_order_and_whole_when_the_context_ends() -> None:
    done: list[int] = []
    with behind(done.append) as hand_over:
        for number in range(5):
            hand_over(number)
    assert done == [0, 1, 2, 3, 4]


def test_the_caller_goes_on_while_an_item_is_in_work() -> None:
    went_on = threading.Event()

    def work(_: int) -> None:
        assert went_on.wait(60), "the caller waits for the work"

    with behind(work) as hand_over:
        hand_over(0)
        hand_over(1)
        went_on.set()


def test_an_error_of_the_work_is_raised_by_a_later_call_or_at_the_end() -> None:
    def refuse(number: int) -> None:
        raise ValueError(f"not {number}")

    with pytest.raises(ValueError, match="not 0"), behind(refuse) as hand_over:  # noqa: PT012
        for number in range(3):
            hand_over(number)
        pytest.fail("the third call goes on although the first item failed")
    with pytest.raises(ValueError, match="not 7"), behind(refuse) as hand_over:
        hand_over(7)


def test_an_error_of_the_caller_is_the_one_that_is_raised() -> None:
    done: list[int] = []
    with pytest.raises(KeyError, match="mine"), behind(done.append) as hand_over:  # noqa: PT012
        hand_over(1)
        raise KeyError("mine")
    assert done == [1]
