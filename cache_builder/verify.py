"""Is every committed shard what its commit record says?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.cache import FeatureCache
from pipeline.errors import CacheError
from pipeline.manifest import CommitRecord
from pipeline.spec import IMAGES


@dataclass(frozen=True)
class Problem:
    """One shard that cannot be trusted, and why."""

    teacher: str
    shard: int
    reason: str


def verify(
    cache: FeatureCache, *, full: bool = False, progress: Callable[[], None] = lambda: None
) -> list[Problem]:
    """Check every commit record against its files: sizes, and with `full` every byte by its checksum.

    `progress` is called after each shard. Shards that are not committed are no problem; they do not
    exist. Returns the problems, in order of teachers and shards.
    """
    problems = []
    for teacher in teachers_and_images(cache):
        for shard in sorted(cache.manifest.committed(teacher)):
            try:
                record = cache.manifest.read_commit(teacher, shard)
                problems += [Problem(teacher, shard, reason) for reason in _reasons(cache, record, full)]
            except CacheError as error:
                problems.append(Problem(teacher, shard, str(error)))
            progress()
    return problems


def teachers_and_images(cache: FeatureCache) -> Sequence[str]:
    return [*cache.teachers, *([IMAGES] if cache.spec.images == "copy" else [])]


def _reasons(cache: FeatureCache, record: CommitRecord, full: bool) -> list[str]:
    if record.shard >= cache.spec.num_shards:
        return [f"shard {record.shard} does not exist in a cache of {cache.spec.num_shards} shards"]
    expected = cache.spec.content_id(record.teacher)
    if record.content_id != expected:
        return [f"was computed for another spec: content id {record.content_id}, expected {expected}"]
    reasons = []
    for name, file in record.files.items():
        size = cache.storage.size(name)
        if size is None:
            reasons.append(f"{name} is missing")
        elif size != file.nbytes:
            reasons.append(f"{name} has {size} bytes, expected {file.nbytes}")
        elif full and (checksum := cache.storage.checksum(name)) != file.checksum:
            reasons.append(f"{name} has checksum {checksum}, expected {file.checksum}")
    return reasons
