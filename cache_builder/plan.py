"""What a build will cost, before anything runs, and whether it pays: against teachers in every training."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import inf
from typing import NamedTuple

import pyarrow as pa
import torch
import yaml

from teachercache.cache_builder.build_recipe import BuildRecipe, PlanRecipe
from teachercache.cache_builder.rates import Rates
from teachercache.cache_builder.teachers.registry import passes, teacher_gmacs
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import DiskSpaceError, Problems
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.manifest import Manifest
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, TeacherSpec
from teachercache.pipeline.stores.feature_store import pixels_layout, teacher_layouts
from teachercache.pipeline.stores.shard_format import disk_nbytes
from teachercache.pipeline.units import human_bytes, human_number

_HEADER_BYTES = 512  # of a file of statistics, at most


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher's share. `gmacs` are for one view, none where another's pass serves it; `statistics_bytes`
    for one shard."""

    name: str
    spec: TeacherSpec
    bytes_per_row: int
    statistics_bytes: int
    num_files: int
    missing_shards: int
    missing_rows: int
    gmacs: float


@dataclass(frozen=True)
class Plan:
    """`image_bytes`: of all images to be copied or rendered, `missing_image_bytes`: of those not yet.
    `pixel_bytes`: of a rendered row, or what it would take.

    `free_bytes` is None where the place has no limit that can be asked for (object stores). `measured` rates
    replace those that `prices` assume.
    """

    url: str
    spec: CacheSpec
    teachers: tuple[TeacherPlan, ...]
    image_bytes: int
    missing_image_bytes: int
    pixel_bytes: int
    free_bytes: int | None
    prices: PlanRecipe
    measured: Rates | None = None

    @property
    def rates(self) -> Rates:
        """Those measured, or the arithmetic of the teachers at the TFLOP/s that are assumed."""
        flops_per_s = self.prices.tflops * 1e12
        return self.measured or Rates({one.name: 2e9 * one.gmacs / flops_per_s for one in self.teachers})

    @property
    def bytes_per_row(self) -> int:
        return sum(teacher.bytes_per_row for teacher in self.teachers)

    @property
    def read_bytes_per_row(self) -> int:
        """What training reads of the cache for a view."""
        return self.bytes_per_row + (self.pixel_bytes if self.spec.images == "rendered" else 0)

    @property
    def total_bytes(self) -> int:
        return self.spec.num_rows * self.bytes_per_row + self.fixed_bytes

    @property
    def fixed_bytes(self) -> int:
        """What no grid and no codec changes: copied or rendered images, and the statistics of every shard."""
        statistics = sum(teacher.statistics_bytes for teacher in self.teachers)
        return self.spec.num_shards * statistics + self.image_bytes

    @property
    def missing_bytes(self) -> int:
        features = sum(
            teacher.missing_rows * teacher.bytes_per_row + teacher.missing_shards * teacher.statistics_bytes
            for teacher in self.teachers
        )
        return features + self.missing_image_bytes

    @property
    def num_files(self) -> int:
        """Shard files, statistics and commit records, with the images' where the cache holds any."""
        per_shard = sum(teacher.num_files + 2 for teacher in self.teachers)
        images = 2 * len(self.spec.shards(IMAGES)) if self.spec.images != "reference" else 0
        return self.spec.num_shards * per_shard + images

    @property
    def gpu_hours(self) -> float:
        return self.rates.seconds({teacher.name: teacher.missing_rows for teacher in self.teachers}) / 3600

    @property
    def views_per_s(self) -> float:
        """What a GPU takes through all teachers."""
        return 1 / self.rates.seconds({teacher.name: 1 for teacher in self.teachers})

    @property
    def limits(self) -> dict[str, float]:
        """Views a second that a GPU's share of the machine lets a build take, by what bounds them."""
        prices, row_bytes = self.prices, self.read_bytes_per_row
        decode_s = self.rates.decode_s or prices.render_ms / 1000 / prices.cores_per_gpu
        storage = 1e9 * prices.storage_gb_per_s / prices.gpus / row_bytes
        return {"teachers": self.views_per_s, "decoding": 1 / decode_s, "storage": storage}

    def require(self, budget: int | None = None) -> None:
        """Raises `DiskSpaceError` when what is missing does not fit, or the cache exceeds `budget` bytes."""
        problems = Problems()
        if self.free_bytes is not None and self.missing_bytes > self.free_bytes:
            problems.append(
                DiskSpaceError(
                    "The cache does not fit the disk.",
                    got=f"{human_bytes(self.free_bytes)} free at {self.url}",
                    expected=f"{human_bytes(self.missing_bytes)} for what is still to be built",
                    do="choose another place (cache=…), fewer views, or a smaller grid and codec",
                )
            )
        if budget is not None and self.total_bytes > budget:
            problems.append(
                DiskSpaceError(
                    "The cache is larger than its budget.",
                    got=f"{human_bytes(self.total_bytes)} with the grids and codecs of the recipe",
                    expected=f"at most {human_bytes(budget)}",
                    do="run `teachercache plan` with this budget: it says which grids and codecs keep to it",
                )
            )
        problems.require_none()


