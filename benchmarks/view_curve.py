"""How many views, how wide and in how many bits: a student's quality against the bytes of its cache.

    python -m benchmarks.view_curve --images PHOTOS --labelled TRAIN.parquet TEST.parquet
    python -m benchmarks.view_curve --form gpu …  a larger student of larger images, 50,000 steps in all
    python -m benchmarks.view_curve --dry-run …   only what it would take
    python -m benchmarks.view_curve --smoke       the same path in a minute, too short to mean anything

One teacher, a DINOv2 ViT-S/14 that was really trained (`benchmarks.trained`), is cached in many ways
(`benchmarks.view_arms`): 1 to 16 plain views; wide rows of two margins, of which a student sees another
window in each epoch; pairs of flips; pixels of the student that are jittered anew in each epoch; views that
are mixed by CutMix; and one view in other codecs and on two grids. The ceiling is a cache with a view of its
own for every epoch: what a teacher gives that runs on a fresh crop in each. From every cache a student is
trained from scratch, at two lengths, with several seeds.

form  student               images       a step      to train on  margins
cpu   0.8M parameters       96×96        16 images   100          16, 32 pixels
gpu   ViT-S/16, bfloat16    224×224      128 images  1,600        32, 80 pixels

Either takes 49,950 steps with all arms and 3 seeds: 72 runs of 600 and 45 of 150. A GPU is used where there
is one, and every core decodes. Caches keep the students' pixels too, which the stated bytes leave out.

similarity   mean cosine of student and teacher over the trusted levels, both standardised by the teacher's
             mean and deviation in each channel; on images that nobody was trained on, the teacher's own grid
top-1, k-NN  of the student's frozen features, on `--labelled`: a linear classifier, and 20 neighbours
semseg       mean IoU of a linear classifier of patches of synthetic scenes, each patch of its most frequent
             class

Needs the package's own dependencies and matplotlib, but not ray, webdataset or omegaconf; with
OUTPUT/weights/dinov2_small.safetensors (88 MB, by `benchmarks.trained`) none of the packages of trained
teachers either. Without `--images` students see synthetic scenes. With `--random-teacher` the figures say
nothing of trained teachers, and the table says so. Prints two tables and, last, one line of JSON, which is
also written to OUTPUT/results.json beside OUTPUT/curve.png. The same command continues where it was
interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import trained
from benchmarks.studies import Study, claim_folder, run_all, spread
from benchmarks.view_arms import (
    ALL,
    CEILING,
    CODES,
    FORMS,
    LENGTHS,
    PLAIN,
    SMOKE,
    TEACHER,
    Arm,
    Settings,
    is_measured,
    phases,
    plan,
    teacher_recipe,
)
from benchmarks.view_measures import classification, semseg, similarity
from teachercache import build, load_student
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.training.train import train
from teachercache.student.training.train_recipe import TrainRecipe


def main() -> None:
    arguments, settings = parse()
    curve = Curve(arguments.output, settings, max(1, (os.cpu_count() or 1) // arguments.processes))
    seeds = range(arguments.seeds)
    if arguments.dry_run:
        print(plan(settings, seeds, train_images(settings)))
        return
    claim_folder(arguments.output, settings)
    started = time.perf_counter()
    if not arguments.report:
        run_all([curve], phases(settings, seeds), arguments.processes)
    results = collect(curve, seeds) | {
        "wall_s": time.perf_counter() - started,
        "processes": arguments.processes,
        "device": _device(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.output / "curve.png")
    print_results(results)


def parse(options: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, default="cpu", help="(cpu)")
    parser.add_argument("--images", type=Path, help="photographs to train on (synthetic scenes)")
    parser.add_argument("--labelled", nargs=2, metavar=("TRAIN", "TEST"), help="images with classes")
    parser.add_argument("--random-teacher", action="store_true", help="no package is needed")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"some of: {', '.join(ALL)}")
    parser.add_argument("--seeds", type=int, help="(3; with --smoke 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/view_curve"), help="(runs/view_curve)")
    parser.add_argument("--processes", type=int, help="side by side (one for each core; of gpu, 2)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few images")
    parser.add_argument("--report", action="store_true", help="only print and draw what is done so far")
    parser.add_argument("--dry-run", action="store_true", help="only say how many steps and bytes it takes")
    parser.add_argument("--short-steps", type=int)
    parser.add_argument("--long-steps", type=int)
    arguments = parser.parse_args(options)
    needs_packages = not (arguments.random_teacher or arguments.dry_run or arguments.report)
    if needs_packages and not _weights(arguments.output).exists() and (reason := trained.missing()):
        parser.error(f"{reason} (or --random-teacher)")
    if strangers := set(arguments.arms or ()) - set(ALL):
        parser.error(f"no arm is called {', '.join(sorted(strangers))}; known: {', '.join(ALL)}")
    if arguments.seeds is None:
        arguments.seeds = 1 if arguments.smoke else 3
    if arguments.processes is None:
        arguments.processes = min(os.cpu_count() or 1, 2 if arguments.form == "gpu" else 1 << 10)
    given = {
        "random_teacher": arguments.random_teacher,
        "images": arguments.images and str(arguments.images.resolve()),
        "labelled": arguments.labelled and tuple(str(Path(part).resolve()) for part in arguments.labelled),
        "arms": arguments.arms and tuple(arguments.arms),
        "short_steps": arguments.short_steps,
        "long_steps": arguments.long_steps,
    }
    usual = (SMOKE if arguments.smoke else FORMS)[arguments.form]
    return arguments, replace(usual, **{key: value for key, value in given.items() if value is not None})


def _weights(output: Path) -> Path:
    return output / "weights" / f"{trained.DINOV2}.safetensors"


def train_images(settings: Settings) -> int:
    """As many as are asked for, but no more than half of those that there are."""
    there = len(_files(Path(settings.images))) if settings.images else sum(_scenes(settings))
    return min(settings.train_images, there // 2)


def _scenes(settings: Settings) -> tuple[int, int]:
    """To train on, and held out."""
    return settings.scenes, max(4, settings.scenes // 3)


def _files(folder: Path) -> list[Path]:
    """In an order by their names' hashes."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Curve(Study):
    """Images, caches that all seeds share, and a student for each arm, length and seed. `threads`: of each
    process that trains, which decode."""

    settings: Settings
    threads: int = 1

    def make_images(self, _: str) -> dict[str, Any]:
        """Links to the photographs, and scenes with labels."""
        settings, size = self.settings, (self.settings.size,) * 2
        write_scenes(self.folder / "scenes", *_scenes(settings), size)
        files = _files(Path(settings.images) if settings.images else self.folder / "scenes" / "images")
        count = train_images(settings)
        held_out = files[count:][: settings.held_out_images]
        for number, file in enumerate(files[:count] + held_out):
            folder = self._images("train" if number < count else "held out")
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / f"{number:06d}{file.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
        if not settings.random_teacher and not _weights(self.folder).exists():
            trained.write_checkpoints(self.folder / "weights")
        return {"train": count, "held out": len(held_out)}

    def make_cache(self, name: str) -> dict[str, Any]:
        settings, held_out = self.settings, name == "held out"
        one = next((ALL[arm] for arm in settings.arms if ALL[arm].cache == name), Arm())
        size = settings.size, settings.size
        codec, grid = ("f16", "native") if held_out else (one.codec, one.grid)
        teacher = teacher_recipe(settings, str(_weights(self.folder)))
        recipe = {
            "cache": str(self._cache(name)),
            "source": str(self._images("held out" if held_out else "train")),
            "teachers": {TEACHER: teacher | {"codec": codec, "grid": grid}},
            "views": ViewPolicy(policy="imagenet_eval", size=size)
            if held_out
            else one.policy(settings.size, self.epochs()),
            "images": "rendered",  # decoded once, and not again in each run
            "rows_per_shard": 256,
            "runner": {"batch_size": settings.batch_size, "decode_threads": self.threads, "compile": False},
        }
        cache = build(BuildRecipe.model_validate(recipe), Console(quiet=True)).cache
        records = cache.manifest.commits(TEACHER).values()
        nbytes = sum(file.nbytes for record in records for file in record.files.values())
        return {"bytes_per_image": nbytes / cache.spec.dataset.num_samples}

    def measure(self, name: str) -> dict[str, Any]:
        """Train the student of `arm; length; seed`, and see how good it is."""
        title, length, seed = name.split("; ")
        one, settings = ALL[title], self.settings
        steps = settings.steps(length)
        output = self.folder / "runs" / name.replace(";", "").replace(" ", "_")
        recipe = {
            "cache": str(self._cache(one.cache)),
            "output": str(output),
            "student": {"stem": settings.stem, "pretrained": False, "compile": False},
            "optimizer": {"lr": settings.learning_rate},
            "schedule": {"max_steps": steps, "warmup_steps": steps // 20, "final_lr": 0},
            "batch_size_per_process": settings.batch_size,
            "clip_norm": 10,
            "mixed_precision": settings.mixed_precision,
            "seed": int(seed),
            "checkpoint_every_steps": 200,
            "log_every_steps": steps,
            "picture_every_steps": 0,
            "loader": {"threads": self.threads, "prefetch": 2},
            "cutmix": one.cutmix,
        }
        if one.jitter:
            recipe["student_jitter"] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
        result = train(TrainRecipe.model_validate(recipe))
        if result.student is None:
            raise KeyboardInterrupt(f"{name} was interrupted; the same command continues it")
        student = load_student(result.student).to(_device()).eval()
        held_out = FeatureCache.open(self._cache("held out"))
        levels = similarity(student, held_out, settings.batch_size // 2, self.threads)
        found: dict[str, Any] = {"similarity": statistics.mean(levels), "levels": levels}
        if length == "long":
            found |= {"semseg": semseg(student, self.folder / "scenes")}
            if settings.labelled:
                of_work = settings.probe_images, settings.batch_size, self.threads
                found |= classification(student, settings.labelled, *of_work)
        shutil.rmtree(output)
        return found | {"steps": steps}

    def epochs(self) -> int:
        return self.settings.epochs(self.result("make_images, all")["train"])

    def _images(self, split: str) -> Path:
        return self.folder / "images" / split.replace(" ", "_")

    def _cache(self, name: str) -> Path:
        return self.folder / "caches" / name.replace(" ", "_")


def collect(curve: Curve, seeds: Sequence[int]) -> dict[str, Any]:
    """By length and arm: bytes of an image, and every figure as a list over the seeds that are done."""
    figures: dict[str, dict[str, Any]] = {length: {} for length in LENGTHS}
    for length in LENGTHS:
        for name in (name for name in curve.settings.arms if is_measured(name, length)):
            parts = [f"{name}; {length}; {seed}" for seed in seeds]
            runs = [curve.result(f"measure, {part}") for part in parts if curve.is_done("measure", part)]
            if not runs:
                continue
            nbytes = curve.result(f"make_cache, {ALL[name].cache}")["bytes_per_image"]
            row: dict[str, Any] = {"bytes_per_image": nbytes}
            row |= {key: [run[key] for run in runs] for key in MEASURES if key in runs[0]}
            figures[length][name] = row
    return {
        "benchmark": "view_curve",
        "settings": asdict(curve.settings),
        "seeds": list(seeds),
        "images": curve.result("make_images, all"),
        "epochs": curve.epochs(),
        "figures": figures,
        "of_the_way": {length: of_the_way(rows) for length, rows in figures.items()},
    }


MEASURES = {"similarity": 4, "top1": 1, "knn": 1, "semseg": 1}  # with the digits that are printed


def of_the_way(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much of the way in similarity from one view to fresh crops each arm goes, in percent, by means."""
    if not {PLAIN, CEILING} <= rows.keys():
        return {}
    mean = {name: statistics.mean(row["similarity"]) for name, row in rows.items()}
    gap = mean[CEILING] - mean[PLAIN]
    return {name: 100 * (value - mean[PLAIN]) / gap for name, value in mean.items()} if gap else {}


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Similarity against bytes, a panel for each length."""
    figure, axes = plt.subplots(1, len(LENGTHS), figsize=(13, 5), layout="constrained")
    kinds = {"plain": "o-", "wide": "s", "flips, jitter, CutMix": "^", "other codes": "x", CEILING: "--"}
    for axis, length in zip(axes, LENGTHS, strict=True):
        groups: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
        for name, row in results["figures"][length].items():
            values = row["similarity"]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            groups[_kind(name)].append((row["bytes_per_image"] / 1e3, statistics.mean(values), deviation))
        for kind, points in groups.items():
            if not points:
                continue
            x, y, spread_y = zip(*sorted(points), strict=True)
            if kind == CEILING:
                axis.axhline(y[0], linestyle="--", color="grey", label=f"{kind}, {x[0]:,.0f} kB")
            else:
                axis.errorbar(x, y, spread_y, fmt=kinds[kind], capsize=3, label=kind)
        axis.set(
            xscale="log",
            xlabel="kB of cache an image",
            title=f"{length}: {results['settings'][f'{length}_steps']} steps",
        )
    axes[0].set_ylabel("similarity on held-out images")
    axes[-1].legend(loc="lower right")
    teacher = "random weights" if results["settings"]["random_teacher"] else "DINOv2 ViT-S/14"
    figure.suptitle(f"{teacher}, {results['images']['train']} images, {len(results['seeds'])} seeds")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _kind(name: str) -> str:
    one = ALL[name]
    if one.views is None:
        return CEILING
    if one.jitter or one.cutmix or one.flip == "pairs":
        return "flips, jitter, CutMix"
    if one.margin:
        return "wide"
    return "other codes" if name in CODES else "plain"


def print_results(results: Mapping[str, Any]) -> None:
    console, seeds, settings = Console(width=150), len(results["seeds"]), results["settings"]
    if settings["random_teacher"]:
        console.print("The teacher has random weights: these figures say nothing of trained ones.")
    images = results["images"]
    print(
        f"mean ± standard deviation over {seeds} seeds, or as many as are done; {images['train']} images to "
        f"train on, {images['held out']} held out"
    )
    for length in LENGTHS:
        rows, ways = results["figures"][length], results["of_the_way"][length]
        title = f"{length}: {settings[f'{length}_steps']} steps of {settings['batch_size']} images"
        heads = ("seeds", "similarity", "to fresh crops %", "top-1 %", "k-NN %", "semseg mIoU %")
        table = Table("", "kB an image", *heads, title=title, title_justify="left")
        for name, row in rows.items():
            cells = [
                spread(row[key], 4 if key == "similarity" else 1) if key in row else "–" for key in MEASURES
            ]
            way = f"{ways[name]:.0f}" if name in ways else ""
            kilobytes, done = f"{row['bytes_per_image'] / 1e3:,.1f}", str(len(row["similarity"]))
            table.add_row(name, kilobytes, done, cells[0], way, *cells[1:])
        console.print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
