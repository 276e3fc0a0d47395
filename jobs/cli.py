"""The `teachercache` command. Each verb takes a recipe or a cache, and `key=value` overrides."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs.launch import EXIT_FAILED, run

if TYPE_CHECKING:
    from cache_builder.budget import Option
    from cache_builder.draft import Draft
    from cache_builder.recipe import BuildRecipe

app = typer.Typer(
    help=__doc__ and "Run frozen vision teachers once, cache their features, train students from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
console = Console()
_MAX_INDEX = 2**63 - 1

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a recipe of jobs/recipes by name.")
]
CacheArgument = Annotated[
    str, typer.Argument(metavar="CACHE", help="A folder or URL (s3://…) that holds a cache.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as views.num_views=4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print what a build will cost (rows, bytes, files, GPU-hours), before anything runs.

    Exits with status 1 when the disk is too small.

    With `budget=6TB` it loads the teachers, tries codecs on a calibration sample, and says which grids and
    codecs keep to it at the least loss.

    Example: `teachercache plan imagenet1k_vitl source.path=/data/train cache=/data/cache budget=6TB`
    """
    from cache_builder.builder import prepare
    from cache_builder.recipe import BuildRecipe
    from jobs.inspection.tables import options_table, plan_table
    from pipeline.recipe import load_recipe

    checked = load_recipe(BuildRecipe, recipe, overrides or [])
    drafted, _, result = prepare(checked, console)
    console.print(plan_table(result))
    if checked.budget is not None:
        from cache_builder.budget import choose, parse_bytes

        available = _measure(checked, drafted, None)
        budget = parse_bytes(checked.budget)
        chosen = choose(available, result.spec.num_rows, budget)
        console.print(
            options_table({name: [option] for name, option in chosen.items()}, result.spec.num_rows)
        )
        console.print(f"Within {checked.budget}, on the calibration sample. Add to the command:")
        console.print(" ".join(option.overrides(name) for name, option in chosen.items()), soft_wrap=True)
    result.require_space()


@app.command()
def build(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and stop.")] = False,
) -> None:
    """Run the teachers and fill the cache; run it again to continue after any stop.

    `runner.kind=ray` uses the Ray cluster that `ray start` made, or starts one here.

    Example: `teachercache build demo source.path=~/photos cache=/tmp/cache "teachers=[dinov2_small]"`
    """
    from cache_builder.builder import build as build_cache
    from cache_builder.builder import prepare
    from cache_builder.recipe import BuildRecipe
    from jobs.inspection.tables import plan_table
    from pipeline.recipe import load_recipe

    checked = load_recipe(BuildRecipe, recipe, overrides or [])
    if dry_run:
        console.print(plan_table(prepare(checked, console)[2]))
        return
    result = build_cache(checked, console)
    console.print(
        f"{result.cache.storage.url}: {result.shards} shards, {result.views} views in {result.wall_s:.1f} s"
        f" ({result.views / result.wall_s:.2f} img/s)"
        if result.views
        else f"{result.cache.storage.url}: complete",
        soft_wrap=True,
    )
    if result.quarantined:
        console.print(f"{result.quarantined} samples are quarantined; `teachercache inspect` names them.")


@app.command()
def calibrate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    codecs: Annotated[str, typer.Option(help="Codecs to try, separated by commas.")] = "",
) -> None:
    """Try codecs on a calibration sample of the recipe's images and teachers; writes nothing.

    A build calibrates by itself. This is to choose a codec: `calibration_rows=N` sets the sample's size.

    Example: `teachercache calibrate imagenet1k_vitl source.path=/data/train calibration_rows=32`
    """
    from cache_builder.builder import prepare
    from cache_builder.recipe import BuildRecipe
    from jobs.inspection.tables import options_table
    from pipeline.recipe import load_recipe

    checked = load_recipe(BuildRecipe, recipe, overrides or [])
    drafted, spec, _ = prepare(checked, console)
    tried = [name.strip() for name in codecs.split(",")] if codecs else None
    console.print(options_table(_measure(checked, drafted, tried), spec.num_rows))


