"""Is every file of a cache what was written? docs/operations.md lists by what each is known.

The zarr.json files above the teachers' may be missing: older caches have none.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheError, in_a_line
from teachercache.pipeline.places.hub_storage import BESIDE
from teachercache.pipeline.places.locks import LOCK_SUFFIX
from teachercache.pipeline.places.processes import TEMPORARY_SUFFIX, is_abandoned, is_stale
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.integrity import Depth, Problem, check_shards, table_problems
from teachercache.pipeline.records.manifest import (
    RESTORE_TABLES,
    SAMPLES_NAME,
    SPEC_NAME,
    VIEWS_NAME,
    commit_name,
    quarantine_name,
    tables_name,
)
from teachercache.pipeline.records.tables import segment_lines
from teachercache.pipeline.views import draw_segment

_ROUNDED_OTHERWISE = 1e-3  # share of values


def verify(
    cache: FeatureCache, *, full: bool = False, progress: Callable[[], None] = lambda: None
) -> list[Problem]:
    """Check every file of a cache; with `full` every byte of it, else sizes and the small files.

    What is checked is the cache as it is now, whatever it was when it was opened. Builds may go on: what
    differs is looked at again, by what `cache.json` and the records say then, before it is a problem.

    `progress` is called after each committed shard. Shards that are not committed are not a problem; they do
    not exist. Returns the problems of shards in order of teachers and shards, then those of other files.
    """
    cache = cache.reopened()
    problems = [*problems_of_shards(cache, full, progress=progress), *_problems_of_the_rest(cache, full)]
    if problems:
        cache = cache.reopened()
        shards = {problem.shard for problem in problems if problem.shard is not None}
        problems = [*problems_of_shards(cache, full, shards), *_problems_of_the_rest(cache, full)]
    return problems


def problems_of_shards(
    cache: FeatureCache,
    full: bool,
    shards: Collection[int] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Of these committed shards, or all, of every teacher: records, files and quarantine lists."""
    problems: list[Problem] = []
    images: dict[int, dict[str, str]] = defaultdict(dict)
    invalid: dict[int, set[int]] = {
        shard: set() for shard in cache.manifest.quarantined() if shards is None or shard in shards
    }
    depth = Depth.BYTES if full else Depth.ENDS
    for checked in check_shards(
        cache.manifest, cache.spec, depth, shards, lambda teacher, shard: cache.shards[teacher].files(shard)
    ):
        problems += checked.problems
        if (record := checked.record) is not None:
            if record.invalid_rows:
                invalid.setdefault(record.shard, set()).update(record.invalid_rows)
            if record.source_checksum:
                images[record.shard][record.teacher] = record.source_checksum
        progress()
    for shard, checksums in sorted(images.items()):
        if len(set(checksums.values())) > 1:  # which of them is right, no record tells
            stated = ", ".join(f"{teacher}: {checksum}" for teacher, checksum in checksums.items())
            for teacher in checksums:
                name = commit_name(teacher, shard)
                reason = f"{name} and the shard's other records are of different images: {stated}"
                problems.append(Problem(name, reason, teacher, shard))
    for shard, rows in sorted(invalid.items()):
        problems += quarantine_problems(cache, shard, rows, set(images[shard].values()))
    return problems


def _problems_of_the_rest(cache: FeatureCache, full: bool) -> list[Problem]:
    tables = table_problems(cache.manifest, cache.spec)
    contents = _content_problems(cache, {problem.file for problem in tables}) if full else []
    return _layout_problems(cache) + tables + contents


