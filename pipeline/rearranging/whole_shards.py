"""Shards that only change their numbers: linked within a file system, otherwise copied."""

from collections.abc import Iterator
from functools import partial

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.places.durable import link
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.rearranging.rearrangement import Step
from teachercache.pipeline.records.integrity import Depth, Problem, fault
from teachercache.pipeline.records.manifest import (
    CommitRecord,
    FileRecord,
    commit_name,
    moments_name,
    quarantine_name,
)

_BLOCK_NBYTES = 1 << 22


def missing(source: FeatureCache, target: FeatureCache, shift: int = 0) -> Iterator[tuple[str, int]]:
    """(teacher, shard) that `source` has committed and `target` has not; it adds `shift` to its number."""
    for name in target.spec.teachers_and_images:
        committed = target.manifest.committed_shards(name)
        yield from ((name, shard) for shard in sorted(source.commits(name)) if shard + shift not in committed)


def whole_shards(source: FeatureCache, target: FeatureCache, shift: int, first_sample: int = 0) -> list[Step]:
    """Steps that give `target` the shards of `source` under numbers greater by `shift`."""

    def names(cache: FeatureCache, teacher: str, shard: int, record: CommitRecord) -> list[str]:
        files = cache.shards[teacher].files(shard)
        has_statistics = any(name.startswith("stats/") for name in record.files)
        return [*files, moments_name(teacher, shard)] if has_statistics else files

    def take_over(teacher: str, shard: int) -> None:
        record, new_shard = source.commits(teacher)[shard], shard + shift
        old, new = names(source, teacher, shard, record), names(target, teacher, new_shard, record)
        if set(record.files) != set(old):
            name = commit_name(teacher, shard)
            raise Problem(name, f"{name} names {sorted(record.files)}, expected {old}").error(source.storage)
        for name, new_name in zip(old, new, strict=True):
            link_or_copy(source.storage, name, record.files[name], target.storage, new_name)
        take_over_quarantine(source, target, shard, new_shard, first_sample)
        rows = shift * source.spec.rows_per_shard
        target.manifest.commit(
            record.model_copy(
                update={
                    "shard": new_shard,
                    "first_row": record.first_row + rows,
                    "invalid_rows": tuple(row + rows for row in record.invalid_rows),
                    "files": {new_name: record.files[name] for name, new_name in zip(old, new, strict=True)},
                }
            )
        )

    return [
        Step(name, shard + shift, partial(take_over, name, shard))
        for name, shard in missing(source, target, shift)
    ]


def take_over_quarantine(
    source: FeatureCache, target: FeatureCache, shard: int, new_shard: int, first_sample: int
) -> None:
    if source.storage.exists(quarantine_name(shard)):
        entries = [
            entry.model_copy(update={"sample_index": entry.sample_index + first_sample})
            for entry in source.manifest.read_quarantine(shard)
        ]
        target.manifest.write_quarantine(new_shard, entries, source.manifest.quarantine_source(shard))


def link_or_copy(source: Storage, name: str, record: FileRecord, target: Storage, new_name: str) -> None:
    if (reason := fault(source, name, record, Depth.ENDS)) is not None:
        raise Problem(name, reason).error(source)
    if isinstance(source, LocalStorage) and isinstance(target, LocalStorage):
        path = target.path(new_name)
        path.unlink(missing_ok=True)  # without a record it does not exist
        try:
            link(source.path(name), path)
        except OSError:
            _copy(source, name, record, target, new_name)  # on another file system, or one without links
    else:
        _copy(source, name, record, target, new_name)


def _copy(source: Storage, name: str, record: FileRecord, target: Storage, new_name: str) -> None:
    with source.open_read(name) as file, target.open_write(new_name) as copy:
        while block := file.read(_BLOCK_NBYTES):
            copy.write(block)
        if copy.checksum != record.checksum:
            reason = fault(source, name, record, Depth.BYTES) or f"{name} changed while it was copied"
            raise Problem(name, reason).error(source)