def _measure(recipe: BuildRecipe, drafted: Draft, codecs: list[str] | None) -> dict[str, list[Option]]:
    from cache_builder.budget import CODECS, options
    from cache_builder.calibrate import CalibrationSample

    height, width = recipe.views.size
    sample = CalibrationSample.draw(drafted.source, drafted.samples, drafted.views, recipe.calibration_rows)
    found: dict[str, list[Option]] = {}
    with console.status("calibrating") as status:
        for name, available in options(
            drafted.spec.teachers,
            sample,
            (height // 16, width // 16),
            recipe.runner.batch_size,
            codecs or CODECS,
        ):
            found[name] = available
            status.update(f"calibrated {', '.join(found)}")
    return found


@app.command()
def verify(
    cache: CacheArgument,
    full: Annotated[bool, typer.Option("--full", help="Read every byte and compare checksums.")] = False,
) -> None:
    """Check every committed shard against its commit record. Exits with status 1 when one differs.

    Example: `teachercache verify /data/cache --full`
    """
    from rich.progress import track

    from cache_builder.verify import teachers_and_images
    from cache_builder.verify import verify as verify_cache
    from pipeline.cache import FeatureCache

    opened = FeatureCache.open(cache)
    shards = sum(len(opened.manifest.committed(name)) for name in teachers_and_images(opened))
    steps = iter(track(range(shards), "verifying", console=console, transient=True))
    problems = verify_cache(opened, full=full, progress=lambda: (next(steps, None), None)[1])
    for problem in problems:
        console.print(
            f"{problem.teacher} shard {problem.shard}: {problem.reason}", style="red", soft_wrap=True
        )
    if problems:
        console.print(
            f"{len(problems)} of {shards} shards differ. Delete their records "
            f"({', '.join(sorted({f'commits/{p.teacher}/{p.shard:05d}.json' for p in problems})[:3])}, …) "
            "and run the build again: it computes what has no record.",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_FAILED)
    depth = "every byte" if full else "records and sizes; --full reads every byte"
    console.print(f"{shards} shards of {', '.join(teachers_and_images(opened))} are sound ({depth}).")


@app.command()
def inspect(
    cache: CacheArgument,
    shard: Annotated[int | None, typer.Option(min=0, max=_MAX_INDEX, help="Show one shard.")] = None,
    row: Annotated[int | None, typer.Option(min=0, max=_MAX_INDEX, help="Show one row.")] = None,
    key: Annotated[str | None, typer.Option(help="Show one sample, by its key or the end of it.")] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Write PCA maps of a few samples to this PNG.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples the picture shows.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what a cache holds, whether it is complete, and what is broken.

    Example: `teachercache inspect /data/cache --key n01440764_10026`
    """
    from jobs.inspection import detail_tables, details
    from jobs.inspection.summary import summarize
    from jobs.inspection.tables import summary_table
    from pipeline.manifest import Manifest
    from pipeline.storage import Storage

    manifest = Manifest(Storage.at(cache))
    if shard is not None:
        found, table = details.shard_details(manifest, shard), detail_tables.shard_table
    elif row is not None:
        found, table = details.row_details(manifest, row), detail_tables.row_table
    elif key is not None:
        found, table = details.sample_details(manifest, key), detail_tables.sample_table
    else:
        found, table = summarize(manifest), summary_table
    if as_json:
        console.print_json(data=found)
    else:
        console.print(table(found))
    if pictures is not None:
        from jobs.inspection.pictures import pca_maps
        from pipeline.cache import FeatureCache

        pca_maps(FeatureCache.open(cache), pictures, num_samples=samples)
        console.print(f"PCA maps: {pictures}", soft_wrap=True)


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train a student in this one process; use `accelerate launch jobs/train_student.py` for several.

    Example: `teachercache train sak_stage1_base cache=/data/cache output=runs/base`
    """
    from pipeline.recipe import load_recipe
    from student.recipe import TrainRecipe
    from student.train import train as train_student

    result = train_student(load_recipe(TrainRecipe, recipe, overrides or []))
    if result.interrupted:
        raise typer.Exit(128 + signal.SIGTERM)
    console.print(
        f"{result.steps} steps, {result.images_per_s:.1f} img/s; student: {result.student}", soft_wrap=True
    )


@app.command()
def repsim(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="A folder that `train` wrote (…/student).")
    ],
    cache: CacheArgument,
    max_samples: Annotated[int, typer.Option(help="Samples to average over.")] = 1000,
    as_json: Json = False,
) -> None:
    """Cosine similarity of a student's representations to its teachers' (SAK, Tables 3 and 17).

    Example: `teachercache repsim runs/base/student /data/cache --max-samples 5000`
    """
    from jobs.inspection.tables import similarity_table
    from pipeline.cache import FeatureCache
    from student import load_student
    from student.repsim import representation_similarity

    found = representation_similarity(
        load_student(student), FeatureCache.open(cache), max_samples=max_samples
    )
    if as_json:
        console.print_json(data={name: {"levels": s.levels, "mean": s.mean} for name, s in found.items()})
    else:
        console.print(similarity_table(found))


def _not_there_yet(verb: str) -> Callable[[list[str] | None], None]:
    def command(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        console.print(f"teachercache {verb} is not there yet.")
        raise typer.Exit(EXIT_FAILED)

    command.__doc__ = "Not there yet."
    return command


for _verb in ("repair", "report", "view", "convert", "evaluate"):
    app.command(_verb)(_not_there_yet(_verb))


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
