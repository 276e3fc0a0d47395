"""What `benchmarks.view_curve` compares: ways to cache a teacher, in two sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer, _cfg

from benchmarks import trained
from teachercache.cache_builder.plan import bytes_per_row
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.stores.feature_store import pixels_layout
from teachercache.pipeline.stores.shard_format import disk_nbytes
from teachercache.pipeline.units import human_bytes

CURVE_VIT = "curve_vit"
PATCH = 16
TEACHER = "dinov2"
ADVISED = {"codec": "int4-hadamard", "grid": "adjoint"}
PLAIN, CEILING = "1 view", "fresh crops"
LENGTHS = ("short", "long")

default_cfgs = {CURVE_VIT: _cfg(input_size=(3, 96, 96), num_classes=0)}


def curve_vit(pretrained: bool = False, **changes: Any) -> Any:
    """4 blocks of width 128, patches of 16 pixels: 0.8M parameters."""
    arguments = {
        "img_size": 96,
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

    def policy(self, size: int, epochs: int) -> ViewPolicy:
        changes = {"scale": (self.least_area, 1)} if self.least_area else {}
        return ViewPolicy.model_validate(
            {"policy": "imagenet_train", "size": size, "num_views": self.views or epochs}
            | {"margin": self.margin, "flip": self.flip, **changes}
        )


def _arms(narrow: int, wide: int) -> dict[str, Arm]:
    """With rows of two margins, in pixels."""
    return {
        **{f"{views} view{'s' * (views > 1)}": Arm(views) for views in (1, 2, 4, 8, 16)},
        **{f"{views} wide, {margin} px": Arm(views, margin) for views in (1, 2) for margin in (narrow, wide)},
        # A window shows a part of its row: of a row that shows most of an image, what a plain view does.
        f"1 wide, {wide} px, large": Arm(1, wide, least_area=0.5),
        f"1 wide, {wide} px, native": Arm(1, wide, grid="native"),
        "2 views, a pair of flips": Arm(2, flip="pairs"),
        "1 view, jitter": Arm(1, jitter=True),
        f"1 wide, {wide} px, jitter": Arm(1, wide, jitter=True),
        **{
            f"{views} view{'s' * (views > 1)}, cutmix, native": Arm(views, grid="native", cutmix=True)
            for views in (1, 2)
        },
        CEILING: Arm(None),
    }


# As many of the bytes as 64 and 128 pixels at 384², 1.36 and 1.78, or the nearest that patches allow.
ARMS, GPU_ARMS = _arms(16, 32), _arms(32, 80)
CODES: dict[str, Arm] = {
    f"1 view, {codec}, {grid}": Arm(codec=codec, grid=grid)
    for codec, grid in (
        *((codec, "native") for codec in ("f16", "int8", "int4-hadamard", "int4-rings", "int4-dct-rings")),
        ("int3-dct-rings", "native"),
        ("f16", "adjoint"),
    )
}
ALL = ARMS | GPU_ARMS | CODES


@dataclass(frozen=True)
class Settings:
    """All that decides the figures, beside the seeds. As they are: the form for two cores."""

    images: str | None = None
    labelled: tuple[str, str] | None = None
    random_teacher: bool = False
    train_images: int = 100  # the first of them; the next ones are held out
    held_out_images: int | None = None  # None: all others
    size: int = 96  # of the student's input, in pixels
    stem: str = CURVE_VIT
    mixed_precision: str = "no"
    batch_size: int = 16
    short_steps: int = 150
    long_steps: int = 600
    learning_rate: float = 1e-3
    probe_images: int = 1500
    scenes: int = 100
    arms: tuple[str, ...] = (*ARMS, *CODES)

    def steps(self, length: str) -> int:
        return self.short_steps if length == "short" else self.long_steps

    def epochs(self, train_images: int) -> int:
        """Those that the longer run begins."""
        return -(-self.long_steps * self.batch_size // train_images)


_SMOKE: dict[str, Any] = {
    "batch_size": 4,
    "short_steps": 2,
    "long_steps": 3,
    "probe_images": 20,
    "scenes": 10,
}
FORMS = {
    "cpu": Settings(),
    "gpu": Settings(
        train_images=1600,
        held_out_images=1000,
        size=224,
        stem="vit_small_patch16_224",
        mixed_precision="bf16",
        batch_size=128,
        probe_images=6000,
        arms=(*GPU_ARMS, *CODES),
    ),
}
SMOKE = {
    "cpu": replace(FORMS["cpu"], **_SMOKE, arms=(PLAIN, "1 wide, 16 px", "1 view, jitter", CEILING)),
    "gpu": replace(FORMS["gpu"], **_SMOKE | {"batch_size": 2}, size=64, arms=("1 wide, 32 px",)),
}


def is_measured(name: str, length: str) -> bool:
    """What codes, grids and CutMix give is asked at the longer length alone."""
    return length == "long" or not (name in CODES or ALL[name].cutmix)


def phases(settings: Settings, seeds: Sequence[int]) -> dict[str, list[str]]:
    """The parts of the study. All caches must be there to go on, so those of most views begin first."""
    caches = {ALL[name].cache: ALL[name].views or math.inf for name in settings.arms}
    return {
        "make_images": ["all"],
        "make_cache": [*sorted(caches, key=lambda cache: -caches[cache]), "held out"],
        "measure": [
            f"{name}; {length}; {seed}"
            for seed in seeds
            for name in settings.arms
            for length in LENGTHS
            if is_measured(name, length)
        ],
    }


def teacher_recipe(settings: Settings, checkpoint: str) -> dict[str, Any]:
    common: dict[str, Any] = {"model": "vit_small_patch14_dinov2"}
    if settings.random_teacher:
        return common | {"pretrained": False}
    return common | {"checkpoint": checkpoint, "block_indices": trained.TRUSTED}


def disk(settings: Settings, train_images: int) -> tuple[int, int]:
    """Views and bytes of all caches together, features and the student's pixels."""
    arms = {ALL[name].cache: ALL[name] for name in settings.arms}
    rows, nbytes = 0, 0
    for arm in arms.values():
        views = arm.policy(settings.size, settings.epochs(train_images))
        recipe = teacher_recipe(settings, "") | {"codec": arm.codec, "grid": arm.grid}
        spec = resolve_teacher(TEACHER, TeacherRecipe(**recipe), views.stored_size)
        rows += views.num_views * train_images
        nbytes += views.num_views * train_images * (bytes_per_row(spec) + disk_nbytes([pixels_layout(views)]))
    return rows, nbytes


def plan(settings: Settings, seeds: Sequence[int], train_images: int) -> str:
    """How much work and disk it takes, in a line."""
    lengths = [part.split("; ")[1] for part in phases(settings, seeds)["measure"]]
    counts = {settings.steps(length): lengths.count(length) for length in LENGTHS}
    steps = sum(length * count for length, count in counts.items())
    rows, nbytes = disk(settings, train_images)
    return (
        f"{len(lengths)} runs ({' and '.join(f'{count} of {length:,}' for length, count in counts.items())} "
        f"steps), {steps:,} steps in all, which see {steps * settings.batch_size:,} views; "
        f"caches of {train_images:,} images: {rows:,} views, {human_bytes(nbytes)}"
    )