def make_plan(recipe: BuildRecipe, spec: CacheSpec, storage: Storage, samples: pa.Table) -> Plan:
    """The plan for the recipe's teachers in the cache `spec`; `samples`: its sample table."""
    manifest = Manifest(storage)
    rows = {shard: len(spec.shard_rows(shard)) for shard in range(spec.num_shards)}
    images = _image_bytes(spec, samples)
    teachers = []
    leading = {names[0] for names in passes({name: spec.teachers[name] for name in recipe.teachers})}
    for name in recipe.teachers:
        teacher = spec.teachers[name]
        missing = rows.keys() - manifest.committed_shards(name)
        teachers.append(
            TeacherPlan(
                name=name,
                spec=teacher,
                bytes_per_row=bytes_per_row(teacher),
                statistics_bytes=statistics_bytes(teacher, spec.covariance),
                num_files=1 if spec.store == "webdataset" else len(teacher_layouts(teacher)),
                missing_shards=len(missing),
                missing_rows=sum(rows[shard] for shard in missing),
                gmacs=teacher_gmacs(teacher) if name in leading else 0.0,
            )
        )
    return Plan(
        url=storage.url,
        spec=spec,
        teachers=tuple(teachers),
        image_bytes=sum(images.values()),
        missing_image_bytes=sum(images[shard] for shard in images.keys() - manifest.committed_shards(IMAGES)),
        pixel_bytes=pixel_bytes(spec),
        free_bytes=storage.free_bytes(),
        prices=recipe.plan,
    )


def pixel_bytes(spec: CacheSpec) -> int:
    """Bytes on disk of one row of rendered images, checksum and index included."""
    return disk_nbytes([pixels_layout(spec.views)])


def _image_bytes(spec: CacheSpec, samples: pa.Table) -> dict[int, int]:
    """Bytes of each shard of copied or rendered images."""
    if spec.images != "copy":
        shards = spec.shards(IMAGES) if spec.images == "rendered" else ()
        return {shard: len(spec.shard_rows(shard)) * pixel_bytes(spec) for shard in shards}
    nbytes = samples["nbytes"].to_numpy()
    return {shard: int(nbytes[spec.shard_samples(shard)].sum()) for shard in spec.shards(IMAGES)}


def bytes_per_row(teacher: TeacherSpec) -> int:
    """Bytes on disk of one row of a teacher, checksums and index included."""
    return disk_nbytes(teacher_layouts(teacher).values())


def statistics_bytes(teacher: TeacherSpec, covariance: bool) -> int:
    """Bytes on disk of the statistics of one shard of a teacher."""
    with torch.device("meta"):
        moments = FeatureMoments.empty(teacher.num_levels, teacher.width, covariance)
        return _HEADER_BYTES + sum(tensor.nbytes for tensor in moments.tensors().values())


