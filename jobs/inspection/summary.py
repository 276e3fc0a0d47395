"""What is in a cache, as plain data: what `inspect --json` prints and `tables.py` shows."""

from __future__ import annotations

from typing import Any

from cache_builder.plan import bytes_per_row
from cache_builder.stages import STAGES
from cache_builder.verify import teachers_and_images
from pipeline.cache import FeatureCache


def summarize(cache: FeatureCache) -> dict[str, Any]:
    """Everything that `inspect` shows, as plain data; works on a half-built cache."""
    spec = cache.spec
    return {
        "url": cache.storage.url,
        "cache_id": spec.cache_id,
        "created": spec.created,
        "versions": spec.versions,
        "dataset": spec.dataset.model_dump(mode="json"),
        "views": spec.views.model_dump(mode="json"),
        "rows": spec.num_rows,
        "shards": spec.num_shards,
        "rows_per_shard": spec.rows_per_shard,
        "images": spec.images,
        "teachers": {name: _teacher(cache, name) for name in cache.teachers},
        "committed": {name: len(cache.manifest.committed(name)) for name in teachers_and_images(cache)},
        "quarantined": [entry.model_dump(mode="json") for entry in cache.manifest.quarantine()],
    }


def _teacher(cache: FeatureCache, name: str) -> dict[str, Any]:
    teacher = cache.spec.teachers[name]
    records = cache.commits(name).values()
    seconds = {
        stage: sum(record.seconds.get(stage, 0.0) for record in records) for stage in (*STAGES, "wall")
    }
    return teacher.model_dump(mode="json") | {
        "stored_grid": teacher.stored_grid,
        "bytes_per_row": bytes_per_row(teacher),
        "nbytes": sum(record.nbytes for record in records),
        "rows_committed": sum(record.num_rows for record in records),
        "rows_invalid": sum(len(record.invalid_rows) for record in records),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "hosts": sorted({record.host for record in records}),
        "last_commit": max((record.finished for record in records), default=None),
    }
