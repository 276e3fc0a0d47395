"""The `teachercache` command. Each verb takes a recipe or a cache, and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress

from jobs.launch import EXIT_FAILED, run

if TYPE_CHECKING:
    from cache_builder.budget import Option
    from cache_builder.draft import Draft
    from cache_builder.recipe import BuildRecipe
    from pipeline.cache import FeatureCache
    from pipeline.rearrange import Rearrangement
    from pipeline.spec import TeacherSpec

app = typer.Typer(
    help="Run frozen vision teachers once, cache their features, train students from the cache.",
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
StudentArgument = Annotated[
    str, typer.Argument(metavar="STUDENT", help="A folder that `train` wrote (…/student).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _print_json(data: object) -> None:
    """Without colours: `inspect --json` lists thousands of shards, and drawing them took half its time."""
    typer.echo(json.dumps(data, indent=2))


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
    from pipeline.units import human_bytes

    checked = load_recipe(BuildRecipe, recipe, overrides or [])
    drafted, _, result = prepare(checked, console)
    console.print(plan_table(result))
    if checked.budget is not None:
        from cache_builder.budget import choose, require_possible

        specs = _candidates(checked, drafted)
        require_possible(specs, result, checked.budget)
        chosen = choose(_measure(checked, drafted, specs), result, checked.budget)
        console.print(
            options_table({name: [option] for name, option in chosen.items()}, result.spec.num_rows)
        )
        console.print(f"Within {human_bytes(checked.budget)}, on the calibration sample. Add to the command:")
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
    specs = _candidates(checked, drafted, tried)
    console.print(options_table(_measure(checked, drafted, specs), spec.num_rows))


def _candidates(
    recipe: BuildRecipe, drafted: Draft, codecs: list[str] | None = None
) -> dict[str, list[TeacherSpec]]:
    """What each teacher of the recipe could be stored as; what a cache has already stays as it is."""
    from cache_builder.budget import candidates
    from cache_builder.teachers.recipe import student_grid

    grid = student_grid(recipe.views.size)
    stored = drafted.stored[0].teachers if drafted.stored else {}
    rows = min(recipe.calibration_rows, drafted.spec.dataset.num_samples)
    return {
        name: [stored[name]]
        if name in stored and codecs is None
        else candidates(drafted.spec.teachers[name], grid, rows, codecs)
        for name in recipe.teachers
    }


def _measure(
    recipe: BuildRecipe, drafted: Draft, specs: Mapping[str, list[TeacherSpec]]
) -> dict[str, list[Option]]:
    from cache_builder.budget import measure
    from cache_builder.calibrate import CalibrationSample

    sample = CalibrationSample.draw(drafted.source, drafted.samples, drafted.views, recipe.calibration_rows)
    found: dict[str, list[Option]] = {}
    with console.status("calibrating") as status:
        for name, available in measure(specs, sample, recipe.runner.batch_size):
            found[name] = available
            status.update(f"calibrated {', '.join(found)}")
    return found


@app.command()
def verify(
    cache: CacheArgument,
    full: Annotated[bool, typer.Option("--full", help="Read every byte and compare checksums.")] = False,
    against_teacher: Annotated[
        int, typer.Option(metavar="N", min=0, help="Recompute N random rows of every teacher and compare.")
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
    if missing := sum(len(opened.spec.shards(name)) for name in names) - shards:
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
    compared = {one.teacher for one in found}
    for name in cache.teachers:
        if name not in compared:
            console.print(f"{name}: no row is committed, so nothing could be compared", style="red")
    return compared == set(cache.teachers) and all(one.kept for one in found)


@app.command()
def repair(cache: CacheArgument, overrides: Overrides = None, images: Images = None) -> None:
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
    opened = FeatureCache.open(cache, images)
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
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Show what a cache holds, whether it is complete, and what is broken.

    Example: `teachercache inspect /data/cache --key n01440764_10026`
    """
    from jobs.inspection import detail_tables, details
    from jobs.inspection.summary import summarize
    from jobs.inspection.tables import summary_table
    from pipeline.errors import RecipeError
    from pipeline.manifest import Manifest
    from pipeline.storage import Storage

    asked = [name for name, value in (("shard", shard), ("row", row), ("key", key)) if value is not None]
    if len(asked) > 1:
        raise RecipeError(
            "Only one thing can be looked at closely.",
            got=" ".join(f"--{name}" for name in asked),
            expected="one of --shard, --row and --key",
            do="run the command once for each",
        )
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
        _print_json(found)
    else:
        console.print(table(found))
    if pictures is not None:
        from jobs.inspection.pictures import pca_maps
        from pipeline.cache import FeatureCache

        pca_maps(FeatureCache.open(cache, images), pictures, num_samples=samples)
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
def view(
    cache: CacheArgument,
    student: Annotated[
        str | None, typer.Option(help="Compare with this student: a folder that `train` wrote (…/student).")
    ] = None,
    images: Images = None,
    server_name: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets in everyone who can reach this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
) -> None:
    """Open a web page to look into a cache: search, click a patch, compare images, teachers and codecs.

    Example: `teachercache view /data/cache --student runs/base/student`
    """
    from jobs.inspection.viewer import serve
    from pipeline.cache import FeatureCache
    from student import load_student

    serve(
        FeatureCache.open(cache, images),
        student=load_student(student) if student else None,
        server_name=server_name,
        port=port,
        on_ready=lambda url: console.print(f"{url} (Ctrl-C ends it)", soft_wrap=True),
    )


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print steps, hours and reads, and stop.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Of a dry run: GPUs to plan for.")] = 1,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of a dry run: images of a cache that is yet to be built.")
    ] = None,
    tflops_per_gpu: Annotated[float, typer.Option(min=0.001, help="Of a dry run: the rate assumed.")] = 200,
) -> None:
    """Train a student in this one process; use `accelerate launch jobs/train_student.py` for several.

    Example: `teachercache train sak_stage1_base cache=/data/cache output=runs/base`
    """
    from pipeline.recipe import load_recipe
    from student.recipe import TrainRecipe

    checked = load_recipe(TrainRecipe, recipe, overrides or [])
    if dry_run:
        from jobs.train_plan import plan_training, train_plan_table

        plan = plan_training(checked, processes=processes, tflops_per_gpu=tflops_per_gpu, num_samples=samples)
        console.print(train_plan_table(plan))
        return
    from student.train import train as train_student

    result = train_student(checked)
    if result.interrupted:
        raise typer.Exit(128 + signal.SIGTERM)
    console.print(
        f"{result.steps} steps, {result.images_per_s:.1f} img/s; student: {result.student}", soft_wrap=True
    )


