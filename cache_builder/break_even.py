"""Should you cache at all? Teachers in every training, against a cache that is built, kept and read. And what
the curve of views and bits advises where you do."""

from importlib.resources import files
from math import inf
from typing import NamedTuple

import yaml

from teachercache.cache_builder.plan import Plan, bytes_per_row
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.units import human_bytes, human_number


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
    spec, found = plan.spec, {}
    if spec.views.margin:
        found["better"] = curve["margin"]
    elif spec.views.num_views == 1 and not spec.views.is_fixed:
        found["better"] = f"{curve['views']}, +{human_bytes(spec.num_rows * plan.read_bytes_per_row)}"
    elif spec.views.policy == "imagenet_train" and spec.views.flip == "random" and spec.views.num_views > 4:
        spared = (spec.num_rows - 4 * spec.dataset.num_samples) * plan.read_bytes_per_row
        found["fewer"] = f"{curve['fewer']}, -{human_bytes(spared)}"
    codec = get_codec(curve["codec"])
    saved = sum(
        max(0, one.bytes_per_row - bytes_per_row(one.spec.model_copy(update={"codec": codec.name})))
        for one in plan.teachers
        if codec.fits(one.spec.width)
    )
    if saved:
        adjoint = any(one.spec.grid.kind == "adjoint" for one in plan.teachers)
        bits = curve["bits_adjoint" if adjoint else "bits"]
        found["smaller"] = f"{bits}, -{human_bytes(spec.num_rows * saved)}"
    return found
