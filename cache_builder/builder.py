"""`build`: from a recipe to a complete cache. Running it again continues where it stopped.

Several jobs may build one cache at the same time, on one machine or many. Each takes the shards in an order
of its own and skips what is committed already; a shard that two have computed is published by the first
(`extract.py`), and `cache.json` is changed by one job at a time.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from cache_builder.calibrate import Calibration, CalibrationSample
from cache_builder.draft import Draft, draft, extend
from cache_builder.moved import with_checkpoints
from cache_builder.plan import Plan, make_plan, pending
from cache_builder.progress import BuildProgress
from cache_builder.recipe import BuildRecipe
from cache_builder.recover import recovered
from cache_builder.runner import FailedShard, LocalRunner, Runner, Task
from cache_builder.stages import bottleneck
from pipeline.cache import FeatureCache
from pipeline.errors import BuildError, CacheError
from pipeline.manifest import SPEC_NAME, Manifest
from pipeline.spec import CacheSpec, TeacherSpec
from pipeline.storage import Storage
from pipeline.terminal import Terminal

_PROBE_NAME = "write_probe.partial"


@dataclass(frozen=True)
class BuildResult:
    """What one run of `build` did, and the state of the whole.

    `shards` and `views` are those that its processes told of: one that dies between the commit of a shard
    and its answer tells nobody.
    """

    cache: FeatureCache
    shards: int
    views: int
    wall_s: float
    seconds: Mapping[str, float]
    quarantined: int


def prepare(recipe: BuildRecipe, console: Console) -> tuple[Draft, CacheSpec, Plan]:
    """Scan, resolve, merge with the cache that may be there, and plan. Writes nothing."""
    storage = Storage.at(recipe.cache)
    manifest = Manifest(storage)
    with console.status("scanning the images, resolving the teachers") as status:
        counter = Counter[str]()

        def show(new: int) -> None:
            counter["samples"] += new
            status.update(f"scanning the images: {counter['samples']:,}")

        drafted = draft(recipe, show)
    if manifest.exists():
        drafted = extend(recipe, drafted, manifest)
        if drafted.growth:
            grown = f"The cache at {storage.url} grows by {', '.join(drafted.growth)}."
            console.print(Text(grown), soft_wrap=True)
    return drafted, drafted.spec, make_plan(recipe, drafted.spec, storage, drafted.samples)


def build(recipe: BuildRecipe, console: Console | None = None) -> BuildResult:
    """Build, continue, or extend by samples, views and teachers the cache that the recipe states.

    Raises `CacheMismatchError` when another cache is at the path, or other weights than its own are in a
    checkpoint, `DiskSpaceError` when the plan does not fit, and `BuildError`, after everything else is
    committed, when shards failed for good.
    """
    console = console or Terminal(stderr=True)
    storage = Storage.at(recipe.cache)
    manifest = Manifest(storage)
    drafted, spec, plan = prepare(recipe, console)
    plan.require_space()
    if recipe.budget is not None:
        plan.require_budget(recipe.budget)
    names = list(recipe.teachers)
    tasks = [Task(shard, missing) for shard, missing in pending(manifest, spec, names).items()]
    random.Random().shuffle(tasks)  # its own order, or jobs that meet would go on side by side
    progress = BuildProgress(console, len(tasks))
    if tasks or _without_weights(spec):  # also where all that is missing is cache.json
        _require_writable(storage)
        storage.sweep()
        with _runner(recipe, {name: spec.teachers[name] for name in names}, len(tasks)) as runner:
            _establish(recipe, manifest, drafted, runner)
            with progress:
                failed = runner.run(storage.url, drafted.source.location, tasks, progress.on_commit)
        storage.sweep()  # what processes that died on the way left behind
        if progress.shards:
            console.print(
                bottleneck(progress.seconds, progress.seconds["wall"] / recipe.runner.shards_in_flight)
            )
        if failed:
            raise _build_error(failed, len(tasks))
    else:
        if drafted.moved:
            with _runner(recipe, {name: spec.teachers[name] for name in drafted.moved}, 1) as runner:
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
    """Raises `CacheError` before the teachers are loaded, instead of after."""
    try:
        storage.write(_PROBE_NAME, b"")
        storage.remove(_PROBE_NAME)
    except OSError as error:
        raise CacheError(
            "The cache cannot be written here.",
            got=f"{storage.url}: {error.strerror or error}",
            expected="a place where this user can make and delete files",
            do="mend the mount, the permissions or the credentials, or choose another place (cache=…)",
        ) from error


def _runner(recipe: BuildRecipe, teachers: Mapping[str, TeacherSpec], num_shards: int) -> Runner:
    if recipe.runner.kind == "local":
        return LocalRunner(recipe.runner, teachers, num_shards)
    from cache_builder.ray_runner import RayRunner  # a local build starts without ray

    return RayRunner(recipe.runner, teachers, num_shards)


def _establish(recipe: BuildRecipe, manifest: Manifest, drafted: Draft, runner: Runner) -> None:
    """Make the cache on disk the one that was drafted, with what only loaded teachers tell.

    That takes time, in which another job may have done the same, or something else; its word stands.
    """
    grows = drafted.stored is None or drafted.spec != drafted.stored[0]
    hashes, calibrations = dict[str, str](), dict[str, Calibration]()
    if grows or drafted.moved:
        hashes = runner.weights_hashes()
    if grows and (unknown := _without_weights(drafted.spec)):
        sample = CalibrationSample.draw(
            drafted.source, drafted.samples, drafted.views, recipe.calibration_rows
        )
        calibrations = runner.calibrate(sample, unknown)
    with manifest.storage.exclusive(SPEC_NAME):
        if grows:
            if manifest.exists():
                drafted = extend(recipe, drafted, manifest)
            _write(manifest, drafted, _with_findings(manifest, drafted.spec, hashes, calibrations))
        spec = manifest.spec()
        store = FeatureCache(manifest.storage, spec).store
        for name in spec.teachers:
            store.create(spec, name)


def _with_findings(
    manifest: Manifest, spec: CacheSpec, hashes: Mapping[str, str], calibrations: Mapping[str, Calibration]
) -> CacheSpec:
    """`spec` with the hashes of new teachers' weights, and their calibrated codecs."""
    teachers, fidelity = dict(spec.teachers), dict(spec.fidelity)
    for name in _without_weights(spec):
        teachers[name] = recovered(manifest, spec, name, hashes[name]) or _calibrated(
            manifest, teachers[name], name, hashes[name], calibrations[name]
        )
        fidelity[name] = calibrations[name].fidelity
    return spec.changed(teachers=teachers, fidelity=fidelity)


