"""Verbs that show: inspect, report, view and norms."""

from pathlib import Path
from typing import Annotated

import typer

import teachercache
from teachercache.jobs.cli.terminal import CacheArgument, Images, Json, StudentOption, console, print_json

_MAX_INDEX = 2**63 - 1


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
    from teachercache.jobs.inspection import details
    from teachercache.jobs.inspection.summary import summarize
    from teachercache.pipeline.errors import RecipeError
    from teachercache.pipeline.places.open_storage import open_storage
    from teachercache.pipeline.records.manifest import Manifest

    asked = [name for name, value in (("shard", shard), ("row", row), ("key", key)) if value is not None]
    if len(asked) > 1:
        raise RecipeError(
            "Only one thing can be shown in detail.",
            got=" ".join(f"--{name}" for name in asked),
            expected="one of --shard, --row and --key",
            do="run the command once for each",
        )
    manifest = Manifest(open_storage(cache))
    if shard is not None:
        content = details.shard_details(manifest, shard)
    elif row is not None:
        content = details.row_details(manifest, row)
    elif key is not None:
        content = details.sample_details(manifest, key)
    else:
        content = summarize(manifest.storage)
    if as_json:
        print_json(content)
    else:
        from teachercache.jobs.inspection.tables import details_table, summary_table

        console.print(details_table(content) if asked else summary_table(content))
    if pictures is not None:
        from teachercache.jobs.inspection.pictures import pca_maps

        pca_maps(teachercache.FeatureCache.open(cache, images), pictures, num_samples=samples)
        console.print(f"PCA maps: {pictures}")


def report(
    cache: CacheArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    samples: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Which samples to show.")] = 0,
    images: Images = None,
) -> None:
    """Write one self-contained page to send to a colleague: what is in it, and what the teachers see.

    Example: `teachercache report /data/cache -o report.html --samples 24`
    """
    from teachercache.jobs.inspection.report import write_report

    opened = teachercache.FeatureCache.open(cache, images)
    with console.status("") as status:
        html = write_report(opened, num_samples=samples, seed=seed, progress=status.update)
    output.write_text(html)
    console.print(f"{output} ({len(html.encode()) / 1e6:.1f} MB)")


def view(
    cache: CacheArgument,
    student: StudentOption = None,
    images: Images = None,
    server_name: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets in everyone who can reach this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
) -> None:
    """Open a web page to look into a cache: search, click a patch, compare images, teachers and codecs.

    Example: `teachercache view /data/cache --student runs/base/student`
    """
    from teachercache.jobs.inspection.viewer import serve

    serve(
        teachercache.FeatureCache.open(cache, images),
        student=teachercache.load_student(student) if student else None,
        server_name=server_name,
        port=port,
        on_ready=lambda url: console.print(f"{url} (Ctrl-C ends it)"),
    )


def norms(
    cache: CacheArgument,
    first: Annotated[str, typer.Argument(metavar="KEY", help="A sample.")],
    second: Annotated[str, typer.Argument(metavar="KEY", help="Another, such as the same scene, changed.")],
    student: StudentOption = None,
    level: Annotated[int, typer.Option(help="Counted from 0; -1 is the last.")] = -1,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("norms.png"),
    images: Images = None,
) -> None:
    """Draw what changes in the teachers' tokens, and the student's, between two images (SAK, Figure 6).

    Example: `teachercache norms /data/pair cats dogs --student runs/base/student -o norms.png`
    """
    from teachercache.student.measuring.figures import norm_figure

    opened = teachercache.FeatureCache.open(cache, images)
    loaded = teachercache.load_student(student) if student else None
    norm_figure(opened, (first, second), loaded, level).savefig(output)
    console.print(f"{output}")
