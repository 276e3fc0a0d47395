"""Shards of the same rows: linked within a file system, otherwise copied, or written to another store."""

from contextlib import suppress
from functools import partial

import numpy as np

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.places.durable import link
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.rearranging.packed_shards import write_rows
from teachercache.pipeline.rearranging.rearrangement import Step
from teachercache.pipeline.records.integrity import Depth, Problem, fault, record_problem
from teachercache.pipeline.records.manifest import FileRecord, moments_name, quarantine_name

_BLOCK_NBYTES = 1 << 22


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