def pending(manifest: Manifest, spec: CacheSpec, names: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Who is still missing in each shard: teachers, and "images" where the cache holds them."""
    wanted = [*names, *([IMAGES] if spec.images != "reference" else [])]
    left = {name: set(spec.shards(name)) - manifest.committed_shards(name) for name in wanted}
    missing = {
        shard: tuple(name for name in wanted if shard in left[name]) for shard in range(spec.num_shards)
    }
    return {shard: names for shard, names in missing.items() if names}


class BreakEven(NamedTuple):
    """US dollars of all runs; `online_gpu_hours` of one. A cache pays from `epochs` in all; inf: never."""

    online_gpu_hours: float
    online: float
    build: float
    keep: float
    read: float
    epochs: float

    @property
    def cached(self) -> float:
        return self.build + self.keep + self.read

    @property
    def verdict(self) -> str:
        if self.epochs == inf:
            return "do not cache: to read an epoch costs no less than to run the teachers"
        _, most = max((self.build, "build"), (self.keep, "keep"), (self.read, "read"))
        advice = "cache" if self.cached < self.online else f"do not cache: too dear to {most}"
        return f"{advice}; it pays from {human_number(self.epochs)} epochs in all"


def break_even(plan: Plan) -> BreakEven:
    """At the plan's prices, for what is still to be built.

    A student's own GPU-hours and the reads of images, the same in both, are left out. A build takes until the
    last view is decoded, computed and written, an epoch until the student has taken the last view and
    the storage given it; all GPUs are paid while they wait.
    """
    prices, images = plan.prices, plan.spec.dataset.num_samples
    gpu_usd, bytes_per_s = prices.gpu_usd_per_s, 1e9 * prices.storage_gb_per_s
    online_s = images / plan.views_per_s
    decode_s = max(teacher.missing_rows for teacher in plan.teachers) / plan.limits["decoding"]
    build_s = max(3600 * plan.gpu_hours, decode_s, prices.gpus * plan.missing_bytes / bytes_per_s)
    wait_s = images * max(plan.read_bytes_per_row / bytes_per_s - 1 / prices.student_images_per_s, 0)
    requests = images * sum(teacher.num_files for teacher in plan.teachers if plan.free_bytes is None)
    read = wait_s * prices.gpus * gpu_usd + requests / 1e6 * prices.usd_per_million_requests
    once = plan.total_bytes / 1e12 * prices.usd_per_tb_month * prices.months + build_s * gpu_usd
    saved = online_s * gpu_usd - read
    return BreakEven(
        online_gpu_hours=prices.epochs * online_s / 3600,
        online=prices.runs * prices.epochs * online_s * gpu_usd,
        build=build_s * gpu_usd,
        keep=once - build_s * gpu_usd,
        read=prices.runs * prices.epochs * read,
        epochs=once / saved if saved > 0 else inf,
    )


def advice(plan: Plan) -> dict[str, str]:
    """What makes a cache better, or smaller, by the measured curve of views and bits (docs/views.md)."""
    curve = yaml.safe_load(files("teachercache.cache_builder").joinpath("curve.yaml").read_text("utf-8"))
    spec, lines = plan.spec, {}
    if spec.views.margin:
        lines["better"] = curve["margin"]
    elif spec.views.num_views == 1 and not spec.views.is_fixed:
        lines["better"] = f"{curve['views']}, +{human_bytes(spec.num_rows * plan.read_bytes_per_row)}"
    elif spec.views.policy == "imagenet_train" and spec.views.flip == "random" and spec.views.num_views > 4:
        spared = (spec.num_rows - 4 * spec.dataset.num_samples) * plan.read_bytes_per_row
        lines["fewer"] = f"{curve['fewer']}, -{human_bytes(spared)}"
    codec = get_codec(curve["codec"])
    saved = sum(
        max(0, one.bytes_per_row - bytes_per_row(one.spec.model_copy(update={"codec": codec.name})))
        for one in plan.teachers
        if codec.fits(one.spec.width)
    )
    if saved:
        adjoint = any(one.spec.grid.kind == "adjoint" for one in plan.teachers)
        bits = curve["bits_adjoint" if adjoint else "bits"]
        lines["smaller"] = f"{bits}, -{human_bytes(spec.num_rows * saved)}"
    return lines
