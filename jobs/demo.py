"""From photographs to a trained student, in a few minutes on two cores: the script behind `make demo`.

Everything goes to demo/<name of the images>/, a folder for each choice of images. A second run computes only
what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import torch
import xxhash
from rich.console import Console
from rich.table import Table

from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.builder import BuildResult, build
from teachercache.cache_builder.plan import bytes_per_row
from teachercache.cache_builder.teachers import build_teacher
from teachercache.jobs.inspection.pictures import loss_curve, pca_maps
from teachercache.jobs.inspection.summary import summarize
from teachercache.jobs.inspection.tables import summary_table
from teachercache.jobs.launch import run
from teachercache.jobs.recipes import find_recipe
from teachercache.pipeline import FeatureCache
from teachercache.pipeline.errors import TeacherCacheError, WeightsNotFoundError, extra
from teachercache.pipeline.places.durable import rename
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.terminal import Terminal
from teachercache.pipeline.units import human_bytes
from teachercache.pipeline.verify import verify
from teachercache.student import build_student, load_student
from teachercache.student.similarity import Similarity, representation_similarity

with extra("train"):
    import skimage

PHOTOGRAPHS = {
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("ihc", "moon", "motorcycle_left", "motorcycle_right", "retina", "rocket"),
}
MAX_IMAGES = 48
STUDENT_RECIPE = "demo_student"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--images", type=Path, help=f"a folder of images; {MAX_IMAGES} of them are used")
    parser.add_argument("--pretrained", action="store_true", help="real weights, where they can be had")
    parser.add_argument("--trained", type=Path, help="a file with DINOv2's weights, ViT-S/14")
    arguments = parser.parse_args()
    console = Terminal()
    started = time.monotonic()
    chosen = choose_images(arguments.images)
    name = f"{arguments.images.resolve().name}_{fingerprint(chosen)}" if arguments.images else "photographs"
    folder = Path("demo") / (
        name + ("_trained" if arguments.trained else "_pretrained" * arguments.pretrained)
    )

    images = collect_images(chosen, folder / "images")
    console.rule("1. Teachers → cache, on a local Ray cluster")
    result = build(build_recipe(folder, images, arguments.pretrained, arguments.trained, console), console)
    cache = result.cache

    console.rule("2. Verify and inspect")
    problems = verify(cache, full=True)
    if problems:
        raise TeacherCacheError(f"{len(problems)} shards differ from their commit records: {problems[0]}")
    console.print("Every byte of every shard matches its commit record.")
    console.print(summary_table(summarize(cache)))
    pca_maps(cache, folder / "pca_maps.png")

    console.rule("3. Cache → student, under accelerate")
    train(cache, folder)

    console.rule("4. Results")
    losses = loss_curve(folder / "run" / "metrics.jsonl", folder / "loss.png")
    student = load_student(folder / "run" / "student")
    trained = representation_similarity(student, cache)
    torch.manual_seed(0)
    untrained = build_student(
        "sak",
        stem=student.config["stem"],
        teacher_dims=student.config["teacher_dims"],
        image_size=student.image_size,
    )
    console.print(results(result, losses, representation_similarity(untrained, cache), trained))
    if random := ", ".join(cache.spec.random_weights):
        console.print(f"Random weights: {random}. Their figures only show that the parts work together.")
    console.print(f"Pictures: {folder / 'pca_maps.png'} and {folder / 'loss.png'}")
    console.print(f"All of this took {time.monotonic() - started:.0f} s.")
    look = f"{activation()}teachercache inspect {shlex.quote(str(folder / 'cache'))}"
    console.print(f"Look further: {look}")


def choose_images(folder: Path | None = None) -> list[Path]:
    """The photographs inside scikit-image, or images spread evenly over `folder`."""
    if folder is None:
        data = Path(skimage.__file__).parent / "data"
        return [path for path in sorted(data.iterdir()) if path.stem in PHOTOGRAPHS]
    folder = folder.expanduser().resolve()
    samples = open_source(folder, "image_folder").scan()
    paths = sorted(samples.filter(pc.equal(samples["status"], OK))["path"].to_pylist())
    step = max(len(paths) / MAX_IMAGES, 1.0)
    return [folder / paths[int(i * step)] for i in range(min(len(paths), MAX_IMAGES))]


def fingerprint(images: list[Path]) -> str:
    """A hash of where the images are and when they were written: other images get another folder."""
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in images]
    return xxhash.xxh3_64_hexdigest(repr(facts).encode())[:8]


def collect_images(images: list[Path], folder: Path) -> Path:
    """Copies of `images` in a new folder; an existing one is not changed."""
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, path in enumerate(images):
        shutil.copyfile(path, partial / f"{number:03d}_{path.name}")
    rename(partial, folder)
    return folder


def build_recipe(
    folder: Path, images: Path, pretrained: bool, trained: Path | None, console: Console
) -> BuildRecipe:
    overrides = [f"cache={folder / 'cache'}", f"source.path={images}"]
    if trained:
        console.print("DINOv2 with trained weights, the others with random ones.")
        dinov2 = f"teachers.dinov2={{preset: dinov2_small, checkpoint: {json.dumps(str(trained))}}}"
        return find_recipe(BuildRecipe, "demo", [*overrides, dinov2])
    recipe = find_recipe(BuildRecipe, "demo", overrides)
    if not pretrained:
        console.print("Teachers with random weights (PRETRAINED=1 asks for the real ones).")
        return recipe
    keys = ("pretrained=true", "layer_scale=null")
    real = [f"teachers.{name}.{key}" for name in recipe.teachers for key in keys]
    try:
        for teacher in recipe.teachers.values():
            build_teacher(str(teacher.preset), pretrained=True)
    except WeightsNotFoundError as error:
        console.print(f"Real weights cannot be loaded, so they are random:\n{error}", style="yellow")
        return recipe
    console.print("Teachers with their real weights.")
    return find_recipe(BuildRecipe, "demo", [*overrides, *real])


def train(cache: FeatureCache, folder: Path) -> None:
    """`accelerate launch jobs/train_student.py …`, as a user would."""
    batch = min(8, cache.valid_samples().size)
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--num_processes", "1", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
            *(str(Path(__file__).with_name("train_student.py")), STUDENT_RECIPE),
            *(f"cache={cache.storage.url}", f"output={folder / 'run'}", f"batch_size_per_process={batch}"),
        ],
        check=True,
    )


def activation() -> str:
    """The prefix for our commands in a shell that does not find them yet."""
    if shutil.which("teachercache"):
        return ""
    return f"source {os.path.relpath(sys.prefix)}/bin/activate && "


def results(
    result: BuildResult,
    losses: list[float],
    untrained: dict[str, Similarity],
    trained: dict[str, Similarity],
) -> Table:
    spec = result.cache.spec
    table = Table(title="Results", title_justify="left", show_header=False)
    table.add_row(
        "rows", f"{spec.num_rows} ({spec.dataset.num_samples} images × {spec.views.num_views} views)"
    )
    for name, teacher in spec.teachers.items():
        table.add_row(f"bytes per row, {name}", human_bytes(bytes_per_row(teacher)))
    rate = f"{result.views / result.wall_s:.2f} img/s" if result.views else "it was complete already"
    table.add_row("teachers", rate)
    table.add_row("loss, first → last step", f"{losses[0]:.4f} → {losses[-1]:.4f}")
    for name in trained:
        table.add_row(
            f"representation similarity, {name}",
            f"{untrained[name].mean:.3f} untrained → {trained[name].mean:.3f}",
        )
    return table


if __name__ == "__main__":
    run(main)
