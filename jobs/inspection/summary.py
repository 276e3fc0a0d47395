"""What is in a cache and what is wrong with it, as plain data: what `inspect --json` prints.

Reads records, listings and file sizes, never features, and imports no torch: a page of a cache of 15,000
shards takes less time than that import. Nothing that is broken ends it; it becomes one of `problems`.
"""

import gc
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from teachercache.pipeline.errors import CacheError, in_a_line
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.integrity import Depth, check_shards, quarantine, table_problems
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.stores.feature_store import FeatureStore
from teachercache.pipeline.stores.open_store import open_store
from teachercache.pipeline.stores.shard_format import disk_nbytes


@contextmanager
def _uncollected() -> Iterator[None]:
    """Records hold no cycles; looking for some among 15,000 of them took half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def summarize(storage: Storage) -> dict[str, Any]:
    """All that `inspect` shows of a cache. Raises `CacheError` only where `cache.json` cannot be read."""
    manifest = Manifest(storage)
    spec = manifest.spec()
    store = open_store(manifest.storage, spec)
    found = table_problems(manifest, spec)
    records: dict[str, list[CommitRecord]] = {name: [] for name in spec.teachers_and_images}
    for checked in check_shards(manifest, spec, Depth.SIZES):
        found += checked.problems
        if checked.record is not None:
            records[checked.teacher].append(checked.record.model_copy(update={"members": ()}))  # many
    entries, unreadable = quarantine(manifest)
    problems = [problem.reason for problem in (*found, *unreadable)]
    return {
        "url": manifest.storage.url,
        "cache_id": spec.cache_id,
        "created": spec.created,
        "versions": spec.versions,
        "dataset": spec.dataset.model_dump(mode="json"),
        "views": spec.views.model_dump(mode="json"),
        "rows": spec.num_rows,
        "shards": spec.num_shards,
        "rows_per_shard": spec.rows_per_shard,
        "images": spec.images,
        "teachers": {
            name: teacher.model_dump(mode="json")
            | {"stored_grid": teacher.stored_grid, "fidelity": spec.fidelity.get(name)}
            | {"bytes_per_row": _bytes_per_row(store, name, records[name], problems)}
            | _facts(records[name])
            for name, teacher in spec.teachers.items()
        },
        "committed": {name: len(of_it) for name, of_it in records.items()},
        "planned": {name: len(spec.shards(name)) for name in records},
        "quarantined": [entry.model_dump(mode="json") for entry in entries],
        "problems": problems,
    }


def _facts(records: Sequence[CommitRecord]) -> dict[str, Any]:
    """Sums over the commit records of one teacher."""
    rows = sum(record.num_rows for record in records)
    busy_s = covered(span for record in records if (span := shard_span(record)))
    seconds = Counter[str]()
    for record in records:
        seconds.update(record.seconds)
    return {
        "nbytes": sum(record.nbytes for record in records),
        "rows_committed": rows,
        "rows_invalid": sum(len(record.invalid_rows) for record in records),
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "busy_s": round(busy_s, 2),
        "rows_per_s": round(rows / busy_s, 3) if busy_s else None,
        "hosts": dict(Counter(record.host for record in records).most_common()),
        "last_commit": max((record.finished for record in records), default=None),
    }


def shard_span(record: CommitRecord) -> tuple[float, float] | None:
    """When a shard was begun and finished (Unix seconds), where its record says so."""
    try:
        end = datetime.fromisoformat(record.finished).timestamp()
    except ValueError:
        return None
    return end - record.seconds.get("wall", 0.0), end


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in at least one of these (start, end): the time in which something was under way."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _bytes_per_row(
    store: FeatureStore, teacher: str, records: Sequence[CommitRecord], problems: list[str]
) -> int | None:
    """Bytes on disk of one row, checksums and index included, as the arrays' own metadata states it; of
    compressed rows their mean, statistics included."""
    try:
        nbytes = disk_nbytes(store.stored_layouts(teacher).values())
    except CacheError as error:
        problems.append(in_a_line(error))
        return None
    held = sum(record.num_rows - len(record.invalid_rows) for record in records)
    return sum(record.nbytes for record in records) // held if store.spec.compressor and held else nbytes