@app.command()
def evaluate(
    student: StudentArgument,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="pascal_context, nyud or scenes.")],
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Its folder (docs/datasets.md).")],
    split: Annotated[str, typer.Option(help="Which part of it.")] = "val",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write scores, predictions and figures there.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Measure the first few images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and render.")] = 2,
    boundary_processes: Annotated[
        int, typer.Option(min=0, help="Processes that match boundaries beside the student.")
    ] = 0,
    cache: Annotated[
        str | None, typer.Option(help="A cache of these images, for a student that works on features.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a student's tasks on a labelled data set, beside the paper's rows (SAK, B.4).

    `accelerate launch jobs/evaluate_student.py` does the same with several processes.

    Example: `teachercache evaluate runs/stage2/student nyud /data/NYUDv2 -o runs/stage2/scores`
    """
    from pipeline.cache import FeatureCache
    from student import load_student
    from student.datasets import open_dataset
    from student.evaluate import evaluate as evaluate_student

    opened = open_dataset(dataset, root, split)
    found = evaluate_student(
        load_student(student),
        opened,
        name=student,
        output=output,
        max_images=max_images,
        batch_size=batch_size,
        threads=threads,
        boundary_processes=boundary_processes,
        cache=FeatureCache.open(cache) if cache else None,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        from rich.markdown import Markdown

        console.print(Markdown(found.markdown()))


@app.command()
def repsim(
    student: StudentArgument,
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
        _print_json({name: {"levels": s.levels, "mean": s.mean} for name, s in found.items()})
    else:
        console.print(similarity_table(found))


@app.command()
def probe(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Caches, or with --student labelled images.")],
    test: Annotated[str, typer.Argument(metavar="TEST", help="The same, of the images to measure on.")],
    student: Annotated[
        str | None, typer.Option(help="Probe this student: a folder that `train` wrote (…/student).")
    ] = None,
    teachers: Annotated[str, typer.Option(help="Teachers of the caches, separated by commas; or all.")] = "",
    tokens: Annotated[
        Literal["cls", "mean"] | None, typer.Option(help="Of a teacher: these alone instead of both.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels that the student sees; its own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass or read.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and render.")] = 2,
    as_json: Json = False,
) -> None:
    """Top-1 accuracy of a linear classifier on frozen features (SAK, Table 26).

    On a teacher's features straight from two caches, or with `--student` on two places with labelled images.
    `accelerate launch -m jobs.cli probe …` does the same with several processes.

    Example: `teachercache probe /data/train /data/val --student runs/base/student --size 224`
    """
    from pipeline.cache import FeatureCache
    from pipeline.sources import open_source
    from student import load_student
    from student.evaluate import process_state
    from student.image_features import CachedTeacherFeatures, StudentFeatures, require_same_teacher
    from student.linear_probe import linear_probe, probe_table

    device, is_first = process_state().device, os.environ.get("RANK", "0") == "0"
    found = []
    with console.status("") if is_first else nullcontext() as status:
        tell = status.update if status else None
        if student:
            loaded = load_student(student).to(device)
            square = (size, size) if size else None
            images = (
                StudentFeatures(loaded, open_source(place), square, batch_size, threads)
                for place in (train, test)
            )
            found.append(linear_probe(*images, name=student, progress=tell))
        else:
            caches = FeatureCache.open(train), FeatureCache.open(test)
            names = [name.strip() for name in teachers.split(",")] if teachers else caches[0].teachers
            for name in names:
                one, other = (
                    CachedTeacherFeatures(cache, name, tokens, batch_size, threads) for cache in caches
                )
                require_same_teacher(one, other)
                title = name if one.spec.pretrained else f"{name} (random weights)"
                found.append(linear_probe(one, other, name=title, progress=tell))
    if not is_first:
        return
    if as_json:
        _print_json([dataclasses.asdict(one) for one in found])
    else:
        from rich.markdown import Markdown

        console.print(Markdown(probe_table(found)))


@app.command()
def norms(
    cache: CacheArgument,
    first: Annotated[str, typer.Argument(metavar="KEY", help="A sample.")],
    second: Annotated[str, typer.Argument(metavar="KEY", help="Another, such as the same scene, changed.")],
    student: Annotated[
        str | None, typer.Option(help="Show this student too: a folder that `train` wrote (…/student).")
    ] = None,
    level: Annotated[int, typer.Option(help="Counted from 0; -1 is the last.")] = -1,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("norms.png"),
    images: Images = None,
) -> None:
    """Draw what changes in the teachers' tokens, and the student's, between two images (SAK, Figure 6).

    Example: `teachercache norms /data/pair cats dogs --student runs/base/student -o norms.png`
    """
    from pipeline.cache import FeatureCache
    from student import load_student
    from student.figures import norm_figure

    opened = FeatureCache.open(cache, images)
    loaded = load_student(student) if student else None
    norm_figure(opened, (first, second), loaded, level).savefig(output)
    console.print(f"{output}", soft_wrap=True)


@app.command()
def datasets(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="pascal_context, nyud or scenes.")],
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the data set was unpacked.")],
    link: Annotated[
        Path | None, typer.Option(help="Fill this folder with links to each split's images, to build from.")
    ] = None,
) -> None:
    """Name what a folder with a labelled data set has and lacks; docs/datasets.md says what belongs there.

    Exits with status 1 when something is missing.

    Example: `teachercache datasets pascal_context /data/PASCALContext --link /data/pascal_images`
    """
    from jobs.inspection.tables import findings_table
    from student.datasets import check_folder, dataset_class, open_dataset

    findings = check_folder(dataset_class(kind), root)
    console.print(findings_table(findings))
    if link is not None:
        for split in dataset_class(kind).LISTS:
            console.print(f"source.path={open_dataset(kind, root, split).link_images(link)}", soft_wrap=True)
    if any(finding.found < finding.expected for finding in findings):
        raise typer.Exit(EXIT_FAILED)


Output = Annotated[str, typer.Option("-o", "--output", metavar="PLACE", help="A folder or URL.")]


@app.command()
def merge(
    caches: Annotated[list[str], typer.Argument(metavar="CACHE…", help="Two or more caches.")],
    output: Output,
) -> None:
    """Make one cache of several over disjoint samples with the same specs; nothing is computed.

    Shards are hard-linked where that is possible, else copied. Run it again to continue after any stop.

    Example: `teachercache merge /data/part0 /data/part1 -o /data/cache`
    """
    from pipeline.rearrange import merge as merge_caches

    _rearrange(merge_caches(caches, output), "merging")


@app.command()
def subset(
    cache: CacheArgument,
    output: Output,
    keys: Annotated[Path | None, typer.Option(help="A file with the key of a sample in each line.")] = None,
    fraction: Annotated[float | None, typer.Option(help="A random part of the samples.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which part.")] = 0,
    teachers: Annotated[str, typer.Option(help="Teachers to keep, separated by commas.")] = "",
) -> None:
    """Make a smaller cache of some samples, some teachers, or both; nothing is computed.

    Example: `teachercache subset /data/cache -o /data/tenth --fraction 0.1 --teachers dinov2,sam`
    """
    from pipeline.rearrange import subset as take_subset

    names = [name.strip() for name in teachers.split(",")] if teachers else None
    wanted = None if keys is None else [line for line in keys.read_text().splitlines() if line]
    steps = take_subset(cache, output, keys=wanted, fraction=fraction, seed=seed, teachers=names)
    _rearrange(steps, "packing")


@app.command()
def convert(
    cache: CacheArgument,
    output: Output,
    to: Annotated[str, typer.Option(help="webdataset, zarr or theia.")],
    level: Annotated[int, typer.Option(help="theia: which stored level; -1 is the last.")] = -1,
    dataset: Annotated[str, typer.Option(help="theia: the name of the data set.")] = "imagenet",
    split: Annotated[str, typer.Option(help="theia: train, val or test.")] = "train",
) -> None:
    """Write the rows of a cache in the other kind of store, or as Theia's training code reads them.

    Between webdataset and zarr nothing changes but the store: the rows, records and content ids are the
    same. Run it again to continue after any stop.

    Example: `teachercache convert /data/cache -o /data/tars --to webdataset`
    """
    from pipeline.cache import FeatureCache
    from pipeline.errors import RecipeError
    from pipeline.rearrange import convert as convert_cache
    from pipeline.theia import export_theia

    if to in ("webdataset", "zarr"):
        _rearrange(convert_cache(cache, output, to), "converting")  # type: ignore[arg-type]
    elif to == "theia":
        opened = FeatureCache.open(cache)
        total = opened.valid_samples().size * opened.num_views * (len(opened.teachers) + 1)
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("exporting", total=total)
            count = export_theia(
                opened,
                output,
                dataset=dataset,
                split=split,
                level=level,
                progress=lambda done: bar.advance(task, done),
            )
        console.print(f"{output}/{dataset}: {count} samples of {', '.join(opened.teachers)}", soft_wrap=True)
    else:
        raise RecipeError(
            "There is no such form.", got=to, expected="webdataset, zarr or theia", do="choose one with --to"
        )


def _rearrange(steps: Rearrangement, doing: str) -> None:
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(doing, total=len(steps.steps))
        cache = steps.run(lambda: bar.advance(task))
    console.print(
        f"{cache.storage.url}: {cache.num_samples} samples, {cache.num_rows} rows of "
        f"{', '.join(cache.teachers)}; {len(steps.steps)} shards written",
        soft_wrap=True,
    )


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
