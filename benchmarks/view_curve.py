"""How many views, how wide and in how many bits: a student's quality against the bytes of its cache.

    python -m benchmarks.view_curve --images PHOTOS --labelled TRAIN.parquet TEST.parquet
    python -m benchmarks.view_curve --smoke       the same path in a minute, too short to mean anything

One teacher, a DINOv2 ViT-S/14 that was really trained (`benchmarks.trained`), is cached in many ways: 1 to
16 plain views; wide rows of two margins, of which a student sees another window in each epoch; pairs of
flips; pixels of the student that are jittered anew in each epoch; views that are mixed by CutMix; and one
view in other codecs and on two grids. The ceiling is a cache with a view of its own for every epoch: what a
teacher gives that runs on a fresh crop in each. From every cache a small student is trained from scratch, at
two lengths, with several seeds.

similarity   mean cosine of student and teacher over the trusted levels, both standardised by the teacher's
             mean and deviation in each channel; on images that nobody was trained on, the teacher's own grid
top-1, k-NN  of the student's frozen features, on `--labelled`: a linear classifier, and 20 neighbours
semseg       mean IoU of a linear classifier of patches of synthetic scenes, each patch of its most frequent
             class

Without `--images` students see synthetic scenes. With `--random-teacher` the figures say nothing of trained
teachers, and the table says so. Prints two tables and, last, one line of JSON, which is also written to
OUTPUT/results.json beside OUTPUT/curve.png. The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from benchmarks import trained
from benchmarks.studies import Study, claim_folder, run_all, spread
from teachercache import build, load_student
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.sources import open_source
from teachercache.student.datasets.scenes import Scenes, write_scenes
from teachercache.student.measuring.image_features import StudentFeatures
from teachercache.student.measuring.linear_probe import fit, linear_probe
from teachercache.student.metrics import MeanIoU
from teachercache.student.models.student import Student
from teachercache.student.similarity import token_cosines
from teachercache.student.training.train import train
from teachercache.student.training.train_recipe import TrainRecipe

CURVE_VIT = "curve_vit"
PATCH, SIZE = 16, (96, 96)
MARGINS = (PATCH, 2 * PATCH)  # 1.36 and 1.78 of the bytes: as 64 and 128 pixels at 384²
TEACHER = "dinov2"
ADVISED = {"codec": "int4-hadamard", "grid": "adjoint"}
NEIGHBOURS, TEMPERATURE = 20, 0.07

default_cfgs = {
    CURVE_VIT: {
        "url": "",
        "input_size": (3, *SIZE),
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
}


def curve_vit(pretrained: bool = False, **changes: Any) -> Any:
    """4 blocks of width 128, patches of 16 pixels: 0.8M parameters."""
    arguments = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 3,
        "num_classes": 0,
    }
    return build_model_with_cfg(VisionTransformer, CURVE_VIT, pretrained, **arguments | changes)


register_model(curve_vit)  # so that recipes find it by its name


@dataclass(frozen=True)
class Arm:
    """One way to cache, and what the training recipe says beside it. `views` None: one for each epoch."""

    views: int | None = 1
    margin: int = 0
    flip: str = "random"
    codec: str = ADVISED["codec"]
    grid: str = ADVISED["grid"]
    jitter: bool = False
    least_area: float | None = None  # of an image's area that a stored view shows
    cutmix: bool = False

    @property
    def cache(self) -> str:
        many = "a view an epoch" if self.views is None else f"{self.views} views"
        area = f" from {self.least_area:g}" if self.least_area else ""
        return f"{many} margin {self.margin} {self.flip} {self.codec} {self.grid}{area}"


PLAIN, CEILING = "1 view", "fresh crops"
ARMS: dict[str, Arm] = {
    **{f"{views} view{'s' * (views > 1)}": Arm(views) for views in (1, 2, 4, 8, 16)},
    **{f"{views} wide, {margin} px": Arm(views, margin) for views in (1, 2) for margin in MARGINS},
    # A window shows 56% of its row: of rows that show most of an image it shows what a plain view does.
    f"1 wide, {MARGINS[1]} px, large": Arm(1, MARGINS[1], least_area=0.5),
    f"1 wide, {MARGINS[1]} px, native": Arm(1, MARGINS[1], grid="native"),
    "2 views, a pair of flips": Arm(2, flip="pairs"),
    "1 view, jitter": Arm(1, jitter=True),
    f"1 wide, {MARGINS[1]} px, jitter": Arm(1, MARGINS[1], jitter=True),
    **{
        f"{views} view{'s' * (views > 1)}, cutmix, native": Arm(views, grid="native", cutmix=True)
        for views in (1, 2)
    },
    CEILING: Arm(None),
}
CODES: dict[str, Arm] = {
    f"1 view, {codec}, {grid}": Arm(codec=codec, grid=grid)
    for codec, grid in (
        *((codec, "native") for codec in ("f16", "int8", "int4-hadamard", "int4-rings", "int4-dct-rings")),
        ("int3-dct-rings", "native"),
        ("f16", "adjoint"),
    )
}


@dataclass(frozen=True)
class Settings:
    """All that decides the figures, beside the seeds."""

    images: str | None = None
    labelled: tuple[str, str] | None = None
    random_teacher: bool = False
    train_images: int = 100  # the first of them; all others are held out
    batch_size: int = 16
    short_steps: int = 150
    long_steps: int = 600
    learning_rate: float = 1e-3
    probe_images: int = 1500
    scenes: int = 100
    arms: tuple[str, ...] = (*ARMS, *CODES)


def main() -> None:
    arguments, settings = parse()
    claim_folder(arguments.output, settings)
    started = time.perf_counter()
    curve = Curve(arguments.output, settings)
    seeds = range(arguments.seeds)
    caches = dict.fromkeys(arm(name).cache for name in settings.arms)
    phases = {
        "make_images": ["all"],
        "make_cache": ["held out", *caches],
        "measure": [
            f"{name}; {length}; {seed}"
            for seed in seeds
            for name in settings.arms
            for length in LENGTHS
            if _is_measured(name, length)
        ],
    }
    if not arguments.report:
        run_all([curve], phases, arguments.processes)
    results = collect(curve, seeds) | {
        "wall_s": time.perf_counter() - started,
        "processes": arguments.processes,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.output / "curve.png")
    print_results(results)


LENGTHS = ("short", "long")


def _is_measured(name: str, length: str) -> bool:
    """What codes, grids and CutMix give is asked at the longer length alone."""
    return length == "long" or (name in ARMS and not arm(name).cutmix)


def arm(name: str) -> Arm:
    return (ARMS | CODES)[name]


def parse() -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="photographs to train on (synthetic scenes)")
    parser.add_argument("--labelled", nargs=2, metavar=("TRAIN", "TEST"), help="images with classes")
    parser.add_argument("--random-teacher", action="store_true", help="no package is needed")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"some of: {', '.join([*ARMS, *CODES])}")
    parser.add_argument("--seeds", type=int, help="(3; with --smoke 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/view_curve"), help="(runs/view_curve)")
    parser.add_argument("--processes", type=int, default=max(1, os.cpu_count() or 1), help="side by side")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few images")
    parser.add_argument("--report", action="store_true", help="only print and draw what is done so far")
    parser.add_argument("--short-steps", type=int)
    parser.add_argument("--long-steps", type=int)
    arguments = parser.parse_args()
    if not arguments.random_teacher and (reason := trained.missing()):
        parser.error(f"{reason} (or --random-teacher)")
    known = [*ARMS, *CODES]
    if strangers := set(arguments.arms or ()) - set(known):
        parser.error(f"no arm is called {', '.join(sorted(strangers))}; known: {', '.join(known)}")
    if arguments.seeds is None:
        arguments.seeds = 1 if arguments.smoke else 3
    settings: dict[str, Any] = {"random_teacher": arguments.random_teacher}
    if arguments.smoke:
        settings |= {"batch_size": 4, "short_steps": 2, "long_steps": 3, "probe_images": 20, "scenes": 10}
        settings |= {"arms": ("1 view", f"1 wide, {MARGINS[0]} px", "1 view, jitter", CEILING)}
    if arguments.images:
        settings["images"] = str(arguments.images.resolve())
    if arguments.labelled:
        settings["labelled"] = tuple(str(Path(part).resolve()) for part in arguments.labelled)
    for key in ("short_steps", "long_steps", "arms"):
        if (value := getattr(arguments, key)) is not None:
            settings[key] = tuple(value) if key == "arms" else value
    return arguments, Settings(**settings)


@dataclass(frozen=True)
class Curve(Study):
    """Images, caches that all seeds share, and a student for each arm, length and seed."""

    settings: Settings

    def make_images(self, _: str) -> dict[str, Any]:
        """Links to the photographs, in an order by their names' hashes; and scenes with labels."""
        settings = self.settings
        write_scenes(self.folder / "scenes", settings.scenes, max(4, settings.scenes // 3), SIZE)
        photographs = Path(settings.images) if settings.images else self.folder / "scenes" / "images"
        files = sorted(
            (file for file in photographs.rglob("*") if file.is_file()),
            key=lambda file: hashlib.sha256(file.name.encode()).digest(),
        )
        count = min(settings.train_images, len(files) // 2)
        for number, file in enumerate(files):
            folder = self._images("train" if number < count else "held out")
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / f"{number:06d}{file.suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
        if not settings.random_teacher:
            trained.write_checkpoints(self.folder / "weights")
        return {"train": count, "held out": len(files) - count}

    def make_cache(self, name: str) -> dict[str, Any]:
        held_out = name == "held out"
        one = next((a for a in map(arm, self.settings.arms) if a.cache == name), Arm())
        views: dict[str, Any] = {"policy": "imagenet_eval", "size": SIZE}
        if not held_out:
            views = {"policy": "imagenet_train", "size": SIZE, "num_views": one.views or self._epochs()}
            views |= {"margin": one.margin} if one.margin else {}
            views |= {"flip": one.flip} if one.flip != "random" else {}
            views |= {"scale": (one.least_area, 1)} if one.least_area else {}
        codec, grid = ("f16", "native") if held_out else (one.codec, one.grid)
        recipe = {
            "cache": str(self._cache(name)),
            "source": str(self._images("held out" if held_out else "train")),
            "teachers": {TEACHER: self._teacher() | {"codec": codec, "grid": grid}},
            "views": views,
            "rows_per_shard": 256,
            "runner": {"batch_size": 16, "decode_threads": 1},
        }
        cache = build(BuildRecipe.model_validate(recipe), Console(quiet=True)).cache
        records = cache.manifest.commits(TEACHER).values()
        nbytes = sum(file.nbytes for record in records for file in record.files.values())
        return {"bytes_per_image": nbytes / cache.spec.dataset.num_samples}

    def measure(self, name: str) -> dict[str, Any]:
        """Train the student of `arm; length; seed`, and see how good it is."""
        title, length, seed = name.split("; ")
        one, steps = arm(title), self.settings.short_steps if length == "short" else self.settings.long_steps
        output = self.folder / "runs" / name.replace(";", "").replace(" ", "_")
        recipe = {
            "cache": str(self._cache(one.cache)),
            "output": str(output),
            "student": {"stem": CURVE_VIT, "pretrained": False},
            "optimizer": {"lr": self.settings.learning_rate},
            "schedule": {"max_steps": steps, "warmup_steps": steps // 20, "final_lr": 0},
            "batch_size_per_process": self.settings.batch_size,
            "clip_norm": 10,
            "mixed_precision": "no",
            "seed": int(seed),
            "checkpoint_every_steps": 200,
            "log_every_steps": steps,
            "picture_every_steps": 0,
            "loader": {"threads": 1, "prefetch": 2},
            "cutmix": one.cutmix,
        }
        if one.jitter:
            recipe["student_jitter"] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
        result = train(TrainRecipe.model_validate(recipe))
        if result.student is None:
            raise KeyboardInterrupt(f"{name} was interrupted; the same command continues it")
        student = load_student(result.student).eval()
        levels = self._similarity(student)
        found: dict[str, Any] = {"similarity": statistics.mean(levels), "levels": levels}
        if length == "long":
            found |= {"semseg": self._semseg(student)}
            found |= self._classes(student) if self.settings.labelled else {}
        return found | {"steps": steps}

    @torch.no_grad()
    def _similarity(self, student: Student) -> list[float]:
        """The standardised cosine of each level, on the held-out photographs."""
        cache = FeatureCache.open(self._cache("held out"))
        moments = cache.statistics(TEACHER)
        mean_SC, std_SC = moments.mean_SC.float(), moments.std_SC().float()
        sampler = ShardShuffleSampler(cache, [TEACHER], batch_size_per_process=8, seed=0)
        cosines_BS, left = list[Tensor](), sampler.num_samples
        with FeatureLoader(cache, sampler, [TEACHER], threads=1) as loader:
            for batch in loader:
                maps = student(student.normalize(batch.images), full=True).feature_maps[TEACHER]
                ours = [
                    (map_BChw - mean_C[:, None, None]) / std_C[:, None, None]
                    for map_BChw, mean_C, std_C in zip(maps[-len(mean_SC) :], mean_SC, std_SC, strict=True)
                ]
                targets_BSHWC = batch.features[TEACHER].decode().float()
                theirs_BSHWC = (targets_BSHWC - mean_SC[:, None, None]) / std_SC[:, None, None]
                cosines_BS.append(token_cosines(ours, theirs_BSHWC)[:left])
                left -= len(cosines_BS[-1])
                if not left:
                    break
        return torch.cat(cosines_BS).mean(0).tolist()

    def _classes(self, student: Student) -> dict[str, Any]:
        assert self.settings.labelled
        train_images, test_images = (
            _First(StudentFeatures(student, open_source(path), SIZE), count)
            for path, count in zip(
                self.settings.labelled,
                (self.settings.probe_images, self.settings.probe_images // 3),
                strict=True,
            )
        )
        probe = linear_probe(train_images, test_images, strengths=(1e-1, 1e-2, 1e-3))
        return {"top1": probe.top1, "knn": _neighbours(train_images, test_images)}

    @torch.no_grad()
    def _semseg(self, student: Student) -> float:
        """Mean IoU in percent."""
        features, classes = {}, {}
        for split in ("train", "val"):
            scenes = Scenes(self.folder / "scenes", split)
            tokens, labels = [], []
            for index in range(len(scenes.keys)):
                pixels = torch.from_numpy(np.array(scenes.image(index))).movedim(-1, 0)[None]
                maps = student(student.normalize(pixels), full=True).feature_maps[TEACHER]
                tokens.append(torch.cat([m[0].flatten(1).T for m in maps], 1))
                label = torch.from_numpy(scenes.labels(index, ["semseg"])["semseg"]).long()
                patches = label.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(0, 1).flatten(1)
                labels.append(patches.mode(1).values)
            features[split], classes[split] = torch.cat(tokens), torch.cat(labels)
        mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
        count = Scenes.tasks["semseg"]
        with torch.enable_grad():
            weights = fit((features["train"] - mean) / std, classes["train"], count, 1e-2, max_iterations=60)
        logits = F.linear((features["val"] - mean) / std, weights[:, :-1], weights[:, -1])
        metric = MeanIoU(count)
        metric.update(logits.argmax(1), classes["val"])
        return 100 * float(metric.compute())

    def _teacher(self) -> dict[str, Any]:
        common: dict[str, Any] = {"model": "vit_small_patch14_dinov2"}
        if self.settings.random_teacher:
            return common | {"pretrained": False}
        path = self.folder / "weights" / f"{trained.DINOV2}.safetensors"
        return common | {"checkpoint": str(path), "block_indices": trained.TRUSTED}

    def _epochs(self) -> int:
        train_images: int = self.result("make_images, all")["train"]
        return -(-self.settings.long_steps * self.settings.batch_size // train_images)

    def _images(self, split: str) -> Path:
        return self.folder / "images" / split.replace(" ", "_")

    def _cache(self, name: str) -> Path:
        return self.folder / "caches" / name.replace(" ", "_")


class _First:
    """The first images of a source; their features are made once."""

    def __init__(self, images: StudentFeatures, count: int) -> None:
        self.width, self.labels = images.width, images.labels[:count]
        self._vectors_NF = images.read(range(len(self.labels)))

    def read(self, numbers: Sequence[int]) -> Tensor:
        return self._vectors_NF[list(numbers)]


def _neighbours(train_images: _First, test_images: _First) -> float:
    """Top-1 in percent of the 20 nearest by cosine, weighted by exp(cosine / 0.07) (Wu et al., 2018)."""
    names = sorted({str(label) for label in train_images.labels})
    classes = torch.tensor([names.index(str(label)) for label in train_images.labels])
    train_NF, test_NF = (
        F.normalize(images.read(range(len(images.labels))), dim=1) for images in (train_images, test_images)
    )
    near, index = (test_NF @ train_NF.T).topk(min(NEIGHBOURS, len(classes)), 1)
    votes = torch.zeros(len(test_NF), len(names)).scatter_add(1, classes[index], (near / TEMPERATURE).exp())
    right = [names[i] == str(label) for i, label in zip(votes.argmax(1), test_images.labels, strict=True)]
    return 100 * statistics.fmean(right)


def collect(curve: Curve, seeds: Sequence[int]) -> dict[str, Any]:
    """By length and arm: bytes of an image, and every figure as a list over the seeds that are done."""
    figures: dict[str, dict[str, Any]] = {}
    for length in LENGTHS:
        for name in (name for name in curve.settings.arms if _is_measured(name, length)):
            parts = [f"{name}; {length}; {seed}" for seed in seeds]
            runs = [curve.result(f"measure, {part}") for part in parts if curve.is_done("measure", part)]
            if not runs:
                continue
            nbytes = curve.result(f"make_cache, {arm(name).cache}")["bytes_per_image"]
            row: dict[str, Any] = {"bytes_per_image": nbytes}
            row |= {key: [run[key] for run in runs] for key in MEASURES if key in runs[0]}
            figures.setdefault(length, {})[name] = row
    return {
        "benchmark": "view_curve",
        "settings": asdict(curve.settings),
        "seeds": list(seeds),
        "images": curve.result("make_images, all"),
        "epochs": curve._epochs(),
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
            xscale="log", xlabel="kB of cache an image", title=f"{length}: {_steps(results, length)} steps"
        )
    axes[0].set_ylabel("similarity on held-out images")
    axes[-1].legend(loc="lower right")
    teacher = "random weights" if results["settings"]["random_teacher"] else "DINOv2 ViT-S/14"
    figure.suptitle(f"{teacher}, {results['images']['train']} images, {len(results['seeds'])} seeds")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _kind(name: str) -> str:
    one = arm(name)
    if one.views is None:
        return CEILING
    if one.jitter or one.cutmix or one.flip == "pairs":
        return "flips, jitter, CutMix"
    if one.margin:
        return "wide"
    return "plain" if name in ARMS else "other codes"


def _steps(results: Mapping[str, Any], length: str) -> int:
    return int(results["settings"][f"{length}_steps"])


def print_results(results: Mapping[str, Any]) -> None:
    console, seeds = Console(width=150), len(results["seeds"])
    if results["settings"]["random_teacher"]:
        console.print("The teacher has random weights: these figures say nothing of trained ones.")
    images = results["images"]
    print(
        f"mean ± standard deviation over {seeds} seeds, or as many as are done; {images['train']} images to "
        f"train on, {images['held out']} held out"
    )
    for length in LENGTHS:
        rows, ways = results["figures"][length], results["of_the_way"][length]
        title = f"{length}: {_steps(results, length)} steps of {results['settings']['batch_size']} images"
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
