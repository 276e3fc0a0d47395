"""The teachers on their device, in a process that computes features."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.cache_builder.calibrate import Calibration, CalibrationSample, calibrate
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.teachers.teacher import Teacher
from teachercache.cache_builder.teachers.teacher_recipe import build_teachers
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs.kernels import compiles
from teachercache.pipeline.errors import BuildError, CacheMismatchError
from teachercache.pipeline.places.cores import share_of_cores
from teachercache.pipeline.records.spec import TeacherSpec


class Worker:
    """Loads teachers once, then fills the caches that it opens."""

    def __init__(self, teachers: Mapping[str, TeacherSpec], runner: RunnerRecipe) -> None:
        device = device_of(runner.device)
        self._runner = runner
        self.decode_threads = decode_threads(runner, device)
        with _enough_memory():
            self.teachers = build_teachers(teachers, device)
        if compiles(torch.device(device)) if runner.compile is None else runner.compile:
            for teacher in self.teachers.values():
                teacher.compile_blocks(runner.batch_size)

    def weights_hashes(self) -> dict[str, str]:
        return {name: teacher.weights_hash for name, teacher in self.teachers.items()}

    def calibrate(self, sample: CalibrationSample, names: Collection[str]) -> dict[str, Calibration]:
        """Tables and fidelity of the codecs of the named teachers."""
        teachers = {name: self.teachers[name] for name in names}
        with _enough_memory(lambda: _batch_that_fits(teachers.values(), self._runner.batch_size)):
            return calibrate(teachers, sample, self._runner.batch_size)

    def open(self, url: str, images: str | None = None) -> ShardExtractor:
        """An extractor for a cache; `images`: where the source images are, if not where `cache.json` says.

        Raises `CacheMismatchError` if the cache's rows come from other weights.
        """
        cache = FeatureCache.open(url, images)
        for name, loaded in self.weights_hashes().items():
            expected = cache.spec.teachers[name].weights_hash
            if loaded != expected:
                raise CacheMismatchError(
                    f"Teacher {name} does not have the weights that the cache was built with.",
                    got=f"weights hash {loaded}",
                    expected=f"{expected}, as in {url}/cache.json",
                    do="use the same weights file and library versions on every machine",
                )
        return ShardExtractor(
            cache,
            self.teachers,
            batch_size=self._runner.batch_size,
            decode_threads=self.decode_threads,
        )


def decode_threads(runner: RunnerRecipe, device: str) -> int:
    """As the recipe says, or a GPU's share of the cores near it."""
    if runner.decode_threads is None and device.startswith("cuda"):
        return share_of_cores(torch.cuda.get_device_properties(device))
    return runner.decode_threads or 4


@contextmanager
def _enough_memory(batch_that_fits: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Raises `BuildError` where a GPU is too small; calibration takes the first batches."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0]
    else:
        return
    fits = batch_that_fits()  # not while the error holds what did not fit
    raise BuildError(
        "The teachers of this recipe do not fit the memory of this GPU.",
        got=problem,
        expected="a GPU that holds all of them and a batch",
        do=f"set runner.batch_size={fits}, which fits, or take a larger GPU"
        if fits
        else "take a larger GPU, set runner.batch_size=1, or leave teachers to a later build "
        "(teachers.NAME=null)",
    )


def _batch_that_fits(teachers: Collection[Teacher], too_many: int) -> int:
    """The largest of a half of `too_many`, a quarter, … that fits; 0 if a single view does not."""
    device = next(parameter.device for teacher in teachers for parameter in teacher.parameters())
    while too_many := too_many // 2:
        torch.cuda.empty_cache()
        try:
            for teacher in teachers:
                teacher.compiled_for = 0
                with torch.compiler.set_stance("force_eager"):
                    teacher(
                        torch.zeros(too_many, 3, *teacher.spec.render_size, dtype=torch.uint8, device=device)
                    )
        except torch.OutOfMemoryError:
            continue
        break
    return too_many


def device_of(name: str) -> str:
    """What `runner.device` names. Raises `BuildError` for a device that does not exist."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:  # torch raises these for names, builds and drivers
        raise BuildError(
            "The teachers cannot run on this device.",
            got=f"runner.device={name}: {str(error).splitlines()[0]}",
            expected="auto, cpu, cuda or cuda:N, where PyTorch finds one",
            do="set runner.device=auto, or fix the driver (python -m torch.utils.collect_env shows it)",
        ) from error
    return name
