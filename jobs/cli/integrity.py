"""Verbs that check whether a cache is still what was built, and mend it: verify and repair."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated

import typer

import teachercache
from teachercache.jobs.cli.terminal import CacheArgument, Images, Overrides, console, counting
from teachercache.jobs.launch import EXIT_FAILED


def verify(
    cache: CacheArgument,
    full: Annotated[bool, typer.Option("--full", help="Read every byte and compare checksums.")] = False,
    against_teacher: Annotated[
        int, typer.Option(metavar="N", min=0, help="Recompute N random rows of every teacher and compare.")
    ] = 0,
    overrides: Overrides = None,
    images: Images = None,
) -> None:
    """Check that every file of a cache is still what was written. Exits with status 1 if one differs.

    `--against-teacher` also checks whether what was written is right: it loads the teachers, renders the
    stored views and compares their features with the stored ones, as exactly as the codec promises. For
    weights that moved since the build, give `teachers.NAME.checkpoint=PATH`.

    Example: `teachercache verify /data/cache --full --against-teacher 32`
    """
    from teachercache.cache_builder.build_recipe import WeightsRecipe
    from teachercache.pipeline.errors import RecipeError
    from teachercache.pipeline.recipe_files import load_overrides
    from teachercache.pipeline.verify import strays
    from teachercache.pipeline.verify import verify as verify_cache

    weights = load_overrides(WeightsRecipe, overrides or [], "overrides of this comparison")
    if overrides and not against_teacher:
        raise RecipeError(
            "Only --against-teacher loads teachers.",
            got=" ".join(overrides),
            expected="--against-teacher N as well",
            do="add --against-teacher, or leave the overrides out",
        )
    opened = teachercache.FeatureCache.open(cache, images)
    names = opened.spec.teachers_and_images
    shards = sum(len(opened.manifest.committed_shards(name)) for name in names)
    with counting("verifying", shards) as step:
        problems = verify_cache(opened, full=full, progress=step)
    for problem in problems:
        console.print(problem.reason + (f"; {problem.do}" if problem.do else ""), style="red")
    if problems:
        console.print(
            f"{len(problems)} problems among {shards} shards and their records. `teachercache repair "
            f"{shlex.quote(opened.storage.url)}` makes these files again and no others.",
        )
        raise typer.Exit(EXIT_FAILED)
    depth = "every byte" if full else "records and sizes; --full reads every byte"
    console.print(f"{shards} shards of {', '.join(names)} are sound ({depth}).")
    if missing := sum(len(opened.spec.shards(name)) for name in names) - shards:
        console.print(f"{missing} further shards are not committed; `teachercache build` computes them.")
    if full and (unknown := strays(opened)):
        console.print(f"{len(unknown)} files do not belong to this cache: {', '.join(unknown[:3])}, …")
    if against_teacher and not _against_teacher(opened, against_teacher, weights.checkpoints):
        raise typer.Exit(EXIT_FAILED)


def _against_teacher(cache: teachercache.FeatureCache, num_rows: int, checkpoints: Mapping[str, str]) -> bool:
    import torch

    from teachercache.cache_builder.against_teacher import compare_with_teachers

    with console.status(f"recomputing {num_rows} rows"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        comparisons = compare_with_teachers(cache, num_rows, device=device, checkpoints=checkpoints)
    for one in comparisons:
        verdict = "as promised" if one.kept else "NOT WHAT THE CODEC PROMISES"
        console.print(
            f"{one.teacher} {one.what}: cosine {one.cosine:.6f}, largest error {one.max_error:.3g}, "
            f"{cache.spec.teachers[one.teacher].codec} allows {one.allowed_error:.3g}: {verdict}",
            style=None if one.kept else "red",
        )
    compared = {one.teacher for one in comparisons}
    absent = [name for name in cache.teachers if name not in compared]
    for name in absent:
        console.print(f"{name}: no row is committed, so there is nothing to compare", style="red")
    return not absent and all(one.kept for one in comparisons)


def repair(cache: CacheArgument, overrides: Overrides = None, images: Images = None) -> None:
    """Recompute what `verify --full` finds broken, and nothing else.

    Overrides are those of a recipe's `runner`; with the batch_size of the build, rows are bitwise the same
    as before. For weights that moved since the build, give `teachers.NAME.checkpoint=PATH`. Exits with
    status 1 if something could not be mended, and names it.

    Example: `teachercache repair /data/cache batch_size=64`
    """
    from teachercache.cache_builder.build_recipe import RepairRecipe
    from teachercache.cache_builder.repair import repair as repair_cache
    from teachercache.pipeline.recipe_files import load_overrides

    recipe = load_overrides(RepairRecipe, overrides or [], "runner of this repair")
    opened = teachercache.FeatureCache.open(cache, images)
    shards = sum(len(opened.manifest.committed_shards(name)) for name in opened.spec.teachers_and_images)
    with counting("verifying", shards) as step:
        repaired = repair_cache(opened, recipe, step, recipe.checkpoints)
    for problem in repaired.mended:
        console.print(f"mended: {problem.file}")
    for problem in repaired.left:
        console.print(f"{problem.file}: {problem.reason}", style="red")
    if repaired.left:
        raise typer.Exit(EXIT_FAILED)
    console.print(f"{opened.storage.url} is sound; {len(repaired.mended)} files were mended.")
