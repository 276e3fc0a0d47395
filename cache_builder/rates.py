"""How fast teachers and decoding are: by arithmetic, or measured on this machine's device."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from teachercache.cache_builder.build_recipe import BuildRecipe, SourceRecipe
from teachercache.cache_builder.calibrate import CalibrationSample
from teachercache.cache_builder.draft import Draft, draft
from teachercache.cache_builder.teachers import Teacher
from teachercache.cache_builder.teachers.registry import passes
from teachercache.cache_builder.worker import Worker, decode_threads, device_of
from teachercache.pipeline.errors import ImageDecodeError
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import decode_image
from teachercache.pipeline.views import render_view

_IMAGES = 64  # that are decoded, over and over
_PHOTO = 500, 375  # pixels, ImageNet's most frequent size


@dataclass(frozen=True)
class Rates:
    """Seconds of a view in each teacher (none where another's pass serves it) and in the threads that decode;
    where they were measured, on what.

    A GPU computes while the CPU's cores decode; on a CPU one waits for the other.
    """

    forward_s: Mapping[str, float]
    decode_s: float = 0.0
    device: str | None = None

    @property
    def machine(self) -> str:
        """What its hours are called."""
        return "CPU" if self.device == "CPU" else "GPU"

    def seconds(self, views: Mapping[str, int]) -> float:
        """For so many views through each teacher."""
        forward = sum(self.forward_s[name] * count for name, count in views.items())
        decode = self.decode_s * max(views.values())
        return forward + decode if self.machine == "CPU" else max(forward, decode)


def measure_rates(recipe: BuildRecipe, drafted: Draft | None = None) -> Rates:
    """In `plan.measure_s` seconds, or a pass of each teacher, as the recipe's runner would compute here.

    Decodes images of the source or, without a draft, made ones. Weights are random, which takes as long.
    """
    share = recipe.plan.measure_s / (len(recipe.teachers) + 1)
    with TemporaryDirectory() as folder:
        if drafted is None:
            for index in range(_IMAGES):
                coarse = Image.effect_noise((64, 48), 100).convert("RGB")
                coarse.resize(_PHOTO, Image.Resampling.BICUBIC).save(Path(folder, f"{index}.jpg"))
            drafted = draft(recipe.model_copy(update={"source": SourceRecipe(path=folder)}))
        specs = {name: drafted.spec.teachers[name] for name in recipe.teachers}
        sample, sizes = drafted.calibration_sample(_IMAGES), {spec.render_size for spec in specs.values()}
        threads = decode_threads(recipe.runner, device_of(recipe.runner.device))
        decode_s = _decode_s(sample, sizes, threads, share)
    forward_s, device = dict.fromkeys(specs, 0.0), torch.device("cpu")
    for name, *_ in passes(specs):
        blank = specs[name].model_copy(update={"pretrained": False, "checkpoint": None})
        teacher = Worker({name: blank}, recipe.runner).teachers[name]
        device = next(teacher.parameters()).device
        forward_s[name] = _forward_s(teacher, recipe.runner.batch_size, device, share)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return Rates(forward_s, decode_s, name)


def _forward_s(teacher: Teacher, batch_size: int, device: torch.device, seconds: float) -> float:
    """Of a view, in batches."""
    views_B3HW = torch.zeros(batch_size, 3, *teacher.spec.render_size, dtype=torch.uint8, device=device)

    def compute(count: int) -> None:
        teacher(views_B3HW[:count])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        if device.type == "cuda":
            compute(batch_size)  # compiles
        return _seconds_each(compute, batch_size, seconds, least=max(1, teacher.compiled_for))


def _decode_s(sample: CalibrationSample, sizes: set[Size], threads: int, seconds: float) -> float:
    """Of an image that is read, decoded and rendered at all sizes by one of `threads`."""

    def load(index: int) -> None:
        with suppress(ImageDecodeError):  # the build will quarantine it
            image = decode_image(sample.source.read(*sample.places[index]))
            for size in sizes:
                render_view(image, sample.views[index], size)

    with ThreadPoolExecutor(threads) as pool:
        return _seconds_each(lambda count: list(pool.map(load, range(count))), len(sample.places), seconds)


def _seconds_each(run: Callable[[int], object], most: int, seconds: float, least: int = 1) -> float:
    """What `run(count)` takes, over the count, which doubles from `least` to `most` for so many seconds.

    The first half of the passes warms up, and does not count.
    """
    passes: list[tuple[int, float]] = []
    while not passes or sum(took for _, took in passes) + passes[-1][1] < seconds:
        count, start = min(least << len(passes), most), time.perf_counter()
        run(count)
        passes.append((count, time.perf_counter() - start))
    counted = passes[len(passes) // 2 :]
    return sum(took for _, took in counted) / sum(count for count, _ in counted)
