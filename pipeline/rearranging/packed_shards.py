"""New shards packed from rows of others, without decoding."""

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial

import numpy as np

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.rearranging.rearrangement import Step
from teachercache.pipeline.records.manifest import CommitRecord, FileRecord, QuarantineEntry
from teachercache.pipeline.records.rows import Ints
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.stores.feature_store import GLOBAL_FEATURE
from teachercache.pipeline.stores.tar_index import ImageTarWriter

_BATCH_NBYTES = 1 << 26


def packed_shards(source: FeatureCache, target: FeatureCache, chosen: Ints) -> Iterator[Step]:
    """Steps that fill `target`, whose sample i is sample `chosen[i]` of `source`."""
    reasons = {entry.sample_index: entry for entry in source.manifest.quarantine()}

    def invalid_rows(teacher: str) -> set[int]:
        """Every view of every sample that could not be decoded."""
        invalid = [row for record in source.commits(teacher).values() for row in record.invalid_rows]
        samples = np.unique(source.index.locate(invalid)[0])
        return set(source.index.rows(samples[:, None], np.arange(source.num_views)).ravel().tolist())

    def pack(teacher: str, shard: int, invalid: set[int], old: Ints) -> None:
        new = target.spec.shard_rows(shard)
        broken = [row for row, from_row in zip(new, old.tolist(), strict=True) if from_row in invalid]
        members: tuple[tuple[int, int], ...] = ()
        if teacher not in target.spec.with_arrays:
            files, members = _write_images(source, target, shard, chosen)
        else:
            files = write_rows(source, target, teacher, shard, old, invalid)
        samples = np.unique(target.index.locate(broken)[0]).tolist()
        entries = [
            entry.model_copy(update={"sample_index": sample})
            for sample in samples
            if (entry := reasons.get(int(chosen[sample]))) is not None
        ]
        if entries:
            target.manifest.write_quarantine(shard, list[QuarantineEntry](entries))
        target.manifest.commit(
            CommitRecord(
                teacher=teacher,
                shard=shard,
                content_id=target.spec.shard_content_id(teacher, shard),
                first_row=new.start,
                num_rows=len(new),
                invalid_rows=tuple(broken),
                files=files,
                source_checksum="",
                members=members,
                seconds={},
                host=platform.node(),
                versions=source.spec.versions,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    for teacher in target.spec.teachers_and_images:
        packed, committed, invalid = target.manifest.committed_shards(teacher), source.commits(teacher), None
        for shard in target.spec.shards(teacher):
            samples, views, _ = target.index.locate(target.spec.shard_rows(shard))
            old = source.index.rows(chosen[samples], views)
            is_row = teacher in target.spec.with_arrays
            needed = old if is_row else source.index.rows(chosen[samples], 0)  # copies are of first views
            if (
                shard in packed
                or not set((needed // source.spec.rows_per_shard).tolist()) <= committed.keys()
            ):
                continue
            invalid = invalid_rows(teacher) if invalid is None else invalid
            yield Step(teacher, shard, partial(pack, teacher, shard, invalid, old))


def write_rows(
    source: FeatureCache, target: FeatureCache, teacher: str, shard: int, old: Ints, invalid: set[int]
) -> dict[str, FileRecord]:
    """Write rows `old` of `source`, except invalid ones, as a shard of `target`, without decoding.

    Of their levels, those whose blocks `target` has.
    """
    shards, old_shards = source.shards[teacher], np.unique(old // source.spec.rows_per_shard).tolist()
    if isinstance(source.storage, LocalStorage):
        for old_shard in old_shards:
            shards.require_sound(old_shard)  # or the new checksum would cover damaged bytes
    else:  # that would fetch them all: a row that is read is compared with its own checksum
        shards.require_ends(old_shards)
    layouts = source.store.layouts(teacher)
    ours, theirs = (_blocks(cache, teacher) for cache in (target, source))
    kept = [level for level, block in enumerate(theirs) if block in ours]
    row_nbytes = sum(layout.row_nbytes for layout in layouts.values())
    valid = np.array([place for place, row in enumerate(old.tolist()) if row not in invalid], np.int64)
    with target.store.write_shard(teacher, shard) as writer:
        for places in np.array_split(valid, max(1, -(-valid.size * row_nbytes // _BATCH_NBYTES))):
            arrays = {name: layout.empty(len(places)) for name, layout in layouts.items()}
            if len(places):
                source.store.read(teacher, old[places], arrays)
                if len(ours) < len(theirs):
                    arrays |= {name: arrays[name][:, kept] for name in arrays if name != GLOBAL_FEATURE}
                writer.write(places.tolist(), arrays)
        return writer.publish()


def _blocks(cache: FeatureCache, teacher: str) -> tuple[int, ...]:
    return () if teacher == IMAGES else cache.spec.teachers[teacher].block_indices


def _write_images(
    source: FeatureCache, target: FeatureCache, shard: int, chosen: Ints
) -> tuple[dict[str, FileRecord], tuple[tuple[int, int], ...]]:
    with ImageTarWriter(target.storage, shard) as tar:
        for sample in target.spec.shard_samples(shard):
            data = source.image_bytes(int(chosen[sample]))
            tar.add(target.key(sample), data or None)  # a quarantined image has no bytes
        return tar.publish(), tuple(tar.members)
