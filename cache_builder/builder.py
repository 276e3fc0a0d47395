"""`build`: from a recipe to a complete cache. Running it again continues where it stopped.

Several jobs may build one cache at the same time, on one machine or many. Each takes the shards in its own
order and skips those already committed; when two jobs have computed a shard, the first publishes it
(`extract.py`). One job at a time changes `cache.json`. Another job may change it while teachers load: so each
job establishes its spec after that, computes by it, and before it ends compares what is committed with it.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from teachercache.cache_builder.build_recipe import BuildRecipe, with_checkpoints
from teachercache.cache_builder.calibrate import Calibration, other_tables, raw_losses
from teachercache.cache_builder.draft import Draft, draft, extend, growth, spec_of, teachers_of
from teachercache.cache_builder.plan import Plan, make_plan, pending
from teachercache.cache_builder.progress import BuildProgress
from teachercache.cache_builder.runner import LocalRunner, Runner, Task, require_place
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import (
    BuildError,
    CacheError,
    CacheMismatchError,
    Problems,
    RecipeError,
    extra,
    place_error,
)
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.processes import temporary_of
from teachercache.pipeline.places.storage import Storage, whole_or_nothing
from teachercache.pipeline.records.integrity import record_problem
from teachercache.pipeline.records.manifest import SAMPLES_NAME, SPEC_NAME, VIEWS_NAME, Manifest, tables_name
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, DatasetSpec, TeacherSpec
from teachercache.pipeline.records.stats_files import write_tables
from teachercache.pipeline.records.tables import with_views_hashes
from teachercache.pipeline.sources.source import left_out_line
from teachercache.pipeline.terminal import Terminal

_PROBE_NBYTES = 1 << 14  # a full disk still accepts empty files


@dataclass(frozen=True)
class BuildResult:
    """What one run of `build` committed, and the state of the whole."""

    cache: FeatureCache
    shards: int
    views: int
    wall_s: float
    seconds: Mapping[str, float]
    quarantined: int


def prepare(recipe: BuildRecipe, console: Console) -> tuple[Draft, CacheSpec, Plan]:
    """Scan, resolve, merge with an existing cache, and plan. Writes nothing."""
    with console.status("scanning the images, resolving the teachers") as status:
        counter = Counter[str]()

        def show(new: int) -> None:
            counter["samples"] += new
            status.update(f"scanning the images: {counter['samples']:,}")

        drafted = draft(recipe, show)
    manifest, storage = drafted.manifest, drafted.manifest.storage
    if (line := left_out_line(drafted.samples.num_rows, drafted.left_out)) is not None:
        console.print(line, soft_wrap=True, markup=False)
    problems = Problems()
    with problems.noted():
        if manifest.exists():
            drafted = extend(recipe, drafted)
    if drafted.old and (added := growth(drafted.old, drafted.spec)):
        console.print(Text(f"The cache at {storage.url} grows by {', '.join(added)}."), soft_wrap=True)
    with problems.noted():  # before the teachers are loaded
        _require_other_tables(recipe, drafted)
    problems.require_none()
    return drafted, drafted.spec, make_plan(recipe, drafted.spec, storage, drafted.samples)


def foresee(recipe: BuildRecipe, count: int, image_bytes: int) -> Plan:
    """The plan for `count` images that are not there yet, of a mean size. Raises `RecipeError`."""
    storage = open_storage(recipe.cache)
    if Manifest(storage).exists() or recipe.budget is not None:
        raise RecipeError(
            "A plan without images is one of a new cache, without a budget.",
            got=f"budget={recipe.budget}" if recipe.budget is not None else f"a cache at {storage.url}",
            do="leave --samples out",
        )
    dataset = DatasetSpec(kind="source", location=recipe.source.path, num_samples=count, fingerprint="")
    samples = pa.table({"nbytes": [image_bytes] * count})
    problems = Problems()
    teachers = teachers_of(recipe, problems)
    problems.require_none()
    return make_plan(recipe, spec_of(recipe, dataset, teachers), storage, samples)


def build(recipe: BuildRecipe, console: Console | None = None) -> BuildResult:
    """Build or continue the recipe's cache, or extend it by samples, views and teachers.

    It returns when everything in the recipe is committed, by this job or another. Raises `CacheMismatchError`
    when another cache is at the path or a checkpoint does not hold the cache's weights, `DiskSpaceError` when
    the plan does not fit, and `BuildError` when shards failed for good, after all others are committed.
    """
    if recipe.runner.kind == "ray":
        with extra("build"):  # asked before the images are listed
            from teachercache.cache_builder import ray_runner  # noqa: F401
    console = console or Terminal(stderr=True)
    drafted, spec, plan = prepare(recipe, console)
    manifest, storage = drafted.manifest, drafted.manifest.storage
    plan.require(recipe.budget)
    names = list(recipe.teachers)
    planned = len(pending(manifest, spec, names))
    progress = BuildProgress(console)
    if planned or _without_weights(spec):  # also where only cache.json is missing
        _require_writable(storage)
        storage.sweep()
        try:
            with _runner(recipe, {name: spec.teachers[name] for name in names}, planned) as runner:
                spec = _establish(recipe, drafted, runner)
                for line in raw_losses(spec, _without_weights(drafted.spec)):
                    console.print(line, soft_wrap=True, markup=False)
                tasks = [Task(shard, missing) for shard, missing in pending(manifest, spec, names).items()]
                random.Random().shuffle(tasks)  # an order of its own, or jobs that meet would stay in step
                runner.num_shards = len(tasks)
                with progress.of(len(tasks)):
                    failed = runner.run(storage.url, drafted.source.location, tasks, progress.on_commit)
                left = pending(manifest, spec, names)
                _count_unreported(manifest, runner, left, progress)
        except OSError as error:
            require_place(error, storage.url)
            raise
        storage.sweep()  # remove files of processes that died
        if progress.shards:
            console.print(progress.bottleneck(recipe.runner.shards_in_flight))
        _require_committed(left, failed, len(tasks))
        _say_what_others_added(manifest, spec, console)
    else:
        if drafted.old_places:
            with _runner(recipe, {name: spec.teachers[name] for name in drafted.old_places}, 1) as runner:
                runner.weights_hashes()  # loading compares them
        console.print(f"Nothing to do: all {spec.num_shards} shards are committed for {', '.join(names)}.")
    return BuildResult(
        cache=FeatureCache.open(storage.url),
        shards=progress.shards,
        views=progress.views,
        wall_s=progress.wall_s,
        seconds=progress.seconds,
        quarantined=len({entry.sample_index for entry in manifest.quarantine()}),
    )


def _require_writable(storage: Storage) -> None:
    """Raises `CacheError`, before the time is spent on loading teachers."""
    probe = temporary_of(Path("write_probe")).name
    try:
        storage.write(probe, bytes(_PROBE_NBYTES))
        storage.remove(probe)
    except OSError as error:
        words = place_error(error, storage.url) or {
            "got": f"{storage.url}: {error.strerror or error}",
            "expected": "a place where this user can make and delete files",
            "do": "fix the mount, the permissions or the credentials, or choose another place (cache=…)",
        }
        raise CacheError("The cache cannot be written here.", **words) from error


def _runner(recipe: BuildRecipe, teachers: Mapping[str, TeacherSpec], num_shards: int) -> Runner:
    if recipe.runner.kind == "local":
        return LocalRunner(recipe.runner, teachers, num_shards)
    from teachercache.cache_builder.ray_runner import RayRunner  # a local build starts without ray

    return RayRunner(recipe.runner, teachers, num_shards, num_shards * recipe.rows_per_shard)


def _establish(recipe: BuildRecipe, drafted: Draft, runner: Runner) -> CacheSpec:
    """Write the drafted cache to disk, with the hashes and tables that need loaded teachers.

    That takes time, and what another job has written meanwhile stays. Returns the spec that this recipe asks
    for; the cache on disk may have more. Raises `CacheMismatchError` if it now has other rows.
    """
    manifest, grows = drafted.manifest, drafted.spec != drafted.old
    hashes, calibrations = dict[str, str](), dict[str, Calibration]()
    if grows or drafted.old_places:
        hashes = runner.weights_hashes()
    if grows:
        calibrations = _calibrations(recipe, drafted, runner, hashes)
        if manifest.exists() and manifest.spec().cache_id != (drafted.old.cache_id if drafted.old else None):
            drafted = draft(recipe)  # the other job may have listed newer images
    with manifest.storage.exclusive(SPEC_NAME):
        established = drafted.spec
        if grows:
            if drafted.old or manifest.exists():  # a cache that has vanished is not begun from its growth
                drafted = extend(recipe, drafted)
                _require_other_tables(recipe, drafted)
            with whole_or_nothing(manifest.storage, _new_files(drafted)):
                established = _with_findings(manifest, drafted.spec, hashes, calibrations)
                _lay_out(manifest, established, _new_arrays(drafted))
                _write(drafted, established)
        spec = manifest.spec()
        _require_same_rows(manifest, spec, established)
        _lay_out(manifest, spec, (*spec.with_arrays, None))
    return established


def _calibrations(
    recipe: BuildRecipe, drafted: Draft, runner: Runner, hashes: Mapping[str, str]
) -> dict[str, Calibration]:
    """Calibrations of the new teachers: from `tables_from` where the recipe says so, else from a sample."""
    spec, unknown = drafted.spec, _without_weights(drafted.spec)
    loaded = {name: spec.teachers[name].model_copy(update={"weights_hash": hashes[name]}) for name in unknown}
    calibrations = other_tables(recipe.tables_from, spec.model_copy(update={"teachers": loaded}), unknown)
    if rest := [name for name in unknown if name not in calibrations]:
        learnt = runner.calibrate(drafted.calibration_sample(recipe.calibration_rows), rest)
        for name, calibration in learnt.items() if not recipe.accept_loss else ():
            calibration.require_fidelity(name, spec.teachers[name].codec)
        calibrations |= learnt
    return calibrations


def _require_other_tables(recipe: BuildRecipe, drafted: Draft) -> None:
    """Raises `CacheMismatchError` if the cache cannot use, or does not use, the tables of `tables_from`."""
    other_tables(recipe.tables_from, drafted.spec, recipe.teachers)


def _lay_out(manifest: Manifest, spec: CacheSpec, names: Iterable[str | None]) -> None:
    store = FeatureCache(manifest.storage, spec).store
    for name in names:
        store.create(name)


def _new_files(drafted: Draft) -> list[str]:
    """The files written before the cache exists, or before it has its new teachers."""
    store, new = FeatureCache(drafted.manifest.storage, drafted.spec).store, _without_weights(drafted.spec)
    layouts = [name for owner in _new_arrays(drafted) for name in store.layout_files(owner)]
    return [SPEC_NAME, SAMPLES_NAME, VIEWS_NAME, *map(tables_name, new), *layouts]


def _new_arrays(drafted: Draft) -> list[str]:
    """Whose arrays the cache does not have yet; it has all but new teachers' from its beginning."""
    new = set(_without_weights(drafted.spec)) | (set() if drafted.old else {IMAGES})
    return [name for name in drafted.spec.with_arrays if name in new]