def quarantine_problems(
    cache: FeatureCache, shard: int, invalid_rows: Collection[int], images: Collection[str]
) -> list[Problem]:
    """Of the list that gives the reasons for a shard's invalid rows; `images`: checksums in its records."""
    name = quarantine_name(shard)
    try:
        listed = {entry.sample_index for entry in cache.manifest.read_quarantine(shard)}
        source = cache.manifest.quarantine_source(shard)
        invalid = set(cache.index.locate(sorted(invalid_rows))[0].tolist())
        reason = None
        if missing := invalid - listed:
            reason = f"{name} does not name sample {min(missing)}"
        elif images and (listed - invalid or source not in (None, *images)):
            reason = f"{name} is not of the images that the shard's records are of"
    except (CacheError, FileNotFoundError) as error:
        reason = in_a_line(error)
    return [] if reason is None else [Problem(name, reason, shard=shard)]


def _layout_problems(cache: FeatureCache) -> list[Problem]:
    """Of the teachers' zarr.json files and of those above them, which follow from the spec."""
    problems = []
    for teacher in (*cache.spec.with_arrays, None):
        for name, expected in cache.store.layout_files(teacher).items():
            found = cache.storage.read(name) if cache.storage.exists(name) else None
            if found != expected and (found, teacher) != (None, None):
                what = "is missing" if found is None else f"is not what follows from {SPEC_NAME}"
                problems.append(Problem(name, f"{name} {what}", teacher=teacher))
    return problems


def _content_problems(cache: FeatureCache, known: Collection[str]) -> list[Problem]:
    """Of what the tables say, but those that are known to be broken."""
    checks: dict[str, Callable[[], object]] = {
        SAMPLES_NAME: lambda: cache.manifest.samples(cache.spec),
        VIEWS_NAME: partial(_require_drawn_views, cache),
    }
    for name, teacher in cache.spec.teachers.items():
        if get_codec(teacher.codec).needs_tables:
            checks[tables_name(name)] = cache.features[name].load_codec
    problems = []
    for name, check in checks.items():
        if name in known:
            continue
        try:
            check()
        except CacheError as error:
            do = RESTORE_TABLES if name not in (SAMPLES_NAME, VIEWS_NAME) else None
            problems.append(Problem(name, in_a_line(error), do=do))
    return problems


def _require_drawn_views(cache: FeatureCache) -> None:
    """Of segments whose hash is not stated, by drawing them again: a float may be rounded otherwise here."""
    views = cache.manifest.views(cache.spec)
    for segment, lines in segment_lines(cache.spec, views):
        if segment.views_hash is None:
            drawn = draw_segment(cache.spec.views, segment, cache.samples)
            for name in lines.schema.names:
                one, other = (table[name].to_numpy() for table in (lines, drawn))
                if np.mean(one != other) > _ROUNDED_OTHERWISE:
                    raise CacheError(
                        f"{VIEWS_NAME}: {name} is not what the view policy draws for these samples."
                    )


def _in_use(storage: Storage, name: str) -> bool:
    """Whether this is a temporary file or a lock of a process that may be alive."""
    if name.endswith(TEMPORARY_SUFFIX):
        return not is_abandoned(Path(name), 0.0)
    try:
        return name.endswith(LOCK_SUFFIX) and not is_stale(storage.read(name), 0.0)
    except FileNotFoundError:
        return True


def strays(cache: FeatureCache) -> list[str]:
    """Files that nothing names: of shards without a record, of processes that died, of other programs.

    Those still being written are left out.

    They are listed first, so that files which a build names meanwhile are not reported.
    """
    found = [name for name, _ in cache.storage.walk() if not _in_use(cache.storage, name)]
    cache = cache.reopened()
    known = {SPEC_NAME, SAMPLES_NAME, VIEWS_NAME, *BESIDE, *cache.store.layout_files(None)}
    for teacher in cache.spec.with_arrays:
        known |= {tables_name(teacher), *cache.store.layout_files(teacher)}
    for teacher in cache.spec.teachers_and_images:
        for shard, record in cache.manifest.commits(teacher).items():
            known |= {commit_name(teacher, shard), *record.files}
    known |= {quarantine_name(shard) for shard in cache.manifest.quarantined()}
    return [name for name in found if name not in known]
