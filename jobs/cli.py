"""The `teachercache` command. Each verb takes a recipe or a cache, and `key=value` overrides."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from jobs.launch import EXIT_FAILED, run

if TYPE_CHECKING:
    from cache_builder.budget import Option
    from cache_builder.draft import Draft
    from cache_builder.recipe import BuildRecipe
    from pipeline.cache import FeatureCache

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
Images = Annotated[
    str | None, typer.Option(help="Where the source images are now, if they moved since the build.")
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
    against_teacher: Annotated[
        int, typer.Option(metavar="N", help="Recompute N random rows of every teacher and compare.")
    ] = 0,
) -> None:
    """Check a cache: is every file what was written? Exits with status 1 when one differs.

    `--against-teacher` also asks whether what was written is right: it loads the teachers, renders the
    stored views and compares with the stored features, as exactly as the codec promises.

    Example: `teachercache verify /data/cache --full --against-teacher 32`
    """
    from cache_builder.verify import strays, teachers_and_images
    from cache_builder.verify import verify as verify_cache
    from pipeline.cache import FeatureCache

    opened = FeatureCache.open(cache)
    names = teachers_and_images(opened)
    shards = sum(len(opened.manifest.committed(name)) for name in names)
    problems = verify_cache(opened, full=full, progress=_progress(shards))
    for problem in problems:
        console.print(problem.reason, style="red", markup=False, soft_wrap=True)
    if problems:
        console.print(
            f"{len(problems)} problems among {shards} shards and their records. `teachercache repair "
            f"{opened.storage.url}` makes these files again and no other.",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_FAILED)
    depth = "every byte" if full else "records and sizes; --full reads every byte"
    console.print(f"{shards} shards of {', '.join(names)} are sound ({depth}).", soft_wrap=True)
    if missing := opened.spec.num_shards * len(names) - shards:
        console.print(f"{missing} further shards are not committed; `teachercache build` computes them.")
    if full and (unknown := strays(opened)):
        console.print(
            f"{len(unknown)} files are not of this cache: {', '.join(unknown[:3])}, …", soft_wrap=True
        )
    if against_teacher and not _against_teacher(opened, against_teacher):
        raise typer.Exit(EXIT_FAILED)


def _progress(shards: int) -> Callable[[], None]:
    from rich.progress import track

    steps = iter(track(range(shards), "verifying", console=console, transient=True))
    return lambda: (next(steps, None), None)[1]


def _against_teacher(cache: FeatureCache, num_rows: int) -> bool:
    import torch

    from cache_builder.against_teacher import compare_with_teachers

    with console.status(f"recomputing {num_rows} rows"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = compare_with_teachers(cache, num_rows, device=device)
    for one in found:
        verdict = "as promised" if one.kept else "NOT WHAT THE CODEC PROMISES"
        console.print(
            f"{one.teacher} {one.what}: cosine {one.cosine:.6f}, greatest error {one.max_error:.3g}, "
            f"{cache.spec.teachers[one.teacher].codec} allows {one.allowed_error:.3g}: {verdict}",
            style=None if one.kept else "red",
            soft_wrap=True,
        )
    return all(one.kept for one in found)


@app.command()
def repair(cache: CacheArgument, overrides: Overrides = None) -> None:
    """Compute again what `verify --full` finds broken, and nothing else.

    Overrides are those of a recipe's `runner`; with the batch_size of the build the rows are the same
    bits as before. Exits with status 1 when something could not be mended, and names it.

    Example: `teachercache repair /data/cache batch_size=64`
    """
    from omegaconf import OmegaConf

    from cache_builder.recipe import RunnerRecipe
    from cache_builder.repair import repair as repair_cache
    from cache_builder.verify import teachers_and_images
    from pipeline.cache import FeatureCache
    from pipeline.recipe import check_recipe

    changes = OmegaConf.to_container(OmegaConf.from_dotlist(overrides or []))
    runner = check_recipe(RunnerRecipe, changes, "runner of this repair")
    opened = FeatureCache.open(cache)
    shards = sum(len(opened.manifest.committed(name)) for name in teachers_and_images(opened))
    done = repair_cache(opened, runner, _progress(shards))
    for problem in done.mended:
        console.print(f"mended: {problem.file}", soft_wrap=True)
    for problem in done.left:
        console.print(f"{problem.file}: {problem.reason}", style="red", markup=False, soft_wrap=True)
    if done.left:
        raise typer.Exit(EXIT_FAILED)
    console.print(f"{opened.storage.url} is sound; {len(done.mended)} files were mended.", soft_wrap=True)


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
    found: dict[str, Any]
    table: Callable[[Mapping[str, Any]], RenderableType]
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
def report(
    cache: CacheArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    samples: Annotated[int, typer.Option(min=1, help="How many samples are shown.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Which samples are shown.")] = 0,
    images: Images = None,
) -> None:
    """Write one self-contained page to send to a colleague: what is in it, and what the teachers see.

    Example: `teachercache report /data/cache -o report.html --samples 24`
    """
    from jobs.inspection.report import write_report
    from pipeline.cache import FeatureCache

    with console.status("") as status:
        html = write_report(
            FeatureCache.open(cache, images), num_samples=samples, seed=seed, progress=status.update
        )
    output.write_text(html)
    console.print(f"{output} ({len(html.encode()) / 1e6:.1f} MB)", soft_wrap=True)


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


for _verb in ("view", "convert", "evaluate"):
    app.command(_verb)(_not_there_yet(_verb))


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
