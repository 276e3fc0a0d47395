"""One shard, from image bytes to commit records. Knows no cluster.

A pool of threads reads, decodes and renders ahead; one thread runs the teachers and encodes on their device;
one more moves codes to the host and writes. Of two shards at once, each hides the other's first decode and
last write.
"""

import os
import platform
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Self

import xxhash

from teachercache.cache_builder.compute import Batches, Computing
from teachercache.cache_builder.decode import Decoding, Sample
from teachercache.cache_builder.progress import StageSeconds
from teachercache.cache_builder.teachers import Teacher
from teachercache.cache_builder.teachers.teacher import versions
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import AlreadyCommittedError, BuildInterruptedError, CacheNotFoundError
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.integrity import require_same_images
from teachercache.pipeline.records.manifest import CommitRecord, FileRecord, QuarantineEntry, quarantine_name
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.records.stats_files import write_moments
from teachercache.pipeline.stores.feature_store import ShardWriter
from teachercache.pipeline.stores.webdataset_store import ImageTarWriter


def worker_name() -> str:
    """The name of this process in commit records."""
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
    under "images" for copied or rendered images). Undecodable images are quarantined; any
    other failure leaves no file and no commit behind.
    """
    with ShardExtractor(cache, teachers, batch_size=batch_size, decode_threads=decode_threads) as extractor:
        return extractor.extract(shard, [*teachers, *([IMAGES] if images else [])])


@dataclass
class _Shard:
    """A shard in progress: its writers by teacher and, once it is computed, the content of its records."""

    number: int
    writers: dict[str, ShardWriter]
    tar: ImageTarWriter | None
    seconds: StageSeconds = field(default_factory=StageSeconds)
    source_checksum: str = ""
    quarantined: list[Sample] = field(default_factory=list)
    moments: dict[str, FeatureMoments] = field(default_factory=dict)


class ShardExtractor:
    """Teachers on a device and a decoding pool, for one shard at a time (or two)."""

    def __init__(
        self,
        cache: FeatureCache,
        teachers: Mapping[str, Teacher],
        *,
        batch_size: int = 16,
        decode_threads: int = 2,
    ) -> None:
        self._cache, self._batch_size = cache, batch_size
        self._computing = Computing(cache, teachers)
        self._decoding = Decoding(cache, decode_threads, batch_size, self._computing.on_gpu)
        self._progressed_at: dict[int, float] = {}
        self._abandoned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoding.close()
        self._computing.close()

    def idle_s(self) -> dict[int, float]:
        """The shards in flight, and the seconds since each last made progress."""
        now = time.monotonic()
        return {shard: now - progressed for shard, progressed in self._progressed_at.copy().items()}

    def abandon(self) -> None:
        """End the shards in flight at their next batch, by `BuildInterruptedError`; no file is left."""
        self._abandoned = True

    def extract(self, shard: int, names: Collection[str], replace: bool = False) -> dict[str, CommitRecord]:
        """Extract and commit one shard for the named teachers, and "images" for copied or rendered images.

        Shards that another job has already committed, or commits meanwhile, stay and are not returned;
        `replace` replaces them once everything is computed, and leaves them unchanged if that fails.
        Raises `BuildInterruptedError` after `abandon()`, `CacheNotFoundError` when the cache has vanished,
        `CacheMismatchError` for images other than those of the plan or of earlier records.
        """
        is_committed = self._cache.manifest.is_committed
        committed = {name for name in names if not replace and is_committed(name, shard)}
        missing = [name for name in names if name not in committed]
        if names and not missing:
            return {}
        try:
            return self._extract(shard, missing, replace)
        except AlreadyCommittedError:
            return self.extract(shard, missing)
        finally:
            self._progressed_at.pop(shard, None)

    def _note_progress(self, shard: int) -> None:
        self._progressed_at[shard] = time.monotonic()
        if self._abandoned:
            raise BuildInterruptedError(f"Shard {shard} was abandoned, since the process has to end.")

    def _require_cache(self) -> None:
        """Writing creates folders, and if the mount is gone, it would create them below the mount point."""
        if not self._cache.manifest.exists():
            raise CacheNotFoundError(
                "The cache has vanished.",
                got=f"{self._cache.storage.url} without cache.json",
                expected="the cache that this build was writing to",
                do="mount it again, or restore cache.json, and run the same command again",
            )

    def _extract(self, number: int, names: Collection[str], replace: bool) -> dict[str, CommitRecord]:
        self._require_cache()
        start, cache = time.perf_counter(), self._cache
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(cache.store.write_shard(name, number))
                for name in names
                if name in cache.spec.with_arrays
            }
            copies = len(writers) < len(names)
            tar = stack.enter_context(ImageTarWriter(cache.storage, number)) if copies else None
            shard = _Shard(number, writers, tar)
            self._compute(shard)
            new = [] if replace else names
            with cache.manifest.publishing(number, new, partial(self._note_progress, number)):
                files = self._publish(shard, names, replace)
                shard.seconds.totals["wall"] = time.perf_counter() - start
                records = {name: self._record(shard, name, files[name]) for name in names}
                for record in records.values():
                    cache.manifest.commit(record)
        return records

    def _compute(self, shard: _Shard) -> None:
        """All that takes time. The files that it writes have no name yet."""
        progress = partial(self._note_progress, shard.number)
        source_digest = xxhash.xxh3_128()
        first_row = self._cache.spec.shard_rows(shard.number).start
        with Batches(self._computing, shard.writers, shard.seconds, progress) as batches:
            progress()
            for sample in self._decoding.samples(shard.number, shard.writers, shard.seconds):
                progress()
                source_digest.update(sample.data)
                if sample.reason is not None:
                    shard.quarantined.append(sample)
                if shard.tar is not None:
                    data = sample.data if sample.reason is None else None
                    shard.tar.add(self._cache.key(sample.index), data)
                for row, slot in zip(sample.rows, sample.slots, strict=False):
                    batches.add(row - first_row, slot)
            batches.finish()
        shard.moments, shard.source_checksum = batches.moments, source_digest.hexdigest()

    def _publish(
        self, shard: _Shard, names: Collection[str], replace: bool
    ) -> dict[str, dict[str, FileRecord]]:
        """Publish every file but the records; without those, the files do not count."""
        spec, manifest = self._cache.spec, self._cache.manifest
        require_same_images(manifest, spec, shard.number, shard.source_checksum, replaced=names)
        files = {name: writer.publish() for name, writer in shard.writers.items()}
        if shard.tar is not None:
            files[IMAGES] = shard.tar.publish()
        for name, moments in shard.moments.items():
            files[name] |= write_moments(manifest.storage, name, shard.number, moments)
        if shard.quarantined:
            entries = [self._quarantine_entry(sample) for sample in shard.quarantined]
            manifest.write_quarantine(shard.number, entries, shard.source_checksum)
        elif replace and manifest.storage.exists(quarantine_name(shard.number)):
            manifest.storage.remove(quarantine_name(shard.number))
        self._require_cache()
        return files

    def _record(self, shard: _Shard, name: str, files: dict[str, FileRecord]) -> CommitRecord:
        spec = self._cache.spec
        return CommitRecord(
            teacher=name,
            shard=shard.number,
            content_id=spec.shard_content_id(name, shard.number),
            first_row=shard.number * spec.rows_per_shard,
            num_rows=len(spec.shard_rows(shard.number)),
            invalid_rows=tuple(row for sample in shard.quarantined for row in sample.rows),
            files=files,
            source_checksum=shard.source_checksum,
            members=tuple(shard.tar.members) if shard.tar is not None and name == IMAGES else (),
            seconds={stage: round(value, 4) for stage, value in shard.seconds.totals.items()},
            host=platform.node(),
            worker=worker_name(),
            versions=versions(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _quarantine_entry(self, sample: Sample) -> QuarantineEntry:
        path, offset = (self._cache.samples[name][sample.index].as_py() for name in ("path", "offset"))
        return QuarantineEntry(
            sample_index=sample.index,
            key=self._cache.key(sample.index),
            location=f"{path} at {offset}" if offset else path,
            reason=sample.reason,
        )
