"""One shard, from image bytes to commit records. No cluster in here.

The stages overlap: a pool of threads reads, decodes and renders ahead; the calling thread runs the
teachers and encodes on their device; one more thread moves codes to the host and writes. Two shards
extracted at once by two threads of one `ShardExtractor` also hide each other's first decode and last
write; their forward passes take turns.
"""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
import xxhash
from torch import Tensor

from teachercache.cache_builder.device_copies import DeviceCopies
from teachercache.cache_builder.stages import StageSeconds
from teachercache.cache_builder.teachers import Teacher
from teachercache.cache_builder.versions import versions
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import (
    AlreadyCommittedError,
    BuildInterruptedError,
    CacheNotFoundError,
    CodecError,
    ImageDecodeError,
)
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.manifest import CommitRecord, QuarantineEntry, quarantine_name
from teachercache.pipeline.records.same_images import require_same_images
from teachercache.pipeline.records.spec import IMAGES, Size, TeacherSpec
from teachercache.pipeline.records.stats_files import write_moments
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.stores.base import CLS_TOKEN, GLOBAL_FEATURE, NORMS, ShardWriter, teacher_layouts
from teachercache.pipeline.stores.image_tar import ImageTarWriter
from teachercache.pipeline.views import render_view

_WRITES_IN_FLIGHT = 4

Renders = dict[Size, Tensor]  # uint8 (3, h, w) by (h, w)


def worker_name() -> str:
    """Of this process, as commit records have it."""
    return f"{platform.node()}:{os.getpid()}"


def extract_shard(
    cache: FeatureCache,
    shard: int,
    teachers: Mapping[str, Teacher],
    *,
    batch_size: int = 16,
    decode_threads: int = 2,
    images: bool = False,
) -> dict[str, CommitRecord]:
    """Compute, write and commit one shard of each of these teachers.

    `cache` names the images, views, specs and the store. Returns the commit records by teacher (and
    under "images" when the source images are copied too). Undecodable images are quarantined; any
    other failure leaves no file and no commit behind.
    """
    with ShardExtractor(cache, teachers, batch_size=batch_size, decode_threads=decode_threads) as extractor:
        return extractor.extract(shard, [*teachers, *([IMAGES] if images else [])])


@dataclass
class _Sample:
    """What a decoding thread hands over: the renders of each view, or the reason why there are none."""

    index: int
    data: bytes = b""
    renders: list[Renders] = field(default_factory=list)
    reason: str | None = None


