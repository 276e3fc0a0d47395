"""Batches for training, made by threads of the training process itself.

Worker processes would copy every batch through shared memory, which caps any format near 1 GB/s;
JPEG decoding, resizing and file reads all release the GIL, so threads keep up without copies.
Do not hand the loader to `accelerator.prepare()`: the sampler has already split the rows by rank.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache import FeatureCache
from pipeline.codecs import Encoded
from pipeline.sampler import ShardShuffleSampler
from pipeline.spec import Size
from pipeline.stores.base import CLS_TOKEN
from pipeline.views import render_view


@dataclass
class Batch:
    """One process's part of a global batch (b rows).

    `renders` are uint8 (b, 3, h, w) by (h, w); the student's own size is always there. `features` and
    `cls_tokens` are still encoded, on the CPU. `seconds`: `read` and `decode` are summed over threads,
    `wait` is what the consumer waited for.
    """

    step: int
    rows: NDArray[np.int64]
    sample_keys: list[str]
    renders: dict[Size, Tensor]
    features: dict[str, Encoded]
    cls_tokens: dict[str, Tensor]
    seconds: dict[str, float]


@dataclass
class _Pending:
    """A batch under way: what its tasks return, in the order of the batch."""

    step: int
    rows: NDArray[np.int64]
    views: list[Future[tuple[dict[Size, Tensor], float]]]
    features: list[Future[tuple[str, Encoded, Tensor | None, float]]] = field(default_factory=list)


class FeatureLoader:
    """Endless iterator of `Batch`; a context manager that stops its threads.

    `features=False` leaves the cached features unread (training with online teachers);
    `extra_sizes` asks for renders at further sizes, such as the teachers' own.
    """

    def __init__(
        self,
        cache: FeatureCache,
        sampler: ShardShuffleSampler,
        teachers: Sequence[str] | None = None,
        *,
        features: bool = True,
        extra_sizes: Collection[Size] = (),
        start_step: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._cache = cache
        self._sampler = sampler
        self._teachers = cache.check_teachers(teachers) if features else []
        self._sizes = sorted({cache.spec.views.size, *extra_sizes})
        self._steps = count(start_step)
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._pending: deque[_Pending] = deque()

    def __enter__(self) -> FeatureLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while len(self._pending) <= self._prefetch:
                self._pending.append(self._submit(next(self._steps)))
            yield self._collect(self._pending.popleft())

    def _submit(self, step: int) -> _Pending:
        rows = self._sampler.batch(step)
        features = [self._pool.submit(self._read, name, rows) for name in self._teachers]
        views = [self._pool.submit(self._render, int(row)) for row in rows]
        return _Pending(step, rows, views, features)

    def _read(self, teacher: str, rows: NDArray[np.int64]) -> tuple[str, Encoded, Tensor | None, float]:
        start = time.perf_counter()
        encoded = self._cache.read(rows, [teacher])[teacher]
        wants_cls = self._cache.spec.teachers[teacher].cls_token
        cls_token = self._cache.read_tokens(rows, teacher, CLS_TOKEN) if wants_cls else None
        return teacher, encoded, cls_token, time.perf_counter() - start

    def _render(self, row: int) -> tuple[dict[Size, Tensor], float]:
        start = time.perf_counter()
        sample = int(self._cache.index.locate(row)[0])
        image, view = self._cache.image(sample), self._cache.view(row)
        renders = {size: render_view(image, view, size) for size in self._sizes}
        return renders, time.perf_counter() - start

    def _collect(self, pending: _Pending) -> Batch:
        start = time.perf_counter()
        features = [future.result() for future in pending.features]
        views = [future.result() for future in pending.views]
        wait = time.perf_counter() - start
        samples, _, _ = self._cache.index.locate(pending.rows)
        return Batch(
            step=pending.step,
            rows=pending.rows,
            sample_keys=[self._cache.key(int(sample)) for sample in samples],
            renders={size: self._pin(torch.stack([view[size] for view, _ in views])) for size in self._sizes},
            features={teacher: self._pin_encoded(encoded) for teacher, encoded, _, _ in features},
            cls_tokens={teacher: self._pin(cls) for teacher, _, cls, _ in features if cls is not None},
            seconds={
                "read": sum(seconds for *_, seconds in features),
                "decode": sum(seconds for _, seconds in views),
                "wait": wait,
            },
        )

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin_memory else tensor

    def _pin_encoded(self, encoded: Encoded) -> Encoded:
        return Encoded(encoded.codec, {name: self._pin(tensor) for name, tensor in encoded.arrays.items()})
