"""Recompute exactly what is broken, and nothing else.

A broken shard is replaced once it has been extracted again: its sound parts can be read until then, and stay
if the images are gone or have changed. The spec determines array layouts; the images and the view policy
determine the tables. Nothing determines `cache.json` and the codecs' tables; they are only reported.
"""

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from teachercache.cache_builder.build_recipe import RunnerRecipe, with_checkpoints
from teachercache.cache_builder.runner import describe
from teachercache.cache_builder.worker import Worker
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheMismatchError, TeacherCacheError
from teachercache.pipeline.records.integrity import Problem
from teachercache.pipeline.records.manifest import SAMPLES_NAME, SPEC_NAME, VIEWS_NAME, commit_name
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.records.tables import dataset_fingerprint, labels_hash, views_hash
from teachercache.pipeline.verify import problems_of_shards, verify
from teachercache.pipeline.views import draw_segment


@dataclass(frozen=True)
class Repaired:
    """The problems that were mended, and those that are left, each with its reason."""

    mended: list[Problem]
    left: list[Problem]


def repair(
    cache: FeatureCache,
    runner: RunnerRecipe | None = None,
    progress: Callable[[], None] = lambda: None,
    checkpoints: Mapping[str, str] | None = None,
) -> Repaired:
    """Verify every byte of a cache, and mend what differs. Sound shards stay untouched.

    Rows are bitwise the same again if the device, the library versions and `runner.batch_size` are those
    of the build. `progress` is called after each verified shard. `checkpoints`: weights that moved since the
    build, by teacher. Builds may run at the same time, and the cache may have grown since it was opened.
    """
    checkpoints = checkpoints or {}
    with_checkpoints(cache.spec, checkpoints)  # raises for a wrong name before reading everything
    cache.storage.sweep()
    problems = verify(cache, full=True, progress=progress)
    reasons: dict[Problem, str] = {}
    for problem in sorted(problems, key=lambda one: one.file != SAMPLES_NAME):  # views are drawn for samples
        if problem.shard is not None:
            continue
        try:
            _rebuild(cache, problem)
        except (TeacherCacheError, OSError) as error:
            reasons[problem] = describe(error)
    broken = [problem for problem in problems if problem.shard is not None]
    failed = _extract(cache, broken, runner or RunnerRecipe(), checkpoints)
    reasons |= {problem: failed[problem.shard] for problem in broken if problem.shard in failed}
    cache.storage.sweep()  # remove files of processes that died
    return Repaired(
        mended=[problem for problem in problems if problem not in reasons],
        left=[replace(problem, reason=reason) for problem, reason in reasons.items()],
    )


def _rebuild(cache: FeatureCache, problem: Problem) -> None:
    """Make a file again for the cache as it is now, and not while a build extends it."""
    while True:
        cache = cache.reopened()
        tables = _tables(cache, problem)  # may take longer than a lock may be held
        with cache.storage.exclusive(SPEC_NAME):
            if cache.manifest.spec() != cache.spec:
                continue
            if tables is None:
                cache.store.create(problem.teacher)
            else:
                cache.manifest.write_table(problem.file, tables)
            return


def _tables(cache: FeatureCache, problem: Problem) -> pa.Table | None:
    if problem.teacher is not None or problem.file in cache.store.layout_files(None):
        return None
    if problem.file == SAMPLES_NAME:
        return _scan(cache)
    if problem.file == VIEWS_NAME:
        return _draw(cache, cache.samples)
    raise CacheMismatchError(
        f"{problem.file} cannot be made again.",
        got=problem.reason,
        expected="the tables that the features were encoded with",
        do="restore it from a copy, or build the teacher again under another name",
    )


def _scan(cache: FeatureCache) -> pa.Table:
    samples, dataset = cache.source.scan(workers=os.cpu_count() or 1), cache.spec.dataset
    do = f"restore them as they were, or {SAMPLES_NAME} from a copy"
    hashes = dataset_fingerprint(samples), labels_hash(samples)
    _require_same(f"The images at {cache.source.location}", hashes[0], dataset.fingerprint, do)
    _require_same(f"The labels at {cache.source.location}", hashes[1], dataset.labels_hash, do)
    return samples


def _draw(cache: FeatureCache, samples: pa.Table) -> pa.Table:
    segments = cache.spec.segments
    drawn = [draw_segment(cache.spec.views, segment, samples) for segment in segments]
    do = f"restore {VIEWS_NAME} from a copy, or repair it on a machine like that of the build"
    for segment, lines in zip(segments, drawn, strict=True):
        found = views_hash(lines, segment.samples[0])
        _require_same("The views drawn on this machine", found, segment.views_hash, do)
    return pa.concat_tables(drawn)


def _require_same(what: str, found: str, stated: str | None, do: str) -> None:
    """Raises `CacheMismatchError` for a hash other than the cache states, if it states one."""
    if stated not in (None, found):
        problem = f"{what} are not those of the cache."
        raise CacheMismatchError(problem, got=f"hash {found}", expected=f"hash {stated}", do=do)


def _extract(
    cache: FeatureCache,
    problems: Collection[Problem],
    runner: RunnerRecipe,
    checkpoints: Mapping[str, str],
) -> dict[int, str]:
    """Extract broken shards again. Returns those that failed, with the reason."""
    shards = sorted({problem.shard for problem in problems if problem.shard is not None})
    if not shards:
        return {}
    cache = cache.reopened()
    names = {problem.teacher for problem in problems if problem.teacher is not None}
    try:
        teachers = with_checkpoints(cache.spec, checkpoints).teachers
        worker = Worker({name: teachers[name] for name in sorted(names - {IMAGES})}, runner)
        extractor = worker.open(cache.storage.url, cache.source.location)
    except TeacherCacheError as error:
        return dict.fromkeys(shards, str(error))

    def again(shard: int) -> None:
        fresh = cache.reopened()
        remaining = problems_of_shards(fresh, True, [shard])
        broken = names.intersection(problem.teacher for problem in remaining if problem.teacher)
        if shard >= fresh.spec.num_shards:
            for name in broken:
                cache.storage.remove(commit_name(name, shard))
        elif remaining and shard < cache.spec.num_shards:  # without teachers, it remakes the quarantine list
            extractor.extract(shard, sorted(broken), replace=True)

    with ThreadPoolExecutor(runner.shards_in_flight) as pool:
        futures = {shard: pool.submit(again, shard) for shard in shards}
    errors = {shard: future.exception() for shard, future in futures.items()}
    return {shard: describe(error) for shard, error in errors.items() if error is not None}
