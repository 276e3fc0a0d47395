"""Batches of what threads make, a few ahead of who takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Made = TypeVar("Made")

_BATCHES_AHEAD = 3


def in_threads(
    make: Callable[[int], Made], numbers: Iterable[int], batch_size: int, threads: int
) -> Iterator[list[Made]]:
    """`make(number)` of every number, in their order, `batch_size` at a time; the last may be fewer."""
    with ThreadPoolExecutor(threads, thread_name_prefix="make") as pool:
        pending: deque[Future[Made]] = deque()
        rest = iter(numbers)
        while True:
            ahead = islice(rest, _BATCHES_AHEAD * batch_size - len(pending))
            pending += [pool.submit(make, number) for number in ahead]
            if not pending:
                return
            yield [pending.popleft().result() for _ in range(min(batch_size, len(pending)))]