def _require_same_rows(manifest: Manifest, spec: CacheSpec, established: CacheSpec) -> None:
    """Raises `CacheMismatchError` unless `spec` has the rows of `established`, under the same numbers."""
    if _rows(established, established) != _rows(spec, established):
        raise CacheMismatchError(
            "Another cache has replaced this one during the build.",
            got=f"{manifest.storage.url} with cache_id {spec.cache_id}",
            expected=f"the rows of cache_id {established.cache_id}, then those that other jobs added",
            do="end the other job, or give this one another path (cache=…); then run the same command again",
        )


def _rows(spec: CacheSpec, established: CacheSpec) -> list[object]:
    """How `spec` describes the rows of the segments of `established`."""
    names = [name for name in (*established.teachers, IMAGES) if name == IMAGES or name in spec.teachers]
    return [
        (segment.first_row, segment.samples, name, spec.shard_content_id(name, shard))
        for segment in spec.segments[: len(established.segments)]
        for shard in [segment.first_row // spec.rows_per_shard]
        for name in names
    ]


def _with_findings(
    manifest: Manifest, spec: CacheSpec, hashes: Mapping[str, str], calibrations: Mapping[str, Calibration]
) -> CacheSpec:
    """`spec` with the hashes of new teachers' weights and of their codecs' tables."""
    teachers, fidelity = dict(spec.teachers), dict(spec.fidelity)
    for name in _without_weights(spec):
        teacher = _kept_teacher(manifest, spec, name, hashes[name])
        if teacher is None:
            tables = calibrations[name].tables
            found = {"tables_hash": write_tables(manifest.storage, name, tables) if tables else None}
            teacher = teachers[name].model_copy(update=found | {"weights_hash": hashes[name]})
        teachers[name], fidelity[name] = teacher, calibrations[name].fidelity
    return spec.changed(teachers=teachers, fidelity=fidelity)


def _kept_teacher(manifest: Manifest, spec: CacheSpec, name: str, weights_hash: str) -> TeacherSpec | None:
    """Teacher `name` with the weights and tables of its shards that outlived `cache.json`; None without any.

    Raises `CacheMismatchError` when their records are those of another spec.
    """
    shards = manifest.committed_shards(name)
    if not shards:
        return None
    found: dict[str, str | None] = {"weights_hash": weights_hash}
    if get_codec(spec.teachers[name].codec).needs_tables and manifest.storage.exists(tables_name(name)):
        found["tables_hash"] = manifest.storage.checksum(tables_name(name))
    teacher = spec.teachers[name].model_copy(update=found)
    whole = spec.changed(teachers={**spec.teachers, name: teacher})
    store = FeatureCache(manifest.storage, whole).store
    for shard, record in manifest.commits(name, shards).items():
        if (problem := record_problem(record, whole, store.shard_files(name, shard))) is not None:
            raise CacheMismatchError(
                f"{SPEC_NAME} is gone, and the remaining shards are not those of this recipe.",
                got=problem.reason,
                expected="the recipe, images, weights and library versions of the cache",
                do=f"restore {SPEC_NAME} from a copy, correct the recipe, or choose another place (cache=…)",
            )
    return teacher


def _write(drafted: Draft, spec: CacheSpec) -> None:
    """Write the spec last: tables may be longer than it says. Recorded checkpoints stay."""
    manifest, old = drafted.manifest, drafted.old
    if old is None or old.segments != spec.segments:
        manifest.write_table(SAMPLES_NAME, drafted.samples)
        manifest.write_table(VIEWS_NAME, drafted.views)
        known = old.segments if old else ()  # an older cache has no hashes, and does not get any now
        new = with_views_hashes(spec, drafted.views)[len(known) :]
        spec = spec.changed(segments=(*spec.segments[: len(known)], *new))
    if old != spec:
        manifest.write_spec(with_checkpoints(spec, drafted.old_places))


def _without_weights(spec: CacheSpec) -> list[str]:
    return [name for name, teacher in spec.teachers.items() if teacher.weights_hash is None]


def _count_unreported(
    manifest: Manifest, runner: Runner, left: Collection[int], progress: BuildProgress
) -> None:
    """Count the shards that processes of this job committed but, because they died, did not report."""
    for task, worker in runner.orphans:
        if task.shard not in left and task.shard not in progress.counted:
            records = {name: manifest.read_commit(name, task.shard) for name in task.names}
            progress.on_commit({name: one for name, one in records.items() if one.worker == worker})


def _require_committed(left: Collection[int], failed: Mapping[int, str], total: int) -> None:
    """Raises `BuildError` for uncommitted shards; a process may also fail after it has committed one."""
    if left:
        lines = "\n  - ".join(
            f"shard {shard}: {failed.get(shard, 'its commit record is gone')}" for shard in left
        )
        raise BuildError(
            f"{len(left)} of {total} shards failed; all others are committed:\n  - {lines}",
            do="fix the cause and run the same command again; it computes only what is missing",
        )


def _say_what_others_added(manifest: Manifest, established: CacheSpec, console: Console) -> None:
    """Raises `CacheMismatchError` where the rows that were built are no longer those of the cache."""
    now = manifest.spec()
    _require_same_rows(manifest, now, established)
    if added := growth(established, now):
        console.print(
            f"Another job has meanwhile extended the cache by {', '.join(added)}; "
            f"{len(pending(manifest, now, list(now.teachers)))} shards are not committed yet.",
            soft_wrap=True,
        )
