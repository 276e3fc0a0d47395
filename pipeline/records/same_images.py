"""All records of a shard come from the same images."""

from __future__ import annotations

from collections.abc import Collection

from teachercache.pipeline.errors import CacheError, CacheMismatchError
from teachercache.pipeline.records.manifest import Manifest, commit_name
from teachercache.pipeline.records.spec import IMAGES, CacheSpec


def require_same_images(
    manifest: Manifest, spec: CacheSpec, shard: int, source_checksum: str, replaced: Collection[str] = ()
) -> None:
    """Raises `CacheMismatchError` where a shard's records come from other images.

    Records about to be replaced count only where there are no others, since they may be the broken ones.
    """
    checksums: dict[str, str] = {}
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
            checksums[teacher] = record.source_checksum
    kept = {teacher: checksum for teacher, checksum in checksums.items() if teacher not in replaced}
    for teacher, checksum in kept.items() or checksums.items():
        if checksum != source_checksum:
            raise CacheMismatchError(
                f"The images of shard {shard} are not those that {teacher} was computed from.",
                got=f"images with checksum {source_checksum}",
                expected=f"checksum {checksum}, as in {commit_name(teacher, shard)}",
                do="restore the images as they were, or delete all commit records of this shard to compute "
                "it again for every teacher",
            )
