"""All records of a shard are of the same images."""

from __future__ import annotations

from collections.abc import Collection

from teachercache.pipeline.errors import CacheError, CacheMismatchError
from teachercache.pipeline.records.manifest import Manifest, commit_name
from teachercache.pipeline.records.spec import IMAGES, CacheSpec


def require_same_images(
    manifest: Manifest, spec: CacheSpec, shard: int, source_checksum: str, replaced: Collection[str] = ()
) -> None:
    """Raises `CacheMismatchError` where a shard's records are of other images.

    What is about to be replaced has a say only where nothing else has: it can be what is broken.
    """
    found: dict[str, str] = {}
    for teacher in (*spec.teachers, IMAGES):
        if not manifest.is_committed(teacher, shard):
            continue
        try:
            record = manifest.read_commit(teacher, shard)
        except CacheError:
            if teacher not in replaced:
                raise
            continue
        if record.source_checksum and (teacher not in replaced or record.mismatch(spec) is None):
            found[teacher] = record.source_checksum
    standing = {teacher: checksum for teacher, checksum in found.items() if teacher not in replaced}
    for teacher, checksum in standing.items() or found.items():
        if checksum != source_checksum:
            raise CacheMismatchError(
                f"The images of shard {shard} are not those that {teacher} was computed from.",
                got=f"images with checksum {source_checksum}",
                expected=f"checksum {checksum}, as in {commit_name(teacher, shard)}",
                do="bring the images back as they were, or delete all commit records of this shard "
                "to compute it again for every teacher",
            )
