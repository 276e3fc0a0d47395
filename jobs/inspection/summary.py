"""What is in a cache and what is wrong with it, as plain data: what `inspect --json` prints.

Reads records, listings and file sizes, never features, and imports no torch: a page of a cache of 15,000
shards takes less time than that import. Nothing that is broken ends it; it becomes one of `problems`.
"""

from __future__ import annotations

import gc
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.remote_storage import RemoteStorage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.manifest import (
    SAMPLES_NAME,
    VIEWS_NAME,
    CommitRecord,
    Manifest,
    QuarantineEntry,
    tables_name,
)
from teachercache.pipeline.records.spec import IMAGES, CacheSpec
from teachercache.pipeline.stores.shard_format import CHECKSUM_NBYTES

_REMOTE_THREADS = 32
_INDEX_ENTRY_NBYTES = 16

Problems = list[str]


class Stored(Protocol):
    """A `FeatureCache` or a `Manifest`."""

    storage: Storage


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
def summarize(cache: Stored) -> dict[str, Any]:
    """Everything that `inspect` shows. Raises `CacheError` only where `cache.json` cannot be read."""
    manifest = Manifest(cache.storage)
    spec = manifest.spec()
    problems: Problems = []
    for name, num_rows in ((SAMPLES_NAME, spec.dataset.num_samples), (VIEWS_NAME, spec.num_rows)):
        problems += _table_problems(manifest.storage, name, num_rows)
    tallies = {name: _tally(manifest, spec, name, problems) for name in spec.teachers_and_images}
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
            | {"bytes_per_row": _bytes_per_row(manifest.storage, spec, name, problems)}
            | tallies[name].facts()
            for name, teacher in spec.teachers.items()
        },
        "committed": {name: tally.shards for name, tally in tallies.items()},
        "planned": {name: len(spec.shards(name)) for name in tallies},
        "quarantined": [entry.model_dump(mode="json") for entry in quarantined(manifest, problems)],
        "problems": problems,
    }


