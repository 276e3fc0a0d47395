"""Batches of items that threads make, a few ahead of the consumer."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from teachercache.pipeline.ordered_map import ordered_map

Made = TypeVar("Made")

_BATCHES_AHEAD = 2


def in_threads(
    make: Callable[[int], Made], numbers: Iterable[int], batch_size: int, threads: int
) -> Iterator[list[Made]]:
    """`make(number)` of every number, in order, `batch_size` at a time; the last batch may be smaller."""
    with ThreadPoolExecutor(threads, thread_name_prefix="make") as pool:
        made = ordered_map(pool, make, numbers, _BATCHES_AHEAD * batch_size)
        while batch := list(islice(made, batch_size)):
            yield batch
