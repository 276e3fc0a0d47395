"""Images on their way to the teachers: threads read, decode and render them ahead of time."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from teachercache.cache_builder.stages import StageSeconds
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import ImageDecodeError
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.views import render_view

Renders = dict[Size, Tensor]  # uint8 (3, h, w) by (h, w)


@dataclass
class Sample:
    """A sample's rows in the cache, and the renders of each, or the reason why it has none (and no data)."""

    index: int
    rows: range
    data: bytes = b""
    renders: list[Renders] = field(default_factory=list)
    reason: str | None = None


class Decoding:
    """A pool of threads, for one shard or two at a time, that keeps up to `views_ahead` views ready."""

    def __init__(self, cache: FeatureCache, threads: int, views_ahead: int) -> None:
        self._cache, self._threads, self._views_ahead = cache, threads, views_ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def samples(self, shard: int, teachers: Iterable[str], seconds: StageSeconds) -> Iterator[Sample]:
        """The samples of a shard in order, rendered at the sizes of these teachers, or of "images"."""
        spec = self._cache.spec
        sizes = set(map(spec.render_size, teachers))
        num_views, first_row = spec.shard_segment(shard).num_views, spec.shard_rows(shard).start
        samples = (
            Sample(index, range(first_row + place * num_views, first_row + (place + 1) * num_views))
            for place, index in enumerate(spec.shard_samples(shard))
        )
        ahead = self._threads + -(-self._views_ahead // num_views)
        return ordered_map(self._pool, lambda sample: self._load(sample, sizes, seconds), samples, ahead)

    def _load(self, sample: Sample, sizes: set[Size], seconds: StageSeconds) -> Sample:
        try:
            data = self._read(sample.index, seconds)
            with seconds.stage("decode"):
                sample.renders = self._render(sample, data, sizes)
            sample.data = data
        except ImageDecodeError as error:
            sample.reason = error.problem
        return sample

    def _read(self, index: int, seconds: StageSeconds) -> bytes:
        if (status := self._cache.samples["status"][index].as_py()) != "ok":
            raise ImageDecodeError(status)
        with seconds.stage("read"):
            return self._cache.source_bytes(index)

    def _render(self, sample: Sample, data: bytes, sizes: set[Size]) -> list[Renders]:
        """Raises `ImageDecodeError`, also if the views were drawn for an image of another size."""
        image = decode_image(data)
        width, height = (self._cache.samples[name][sample.index].as_py() for name in ("width", "height"))
        if image.size != (width, height):
            raise ImageDecodeError(
                f"header says {width}×{height} pixels, the image has {image.width}×{image.height}"
            )
        views = [self._cache.view(row) for row in sample.rows]
        return [{size: render_view(image, view, size) for size in sizes} for view in views]