@dataclass
class _Tally:
    """Sums over the commit records of one teacher."""

    shards: int = 0
    rows: int = 0
    invalid_rows: int = 0
    nbytes: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    hosts: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[float, float]] = field(default_factory=list)
    last_commit: str | None = None

    def add(self, record: CommitRecord) -> None:
        self.shards += 1
        self.rows += record.num_rows
        self.invalid_rows += len(record.invalid_rows)
        self.nbytes += record.nbytes
        for stage, seconds in record.seconds.items():
            self.seconds[stage] += seconds
        self.hosts[record.host] += 1
        self.last_commit = max(record.finished, self.last_commit or "")
        if span := shard_span(record):
            self.spans.append(span)

    def facts(self) -> dict[str, Any]:
        busy_s = covered(self.spans)
        return {
            "nbytes": self.nbytes,
            "rows_committed": self.rows,
            "rows_invalid": self.invalid_rows,
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "busy_s": round(busy_s, 2),
            "rows_per_s": round(self.rows / busy_s, 3) if busy_s else None,
            "hosts": dict(self.hosts.most_common()),
            "last_commit": self.last_commit,
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


def _tally(manifest: Manifest, spec: CacheSpec, teacher: str, problems: Problems) -> _Tally:
    tally = _Tally()
    if teacher in spec.teachers and (tables_hash := spec.teachers[teacher].tables_hash):
        problems += _tables_problems(manifest.storage, teacher, tables_hash)
    num_shards, size = spec.num_shards, _size_of(manifest.storage, teacher)  # they take time
    for shard, record in records(manifest, teacher):
        if isinstance(record, str):
            problems.append(record)
        elif shard >= num_shards or record.content_id != spec.shard_content_id(teacher, shard):
            problems.append(f"{teacher} shard {shard}: {record.mismatch(spec)}")
        else:
            tally.add(record)
            problems += file_problems(size, record)
    return tally


def _size_of(storage: Storage, teacher: str) -> Callable[[str], int | None]:
    """Bytes of a file by its name. On an object store listings have them all; each alone is a request."""
    if not isinstance(storage, RemoteStorage):
        return storage.size
    folders = [IMAGES] if teacher == IMAGES else [f"teachers/{teacher}", f"stats/{teacher}"]
    return {name: size for folder in folders for name, size in storage.sizes(folder).items()}.get


def records(manifest: Manifest, teacher: str) -> Iterator[tuple[int, CommitRecord | str]]:
    """(shard, its record, or why there is none) of every committed shard, in order."""

    def read(shard: int) -> tuple[int, CommitRecord | str]:
        try:
            return shard, manifest.read_commit(teacher, shard)
        except (CacheError, OSError) as error:
            return shard, describe(error)

    shards = sorted(manifest.committed_shards(teacher))
    if isinstance(manifest.storage, LocalStorage):  # threads would only wait for each other
        yield from map(read, shards)
    else:
        with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
            yield from pool.map(read, shards)


def file_problems(size_of: Callable[[str], int | None], record: CommitRecord) -> Problems:
    """Files of a record that are missing or of another size."""
    problems = []
    for path, file in record.files.items():
        try:
            size = size_of(path)
        except CacheError as error:
            problems.append(f"{record.teacher} shard {record.shard}: {path}: {describe(error)}")
            continue
        if size != file.nbytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            problems.append(f"{path} {found}, expected {file.nbytes:,}")
    return problems


def array_metadata(storage: Storage, spec: CacheSpec, teacher: str) -> dict[str, dict[str, Any]]:
    """What a teacher's `zarr.json` (or `teacher.json`) say of its arrays. Raises `OSError`, `ValueError`."""
    folder = f"teachers/{teacher}"
    if spec.store == "webdataset":
        described = json.loads(storage.read(f"{folder}/teacher.json"))["arrays"]
        return {
            name: {
                "shape": [spec.num_rows, *array["shape"]],
                "data_type": array["dtype"],
                "attributes": array["attributes"],
            }
            for name, array in described.items()
        }
    arrays = [name for name in storage.names(folder) if name.isidentifier()]  # no file that others leave
    if not arrays:
        raise FileNotFoundError(f"{folder} holds no array")
    return {array: json.loads(storage.read(f"{folder}/{array}/zarr.json")) for array in arrays}


def quarantined(manifest: Manifest, problems: Problems) -> list[QuarantineEntry]:
    """Every quarantined sample; a list that cannot be read is one of `problems`."""
    entries = _attempt(manifest.quarantine, problems, default=list[QuarantineEntry]())
    return list({entry.sample_index: entry for entry in entries}.values())  # each segment has its own


def describe(error: Exception) -> str:
    """One line."""
    text = error.problem if isinstance(error, CacheError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0]


def _bytes_per_row(storage: Storage, spec: CacheSpec, teacher: str, problems: Problems) -> int | None:
    """Bytes on disk of one row, checksums and index included, as the arrays' own metadata states it."""

    def total() -> int:
        return sum(
            math.prod(array["shape"][1:]) * np.dtype(array["data_type"]).itemsize
            + CHECKSUM_NBYTES
            + _INDEX_ENTRY_NBYTES
            for array in array_metadata(storage, spec, teacher).values()
        )

    about = f"teachers/{teacher} cannot be understood: "
    found: int | None = _attempt(total, problems, default=None, about=about)
    return found


def _attempt(read: Callable[[], Any], problems: Problems, default: Any, about: str = "") -> Any:
    try:
        return read()
    except (CacheError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems.append(about + describe(error))
        return default


def _table_problems(storage: Storage, name: str, num_rows: int) -> Problems:
    try:
        with storage.open_read(name) as file:
            found = pq.ParquetFile(file).metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        return [f"{name} cannot be read: {describe(error)}"]
    return [] if found >= num_rows else [f"{name} has {found:,} lines, expected {num_rows:,}"]


def _tables_problems(storage: Storage, teacher: str, tables_hash: str) -> Problems:
    name = tables_name(teacher)
    try:
        found = storage.checksum(name)
    except OSError:
        return [f"{name} is missing; the codes of {teacher} cannot be decoded without it"]
    return [] if found == tables_hash else [f"{name} is not what {teacher} was encoded with"]