def _write(manifest: Manifest, drafted: Draft, spec: CacheSpec) -> None:
    """The spec comes last; tables that are longer than it says are no problem. Recorded places stay."""
    stored = drafted.stored[0] if drafted.stored else None
    if stored is None or stored.segments != spec.segments:
        manifest.write_samples(drafted.samples)
        manifest.write_views(drafted.views)
    if stored != spec:
        manifest.write_spec(with_checkpoints(spec, drafted.moved))


def _without_weights(spec: CacheSpec) -> list[str]:
    return [name for name, teacher in spec.teachers.items() if teacher.weights_hash is None]


def _calibrated(
    manifest: Manifest, teacher: TeacherSpec, name: str, weights_hash: str, calibration: Calibration
) -> TeacherSpec:
    tables = calibration.tables
    tables_hash = manifest.write_tables(name, tables) if tables else None
    return teacher.model_copy(update={"weights_hash": weights_hash, "tables_hash": tables_hash})


def _build_error(failed: Sequence[FailedShard], total: int) -> BuildError:
    reasons = "\n  - ".join(f"shard {shard.shard}: {shard.reason}" for shard in failed)
    return BuildError(
        f"{len(failed)} of {total} shards failed; every other one is committed:\n  - {reasons}",
        do="mend the reason and run the same command again; it computes only what is missing",
    )
