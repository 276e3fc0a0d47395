"""`build`: from a recipe to a complete cache. Running it again continues where it stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc
from rich.console import Console

from cache_builder.budget import parse_bytes
from cache_builder.calibrate import CalibrationSample
from cache_builder.draft import Draft, draft, merge_spec
from cache_builder.plan import Plan, make_plan, pending
from cache_builder.progress import BuildProgress
from cache_builder.recipe import BuildRecipe
from cache_builder.runner import FailedShard, LocalRunner, Runner, Task
from cache_builder.stages import bottleneck
from pipeline.cache import FeatureCache
from pipeline.errors import BuildError
from pipeline.manifest import Manifest
from pipeline.spec import CacheSpec, TeacherSpec
from pipeline.storage import Storage


@dataclass(frozen=True)
class BuildResult:
    """What one run of `build` did: shards and views committed by it, and the state of the whole."""

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
    spec = merge_spec(manifest.spec(), drafted.spec, storage.url) if manifest.exists() else drafted.spec
    image_bytes = pc.sum(drafted.samples["nbytes"]).as_py() or 0
    return drafted, spec, make_plan(recipe, spec, storage, image_bytes)


def build(recipe: BuildRecipe, console: Console | None = None) -> BuildResult:
    """Build, continue, or extend by teachers the cache that the recipe states.

    Raises `CacheMismatchError` when another cache is at the path, `DiskSpaceError` when the plan does
    not fit, and `BuildError`, after everything else is committed, when shards failed for good.
    """
    console = console or Console(stderr=True)
    storage = Storage.at(recipe.cache)
    manifest = Manifest(storage)
    drafted, spec, plan = prepare(recipe, console)
    plan.require_space()
    if recipe.budget is not None:
        plan.require_budget(parse_bytes(recipe.budget))
    names = list(recipe.teachers)
    tasks = [Task(shard, missing) for shard, missing in pending(manifest, spec, names).items()]
    progress = BuildProgress(console, len(tasks))
    if tasks:
        storage.sweep()
        with _runner(recipe, {name: spec.teachers[name] for name in names}) as runner:
            new = [name for name in names if spec.teachers[name].weights_hash is None]
            if new:
                spec = _found_out(manifest, spec, runner, new, drafted, recipe.calibration_rows)
                _write_spec(manifest, spec, new, drafted)
            with progress:
                failed = runner.run(storage.url, tasks, progress.on_commit)
        if progress.shards:
            console.print(
                bottleneck(progress.seconds, progress.seconds["wall"] / recipe.runner.shards_in_flight)
            )
        if failed:
            raise _build_error(failed, len(tasks))
    else:
        console.print(f"Nothing to do: all {spec.num_shards} shards are committed for {', '.join(names)}.")
    return BuildResult(
        cache=FeatureCache.open(storage.url),
        shards=progress.shards,
        views=progress.views,
        wall_s=progress.wall_s,
        seconds=progress.seconds,
        quarantined=len(manifest.quarantine()),
    )


def _runner(recipe: BuildRecipe, teachers: Mapping[str, TeacherSpec]) -> Runner:
    if recipe.runner.kind == "local":
        return LocalRunner(recipe.runner, teachers)
    from cache_builder.ray_runner import RayRunner  # a local build starts without ray

    return RayRunner(recipe.runner, teachers)


def _found_out(
    manifest: Manifest, spec: CacheSpec, runner: Runner, new: Sequence[str], drafted: Draft, rows: int
) -> CacheSpec:
    """`spec` with what only loaded teachers tell: the hash of their weights, and calibrated codecs."""
    hashes = runner.weights_hashes()
    sample = CalibrationSample.draw(drafted.source, drafted.samples, drafted.views, rows)
    teachers, fidelity = dict(spec.teachers), dict(spec.fidelity)
    for name, calibration in runner.calibrate(sample, new).items():
        tables = calibration.tables
        found = {
            "weights_hash": hashes[name],
            "tables_hash": manifest.write_tables(name, tables) if tables else None,
        }
        teachers[name] = teachers[name].model_copy(update=found)
        fidelity[name] = calibration.fidelity
    return CacheSpec.model_validate(
        spec.model_dump() | {"teachers": teachers, "fidelity": fidelity, "cache_id": ""}
    )


def _write_spec(manifest: Manifest, spec: CacheSpec, new: Sequence[str], drafted: Draft) -> None:
    """Lay out the arrays of new teachers, then let the spec name them."""
    cache = FeatureCache(manifest.storage, spec)
    for name in new:
        cache.store.create(spec, name)
    if manifest.exists():
        manifest.write_spec(spec)
    else:
        manifest.create(spec, drafted.samples, drafted.views)


def _build_error(failed: Sequence[FailedShard], total: int) -> BuildError:
    reasons = "\n  - ".join(f"shard {shard.shard}: {shard.reason}" for shard in failed)
    return BuildError(
        f"{len(failed)} of {total} shards failed; every other one is committed:\n  - {reasons}",
        do="mend the reason and run the same command again; it computes only what is missing",
    )
