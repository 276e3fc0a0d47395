"""Images on their way to the teachers: threads read, decode and render them ahead of time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as once
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from teachercache.cache_builder.progress import StageSeconds
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import ImageDecodeError
from teachercache.pipeline.loading.batch_memory import BatchMemory
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.views import render_view


@dataclass(frozen=True)
class Slot:
    """Where a view is rendered: slot `index` of the memory of a batch, uint8 (B, 3, h, w) by (h, w)."""

    memory: dict[Size, Tensor]
    index: int
    is_last: bool


@dataclass
class Sample:
    """A sample's rows in the cache, and the slots of their renders, or the reason why none is there."""

    index: int
    rows: range
    slots: list[Slot]
    streamed: Future[bytes | None] | None
    data: bytes = b""
    reason: str | None = None


class Decoding:
    """A pool of threads, for one shard or two at a time, that keeps up to two batches of views ready.

    They render into the memory of the batch, which a GPU can fetch it from if it is `pinned`. Where the
    source streams, one more thread for each shard reads its images in order, as far ahead.
    """

    def __init__(self, cache: FeatureCache, threads: int, batch_size: int, pinned: bool) -> None:
        self._cache, self._threads, self._batch_size = cache, threads, batch_size
        self._memory = once(
            lambda sizes: BatchMemory({size: ((batch_size, 3, *size), torch.uint8) for size in sizes}, pinned)
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def samples(self, shard: int, teachers: Iterable[str], seconds: StageSeconds) -> Iterator[Sample]:
        """The samples of a shard in order, rendered at the sizes of these teachers, or of "images"."""
        spec = self._cache.spec
        slots = self._slots(frozenset(map(spec.render_size, teachers)))
        num_views, first_row = spec.shard_segment(shard).num_views, spec.shard_rows(shard).start
        indices, images = spec.shard_samples(shard), self._cache.images
        stream = images.stream_source(indices) if images.source.streams else None
        reader = ThreadPoolExecutor(1, "stream")
        streamed = (reader.submit(next, stream, None) if stream else None for _ in indices)
        samples = (
            Sample(index, range(start, start + num_views), list(islice(slots, num_views)), data)
            for start, index, data in zip(count(first_row, num_views), indices, streamed, strict=False)
        )
        ahead = self._threads + -(-2 * self._batch_size // num_views)
        try:
            yield from ordered_map(self._pool, lambda sample: self._load(sample, seconds), samples, ahead)
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _slots(self, sizes: frozenset[Size]) -> Iterator[Slot]:
        while True:
            memory: Any = self._memory(sizes).take()
            yield from (Slot(memory, i, i + 1 == self._batch_size) for i in range(self._batch_size))

    def _load(self, sample: Sample, seconds: StageSeconds) -> Sample:
        try:
            if (status := self._cache.samples["status"][sample.index].as_py()) != OK:
                raise ImageDecodeError(status)
            with seconds.stage("read"):
                data = sample.streamed and sample.streamed.result()
                data = data or self._cache.images.read_source(sample.index)
            with seconds.stage("decode"):
                self._render(sample, data)
            sample.data = data
        except ImageDecodeError as error:
            sample.reason, sample.slots, sample.streamed = error.problem, [], None
        return sample

    def _render(self, sample: Sample, data: bytes) -> None:
        """Raises `ImageDecodeError`, also if the views were drawn for an image of another size."""
        image = decode_image(data)
        width, height = (self._cache.samples[name][sample.index].as_py() for name in ("width", "height"))
        if image.size != (width, height):
            raise ImageDecodeError(
                f"header says {width}×{height} pixels, the image has {image.width}×{image.height}"
            )
        for row, slot in zip(sample.rows, sample.slots, strict=True):
            view = self._cache.view(row)
            for size, pixels in slot.memory.items():
                render_view(image, view, size, out=pixels[slot.index])
