"""Map a pool over many items, in order, a few items ahead of the consumer."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ordered_map(
    pool: Executor, make: Callable[[Item], Made], items: Iterable[Item], ahead: int
) -> Generator[Made]:
    """`make(item)` of every item; up to `ahead` more are in progress while one is consumed.

    Those not yet begun are cancelled when one fails, or when the iterator is closed.
    """
    pending: deque[Future[Made]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
