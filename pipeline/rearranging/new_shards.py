"""The shards of a new cache, without decoding: taken over whole, or packed from rows of others.

Whole ones are linked within a file system and otherwise copied, or written to the other kind of store.
"""

import platform
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

import numpy as np

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.places.durable import link
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.rearranging.rearrangement import Step
from teachercache.pipeline.records.integrity import Depth, Problem, fault, record_problem
from teachercache.pipeline.records.manifest import (
    CommitRecord,
    FileRecord,
    QuarantineEntry,
    moments_name,
    quarantine_name,
)
from teachercache.pipeline.records.rows import Ints
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.stores.feature_store import GLOBAL_FEATURE
from teachercache.pipeline.stores.webdataset_store import ImageTarWriter

_BATCH_NBYTES, _BLOCK_NBYTES = 1 << 26, 1 << 22


def whole_shards(source: FeatureCache, target: FeatureCache, shift: int = 0, moved: int = 0) -> list[Step]:
    """Steps that give `target` what it lacks of `source`, `shift` shards and `moved` samples later.

    Arrays are written anew, without decoding, where `target` keeps them in the other kind of store.
    """
    storage, rows_later = source.storage, shift * source.spec.rows_per_shard

    def take_over(teacher: str, shard: int) -> None:
        record, new_shard = source.commits(teacher)[shard], shard + shift
        own, new = source.shards[teacher].files(shard), target.shards[teacher].files(new_shard)
        if (problem := record_problem(record, source.spec, own)) is not None:
            raise problem.error(storage)
        files, links = dict[str, FileRecord](), dict[str, str]()
        if (statistics := moments_name(teacher, shard)) in record.files:
            links[statistics] = moments_name(teacher, new_shard)
        if source.spec.store == target.spec.store or teacher not in source.spec.with_arrays:
            links |= dict(zip(own, new, strict=True))
        else:
            rows = np.array(source.spec.shard_rows(shard), np.int64)
            files = write_rows(source, target, teacher, new_shard, rows, set(record.invalid_rows))
        for name, new_name in links.items():
            link_or_copy(storage, name, record.files[name], target.storage, new_name)
            files[new_name] = record.files[name]
        if storage.exists(quarantine_name(shard)):
            entries = [
                entry.model_copy(update={"sample_index": entry.sample_index + moved})
                for entry in source.manifest.read_quarantine(shard)
            ]
            images = source.manifest.quarantine_source(shard)
            target.manifest.write_quarantine(new_shard, entries, images)
        changes = {
            "shard": new_shard,
            "first_row": record.first_row + rows_later,
            "invalid_rows": tuple(row + rows_later for row in record.invalid_rows),
            "files": files,
        }
        target.manifest.commit(record.model_copy(update=changes))

    def left(teacher: str) -> list[int]:
        there = {shard - shift for shard in target.manifest.committed_shards(teacher)}
        return sorted(source.commits(teacher).keys() - there)

    return [
        Step(name, shard + shift, partial(take_over, name, shard))
        for name in target.spec.teachers_and_images
        for shard in left(name)
    ]


def packed_shards(source: FeatureCache, target: FeatureCache, chosen: Ints) -> Iterator[Step]:
    """Steps that fill `target`, whose sample i is sample `chosen[i]` of `source`."""
    reasons = {entry.sample_index: entry for entry in source.manifest.quarantine()}

    def invalid_rows(teacher: str) -> set[int]:
        """Every view of every sample that could not be decoded."""
        samples = np.unique(source.index.locate(source.shards[teacher].invalid_rows())[0])
        return set(source.index.rows(samples[:, None], np.arange(source.num_views)).ravel().tolist())

    def pack(teacher: str, shard: int, invalid: set[int], old: Ints) -> None:
        new = target.spec.shard_rows(shard)
        broken = [row for row, from_row in zip(new, old.tolist(), strict=True) if from_row in invalid]
        members = list[tuple[int, int]]()
        if teacher in target.spec.with_arrays:
            files = write_rows(source, target, teacher, shard, old, invalid)
        else:
            with ImageTarWriter(target.storage, shard) as tar:
                for sample in target.spec.shard_samples(shard):
                    data = source.image_bytes(int(chosen[sample]))
                    tar.add(target.key(sample), data or None)  # a quarantined image has no bytes
                files, members = tar.publish(), tar.members
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
                members=tuple(members),
                seconds={},
                host=platform.node(),
                versions=source.spec.versions,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    for teacher in target.spec.teachers_and_images:
        packed, committed = target.manifest.committed_shards(teacher), source.commits(teacher).keys()
        invalid = invalid_rows(teacher)
        for shard in target.spec.shards(teacher):
            samples, views, _ = target.index.locate(target.spec.shard_rows(shard))
            old = source.index.rows(chosen[samples], views)
            is_row = teacher in target.spec.with_arrays
            needed = old if is_row else source.index.rows(chosen[samples], 0)  # copies are of first views
            there = set((needed // source.spec.rows_per_shard).tolist()) <= committed
            if shard not in packed and there:
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
    ours, theirs = (
        cache.spec.teachers[teacher].block_indices if teacher != IMAGES else () for cache in (target, source)
    )
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


def link_or_copy(source: Storage, name: str, record: FileRecord, target: Storage, new_name: str) -> None:
    if (reason := fault(source, name, record, Depth.ENDS)) is not None:
        raise Problem(name, reason).error(source)
    if isinstance(source, LocalStorage) and isinstance(target, LocalStorage):
        path = target.path(new_name)
        path.unlink(missing_ok=True)  # without a record it does not exist
        with suppress(OSError):  # on another file system, or one without links
            return link(source.path(name), path)
    with source.open_read(name) as file, target.open_write(new_name) as copy:
        while block := file.read(_BLOCK_NBYTES):
            copy.write(block)
        if copy.checksum != record.checksum:
            reason = fault(source, name, record, Depth.BYTES) or f"{name} changed while it was copied"
            raise Problem(name, reason).error(source)