class ShardExtractor:
    """Teachers on a device and a decoding pool, for one shard after another (or two at a time)."""

    def __init__(
        self,
        cache: FeatureCache,
        teachers: Mapping[str, Teacher],
        *,
        batch_size: int = 16,
        decode_threads: int = 2,
    ) -> None:
        self._cache = cache
        self._teachers = dict(teachers)
        self._batch_size = batch_size
        self._decode_threads = decode_threads
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._copies = {name: DeviceCopies(teacher) for name, teacher in self._teachers.items()}
        self._moved: dict[int, float] = {}
        self._abandoned = False

    def __enter__(self) -> ShardExtractor:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._decoders, self._device):
            pool.shutdown(cancel_futures=True)

    def idle_s(self) -> dict[int, float]:
        """The shards in flight, and for how long nothing has moved in each."""
        now = time.monotonic()
        return {shard: now - moved for shard, moved in self._moved.copy().items()}

    def abandon(self) -> None:
        """End the shards in flight at their next batch: `BuildInterruptedError`, and no file is left."""
        self._abandoned = True

    def extract(self, shard: int, names: Collection[str], replace: bool = False) -> dict[str, CommitRecord]:
        """Extract and commit one shard for the named teachers, and "images" for the copied images.

        What another job has committed already, or commits meanwhile, is left as it is and not returned;
        with `replace`, it is replaced once all is computed, and stays as it is where that fails.
        Raises `BuildInterruptedError` after `abandon()`, `CacheNotFoundError` when the cache has vanished,
        `CacheMismatchError` for images that are not those that were planned, or computed before.
        """
        is_committed = self._cache.manifest.is_committed
        committed = {name for name in names if not replace and is_committed(name, shard)}
        missing = [name for name in names if name not in committed]
        if names and not missing:
            return {}
        try:
            with ExitStack() as publishing:
                return self._extract(shard, missing, publishing, replace)
        except AlreadyCommittedError:
            return self.extract(shard, missing)
        finally:
            self._moved.pop(shard, None)

    def _move(self, shard: int) -> None:
        self._moved[shard] = time.monotonic()
        if self._abandoned:
            raise BuildInterruptedError(f"Shard {shard} was abandoned, since the process has to end.")

    def _require_cache(self) -> None:
        """Writing makes folders; where a mount is gone, they would be made below the place it had."""
        if not self._cache.manifest.exists():
            raise CacheNotFoundError(
                "The cache has vanished.",
                got=f"{self._cache.storage.url} without cache.json",
                expected="the cache that this build was writing to",
                do="mount it again, or restore cache.json, and run the same command again",
            )

    def _extract(
        self, shard: int, names: Collection[str], publishing: ExitStack, replace: bool
    ) -> dict[str, CommitRecord]:
        self._require_cache()
        start, seconds = time.perf_counter(), StageSeconds()
        spec, store, manifest = self._cache.spec, self._cache.store, self._cache.manifest
        quarantined: list[QuarantineEntry] = []
        source_digest = xxhash.xxh3_128()
        members: tuple[tuple[int, int], ...] = ()
        with ExitStack() as stack:
            writers: dict[str, ShardWriter] = {
                name: stack.enter_context(store.write_shard(name, shard)) for name in names if name != IMAGES
            }
            tar = (
                stack.enter_context(ImageTarWriter.open(self._cache.storage, shard))
                if IMAGES in names
                else None
            )
            teaching = stack.enter_context(_Teaching(self, shard, writers, seconds))
            self._move(shard)
            for offset, sample in self._samples(shard, list(writers), seconds):
                self._move(shard)
                source_digest.update(sample.data)
                if sample.reason is not None:
                    quarantined.append(self._quarantine_entry(sample.index, sample.reason))
                if tar is not None:
                    tar.add(self._cache.key(sample.index), sample.data if sample.reason is None else None)
                for view, renders in enumerate(sample.renders):
                    teaching.add(offset + view, renders)
            teaching.finish()
            new = [] if replace else names
            publishing.enter_context(manifest.publishing(shard, new, lambda: self._move(shard)))
            require_same_images(manifest, spec, shard, source_digest.hexdigest(), replaced=names)
        files = {name: writer.files() for name, writer in writers.items()}
        for name, moments in teaching.moments.items():
            files[name] |= write_moments(manifest.storage, name, shard, moments)
        if tar is not None:
            files[IMAGES], members = tar.files(), tuple(tar.members)
        if quarantined:
            manifest.write_quarantine(shard, quarantined, source_digest.hexdigest())
        elif replace and manifest.storage.exists(quarantine_name(shard)):
            manifest.storage.remove(quarantine_name(shard))
        self._require_cache()
        seconds.totals["wall"] = time.perf_counter() - start
        records = {
            name: CommitRecord(
                teacher=name,
                shard=shard,
                content_id=spec.shard_content_id(name, shard),
                first_row=shard * spec.rows_per_shard,
                num_rows=len(spec.shard_rows(shard)),
                invalid_rows=self._rows_of(shard, {entry.sample_index for entry in quarantined}),
                files=files[name],
                source_checksum=source_digest.hexdigest(),
                members=members if name == IMAGES else (),
                seconds={stage: round(value, 4) for stage, value in seconds.totals.items()},
                host=platform.node(),
                worker=worker_name(),
                versions=versions(),
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            for name in names
        }
        for record in records.values():
            manifest.commit(record)
        return records

    def _samples(
        self, shard: int, teachers: list[str], seconds: StageSeconds
    ) -> Iterator[tuple[int, _Sample]]:
        """(offset of its first row in the shard, sample) in order, decoded ahead of the consumer."""
        num_views = self._cache.spec.shard_segment(shard).num_views
        first_row = self._cache.spec.shard_rows(shard).start
        sizes = {self._cache.spec.teachers[name].render_size for name in teachers}
        ahead = self._decode_threads + -(-2 * self._batch_size // num_views)
        pending: deque[tuple[int, Future[_Sample]]] = deque()
        try:
            for position, sample in enumerate(self._cache.spec.shard_samples(shard)):
                offset = position * num_views
                rows = range(first_row + offset, first_row + offset + num_views)
                pending.append((offset, self._decoders.submit(self._load, sample, rows, sizes, seconds)))
                if len(pending) > ahead:
                    offset, future = pending.popleft()
                    yield offset, future.result()
            while pending:
                offset, future = pending.popleft()
                yield offset, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def _load(self, index: int, rows: range, sizes: set[Size], seconds: StageSeconds) -> _Sample:
        status, width, height = (
            self._cache.samples[name][index].as_py() for name in ("status", "width", "height")
        )
        if status != "ok":
            return _Sample(index, reason=status)
        try:
            with seconds.stage("read"):
                data = self._cache.source_bytes(index)
            with seconds.stage("decode"):
                image = decode_image(data)
                if image.size != (width, height):
                    raise ImageDecodeError(
                        f"header says {width}×{height} pixels, the image has {image.width}×{image.height}"
                    )
                views = [self._cache.view(row) for row in rows]
                renders = [{size: render_view(image, view, size) for size in sizes} for view in views]
        except ImageDecodeError as error:
            return _Sample(index, reason=error.problem)
        return _Sample(index, data, renders)

    def _rows_of(self, shard: int, samples: set[int]) -> tuple[int, ...]:
        rows = self._cache.spec.shard_rows(shard)
        owners, _, _ = self._cache.index.locate(rows)
        return tuple(row for row, owner in zip(rows, owners.tolist(), strict=True) if owner in samples)

    def _quarantine_entry(self, index: int, reason: str) -> QuarantineEntry:
        path, offset = (self._cache.samples[name][index].as_py() for name in ("path", "offset"))
        location = f"{path} at {offset}" if offset else path
        return QuarantineEntry(
            sample_index=index, key=self._cache.key(index), location=location, reason=reason
        )

    def _encode(
        self, name: str, pixels: Mapping[Size, Tensor], seconds: StageSeconds
    ) -> tuple[dict[str, Tensor], FeatureMoments]:
        """What goes to disk for one batch of one teacher, and its statistics, on the teacher's device.

        One thread computes for all shards: OpenMP keeps a team of threads for every thread that calls it,
        and on a CPU two teams spin against each other.
        """
        views = self._copies[name].start(pixels[self._cache.spec.teachers[name].render_size])
        return self._device.submit(self._compute, name, views, seconds).result()

    def _compute(
        self, name: str, views: Tensor, seconds: StageSeconds
    ) -> tuple[dict[str, Tensor], FeatureMoments]:
        copies, spec = self._copies[name], self._cache.spec.teachers[name]
        with torch.inference_mode():
            with seconds.stage("forward"):
                copies.wait(views)
                features = self._teachers[name](views)
                copies.synchronize()
            with seconds.stage("encode"):
                stored, norms_BS = stored_form(features.feature_maps_BSHWC, spec.grid)
                tensors = dict(self._cache.codec(name).encode(stored).tensors())
                if norms_BS is not None:
                    tensors[NORMS] = norms_BS
                tensors |= _tokens(spec, features.cls_token_BSC, features.global_feature_BD)
            with seconds.stage("statistics"):
                moments = FeatureMoments.of(features.feature_maps_BSHWC, self._cache.spec.covariance)
        return tensors, moments


def _tokens(spec: TeacherSpec, cls_token: Tensor | None, global_feature: Tensor | None) -> dict[str, Tensor]:
    """The token features in the dtypes of the layout. Raises `CodecError` for values they cannot hold."""
    layouts = teacher_layouts(spec)
    tokens: dict[str, Tensor] = {}
    for name, tensor in ((CLS_TOKEN, cls_token), (GLOBAL_FEATURE, global_feature)):
        if name not in layouts or tensor is None:
            continue
        tokens[name] = tensor.to(layouts[name].dtype)
        if not torch.isfinite(tokens[name]).all():
            raise CodecError(
                f"The {name} feature of {spec.model} cannot be stored beside codec {spec.codec}.",
                got=f"a largest magnitude of {tensor.abs().max().item():g}",
                expected=f"finite values of at most {torch.finfo(layouts[name].dtype).max:g}",
                do="choose codec f32 if the values are finite; look at the teacher if they are not",
            )
    return tokens


class _Teaching:
    """Collects views into batches, runs the teachers on them, and writes behind in one thread."""

    def __init__(
        self, extractor: ShardExtractor, shard: int, writers: Mapping[str, ShardWriter], seconds: StageSeconds
    ) -> None:
        self._extractor, self._shard, self._writers, self._seconds = extractor, shard, writers, seconds
        self.moments: dict[str, FeatureMoments] = {}
        self._offsets: list[int] = []
        self._renders: list[Renders] = []
        self._writes: deque[Future[None]] = deque()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")

    def __enter__(self) -> _Teaching:
        return self

    def __exit__(self, *_: object) -> None:
        self._writing.shutdown(cancel_futures=True)

    def add(self, offset: int, renders: Renders) -> None:
        self._offsets.append(offset)
        self._renders.append(renders)
        if len(self._offsets) == self._extractor._batch_size:
            self._run()

    def finish(self) -> None:
        if self._offsets:
            self._run()
        while self._writes:
            self._writes.popleft().result()

    def _run(self) -> None:
        pixels = {
            size: torch.stack([renders[size] for renders in self._renders]) for size in self._renders[0]
        }
        for name, writer in self._writers.items():
            tensors, moments = self._extractor._encode(name, pixels, self._seconds)
            before = self.moments.get(name)
            self.moments[name] = moments if before is None else before.merge(moments)
            self._extractor._move(self._shard)
            while len(self._writes) >= _WRITES_IN_FLIGHT:
                self._writes.popleft().result()
            self._writes.append(self._writing.submit(self._write, writer, self._offsets, tensors))
        self._offsets, self._renders = [], []

    def _write(self, writer: ShardWriter, offsets: list[int], tensors: dict[str, Tensor]) -> None:
        with self._seconds.stage("write"):
            writer.write(offsets, {name: tensor.cpu().numpy() for name, tensor in tensors.items()})
