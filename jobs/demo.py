"""From photographs to a trained student, in a few minutes on two cores: the script behind `make demo`.

Everything goes to demo/<name of the images>/, a folder for each choice of images. A second run computes only
what is missing.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import torch
import xxhash

from teachercache.jobs.distill import distill
from teachercache.jobs.inspection.pictures import loss_curve, pca_maps
from teachercache.jobs.inspection.summary import summarize
from teachercache.jobs.inspection.tables import summary_table
from teachercache.jobs.launch import run
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import TeacherCacheError, extra
from teachercache.pipeline.places.durable import rename
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.terminal import Terminal
from teachercache.pipeline.verify import verify
from teachercache.student.build import build_student, load_student
from teachercache.student.similarity import representation_similarity

with extra("train"):
    import skimage

PHOTOGRAPHS = {
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("ihc", "moon", "motorcycle_left", "motorcycle_right", "retina", "rocket"),
}
MAX_IMAGES = 48


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--images", type=Path, help=f"a folder of images; {MAX_IMAGES} of them are used")
    parser.add_argument("--pretrained", action="store_true", help="real weights, where they can be had")
    parser.add_argument("--train", action="append", default=[], help="KEY=VALUE for the student; repeat it")
    parser.add_argument("--trained", type=Path, help="a file with DINOv2's weights, ViT-S/14")
    arguments = parser.parse_args()
    console = Terminal()
    started = time.monotonic()
    chosen = choose_images(arguments.images)
    name = f"{arguments.images.resolve().name}_{fingerprint(chosen)}" if arguments.images else "photographs"
    name += "_trained" if arguments.trained else "_pretrained" * arguments.pretrained
    folder = Path("demo", name)
    images = collect_images(chosen, folder / "images")
    cache = distill(
        images,
        cache=folder / "cache",
        output=folder / "run",
        pretrained=arguments.pretrained,
        build=teachers(arguments.pretrained, arguments.trained),
        train=["schedule.max_steps=60", *arguments.train],
    )[0].cache

    console.rule("Verify and inspect")
    if problems := verify(cache, full=True):
        raise TeacherCacheError(f"{len(problems)} shards differ from their commit records: {problems[0]}")
    console.print("Every byte of every shard matches its commit record.")
    console.print(summary_table(summarize(cache.storage)))
    pca_maps(cache, folder / "pca_maps.png")

    console.rule("Results")
    losses = loss_curve(folder / "run" / "metrics.jsonl", folder / "loss.png")
    console.print(f"Loss, first → last step: {losses[0]:.4f} → {losses[-1]:.4f}")
    console.print(*likeness(folder / "run" / "student", cache), sep="\n")
    console.print(f"Pictures: {folder / 'pca_maps.png'} and {folder / 'loss.png'}")
    console.print(f"All of this took {time.monotonic() - started:.0f} s.")
    look = shlex.join([sys.executable, "-m", "teachercache.jobs.cli", "inspect", str(folder / "cache")])
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


def teachers(pretrained: bool, trained: Path | None) -> list[str]:
    """Overrides: SAM at a small size beside the usual teachers, on a local Ray cluster.

    Random blocks of DINOv2 would change nothing at its own LayerScale.
    """
    random = "pretrained: false, layer_scale: 1"
    dinov2 = f"checkpoint: {json.dumps(str(trained))}" if trained else random
    return [
        *("runner.kind=ray", "rows_per_shard=8"),
        "teachers.sam={preset: sam_base, image_size: 256, grid: bilinear}",
        *([] if pretrained else [f"teachers.dinov2={{preset: dinov2_small, {dinov2}}}"]),
    ]


def likeness(saved: Path, cache: FeatureCache) -> list[str]:
    """To each teacher, of the trained student and of a new one."""
    student = load_student(saved)
    torch.manual_seed(0)
    new = build_student("sak", **{key: student.config[key] for key in ("stem", "teacher_dims", "image_size")})
    before, after = (representation_similarity(one, cache) for one in (new, student))
    return [
        f"Representation similarity, {name}: {before[name].mean:.3f} untrained → {after[name].mean:.3f}"
        for name in after
    ]


if __name__ == "__main__":
    run(main)
