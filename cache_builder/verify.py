"""Is every file of a cache what was written? What each file must be is stated elsewhere:

shards, image tars      size and checksum in their commit records
commit records          a checksum in themselves, the cache's content ids and row numbers
sample and view table   a checksum in themselves, the fingerprint and the row numbers of the cache
zarr.json               follows from the spec
codec tables            a checksum in the spec
quarantine lists        a checksum in themselves, the invalid rows of the records
cache.json              a checksum in itself; without it there is no cache to open
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.cache import FeatureCache
from pipeline.codecs import get_codec
from pipeline.errors import CacheError
from pipeline.manifest import (
    SAMPLES_NAME,
    SPEC_NAME,
    VIEWS_NAME,
    CommitRecord,
    commit_name,
    quarantine_name,
    tables_name,
)
from pipeline.sources import dataset_fingerprint
from pipeline.spec import IMAGES
from pipeline.storage import TEMPORARY_SUFFIX, RemoteStorage
from pipeline.stores.zarr_store import ZarrStore

_THREADS = 8  # waiting for disks and object stores; hashing releases the GIL


@dataclass(frozen=True)
class Problem:
    """A file that cannot be trusted, and why.

    `teacher` (or "images") and `shard` say what it belongs to: both for a shard and its record, the shard
    alone for a quarantine list, the teacher alone for the layout of its arrays, neither for the tables.
    """

    file: str
    reason: str
    teacher: str | None = None
    shard: int | None = None


def verify(
    cache: FeatureCache, *, full: bool = False, progress: Callable[[], None] = lambda: None
) -> list[Problem]:
    """Check every file of a cache; with `full` every byte of it, else sizes and the small files.

    `progress` is called after each committed shard. Shards that are not committed are no problem; they do
    not exist. Returns the problems of shards in order of teachers and shards, then those of other files.
    """
    problems: list[Problem] = []
    invalid: dict[int, set[int]] = {shard: set() for shard in cache.manifest.quarantined()}
    with ThreadPoolExecutor(_THREADS) as pool:
        checks = [
            pool.submit(_check_shard, cache, teacher, shard, full)
            for teacher in teachers_and_images(cache)
            for shard in sorted(cache.manifest.committed(teacher))
        ]
        for check in checks:
            found, record = check.result()
            problems += found
            if record is not None and record.invalid_rows:
                invalid.setdefault(record.shard, set()).update(record.invalid_rows)
            progress()
    for shard, rows in sorted(invalid.items()):
        problems += quarantine_problems(cache, shard, rows)
    for teacher in cache.teachers:
        problems += layout_problems(cache, teacher)
    return problems + table_problems(cache, full)


def teachers_and_images(cache: FeatureCache) -> Sequence[str]:
    return [*cache.teachers, *([IMAGES] if cache.spec.images == "copy" else [])]


def shard_problems(cache: FeatureCache, teacher: str, shard: int, full: bool) -> list[Problem]:
    """Of one committed shard: its record, and the files that it names."""
    return _check_shard(cache, teacher, shard, full)[0]


def _check_shard(
    cache: FeatureCache, teacher: str, shard: int, full: bool
) -> tuple[list[Problem], CommitRecord | None]:
    problem = partial(Problem, teacher=teacher, shard=shard)
    name = commit_name(teacher, shard)
    try:
        record = cache.manifest.read_commit(teacher, shard)
        if (mismatch := record.mismatch(cache.spec)) is not None:
            return [problem(name, f"{name} {mismatch}")], None
        wrong = [(file, f"{name}: {file} {reason}") for file, reason in _wrong_files(cache, record, full)]
    except (CacheError, FileNotFoundError) as error:
        return [problem(name, str(error))], None
    return [problem(*pair) for pair in wrong], record


def _wrong_files(cache: FeatureCache, record: CommitRecord, full: bool) -> Iterator[tuple[str, str]]:
    for name, file in record.files.items():
        size = cache.storage.size(name)
        if size is None:
            yield name, "is missing"
        elif size != file.nbytes:
            yield name, f"has {size} bytes, expected {file.nbytes}"
        elif full and (checksum := cache.storage.checksum(name)) != file.checksum:
            yield name, f"has checksum {checksum}, expected {file.checksum}"


def quarantine_problems(cache: FeatureCache, shard: int, invalid_rows: Collection[int]) -> list[Problem]:
    """Of the list that gives the reasons for a shard's invalid rows."""
    name = quarantine_name(shard)
    try:
        listed = {entry.sample_index for entry in cache.manifest.read_quarantine(shard)}
        missing = set(cache.index.locate(sorted(invalid_rows))[0].tolist()) - listed
        reason = f"{name} does not name sample {min(missing)}" if missing else None
    except (CacheError, FileNotFoundError) as error:
        reason = str(error)
    return [] if reason is None else [Problem(name, reason, shard=shard)]


