"""Two steps of a loop at the same time: a thread makes what comes next, or finishes what came before.

For work that releases Python's global lock, as reading and writing Parquet do.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T]:
    """The same items; while one is in use, a thread makes the next. An error appears in the place of its item."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(_following, items)
        while following := coming.result():
            coming = thread.submit(_following, items)
            yield from following


def _following(items: Iterator[T]) -> list[T]:
    """The next item, or none."""
    for item in items:
        return [item]
    return []


@contextmanager
def behind(work: Callable[[T], None]) -> Iterator[Callable[[T], None]]:
    """Yields a function that hands an item to `work`, which a thread does in order while the caller goes on.

    One item is in work and one may wait; then the function waits too. An error of the work is raised by one of the next
    calls, or when the context ends; an item that waits behind it is still worked on.
    """
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as thread:

        def hand_over(item: T) -> None:
            while len(pending) > 1:
                pending.pop(0).result()
            pending.append(thread.submit(work, item))

        yield hand_over
        while pending:
            pending.pop(0).result()