def layout_problems(cache: FeatureCache, teacher: str) -> list[Problem]:
    """Of a teacher's zarr.json files, which follow from the spec."""
    problems = []
    for name, expected in _layout(cache, teacher).items():
        try:
            found = cache.storage.read(name)
        except FileNotFoundError:
            problems.append(Problem(name, f"{name} is missing", teacher=teacher))
            continue
        if found != expected:
            problems.append(Problem(name, f"{name} is not what follows from {SPEC_NAME}", teacher=teacher))
    return problems


def _layout(cache: FeatureCache, teacher: str) -> dict[str, bytes]:
    scratch = RemoteStorage(f"memory://{uuid.uuid4().hex}")
    ZarrStore(scratch).create(cache.spec, teacher)
    files = {name: scratch.read(name) for name, _ in scratch.walk()}
    scratch.filesystem.rm(scratch.url, recursive=True)
    return files


def table_problems(cache: FeatureCache, full: bool) -> list[Problem]:
    """Of the sample table, the view table and the codecs' tables."""
    checks = {SAMPLES_NAME: _check_samples, VIEWS_NAME: _check_views}
    for name, teacher in cache.spec.teachers.items():
        if get_codec(teacher.codec).needs_tables:
            checks[tables_name(name)] = partial(_check_codec_tables, teacher=name)
    problems = []
    for name, check in checks.items():
        reason = None if cache.storage.exists(name) else f"{name} is missing"
        if full and reason is None:
            try:
                reason = check(cache)
            except CacheError as error:
                reason = str(error)
        if reason is not None:
            problems.append(Problem(name, reason))
    return problems


def _check_samples(cache: FeatureCache) -> str | None:
    samples, dataset = cache.manifest.samples(), cache.spec.dataset
    if samples.num_rows != dataset.num_samples:
        return f"{SAMPLES_NAME} has {samples.num_rows} lines, expected {dataset.num_samples}"
    if dataset_fingerprint(samples) != dataset.fingerprint:
        return f"{SAMPLES_NAME} has another fingerprint than {SPEC_NAME}"
    return None


def _check_views(cache: FeatureCache) -> str | None:
    views = cache.manifest.views()
    if views.num_rows != cache.num_rows:
        return f"{VIEWS_NAME} has {views.num_rows} lines, expected {cache.num_rows}"
    for segment in cache.spec.segments:
        rows = np.arange(segment.first_row, segment.first_row + segment.num_rows)
        samples, numbers, lines = cache.index.locate(rows)
        for column, expected in (("sample_index", samples), ("view_index", numbers)):
            if not np.array_equal(views[column].to_numpy()[lines], expected):
                return f"{VIEWS_NAME}: {column} is not in the order of the rows"
    return None


def _check_codec_tables(cache: FeatureCache, teacher: str) -> None:
    cache.manifest.tables(teacher, cache.spec.teachers[teacher].tables_hash)


def strays(cache: FeatureCache) -> list[str]:
    """Files that nothing names: of shards without a record, say. Those still being written are left out."""
    known = {SPEC_NAME, SAMPLES_NAME, VIEWS_NAME}
    for teacher in cache.teachers:
        known |= {tables_name(teacher), *_layout(cache, teacher)}
    for teacher in teachers_and_images(cache):
        for shard, record in cache.manifest.commits(teacher).items():
            known |= {commit_name(teacher, shard), *record.files}
    known |= {quarantine_name(shard) for shard in cache.manifest.quarantined()}
    return [
        name for name, _ in cache.storage.walk() if name not in known and not name.endswith(TEMPORARY_SUFFIX)
    ]
