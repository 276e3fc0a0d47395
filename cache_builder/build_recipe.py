"""Recipes of builds, plans and repairs, as people write them. `draft.py` resolves them into a `CacheSpec`."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, Compressor, ImagesKind, StoreKind
from teachercache.pipeline.records.strict import Strict
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.sources.several import KIND
from teachercache.pipeline.units import parse_bytes


class SourceRecipe(Strict):
    """Where the images are. `kind: auto` looks at the files. A list of these, each with a `name`, is all."""

    path: str = Field(description="Where the images are, a folder, file or URL.")
    kind: str = Field("auto", description="Format of the source; auto looks at the files.")


class NamedSource(SourceRecipe):
    """One of several sources: the keys of its images begin with its name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="What the keys of its images begin with.")


class RunnerRecipe(Strict):
    """What computes. The keys of actors apply to Ray alone."""

    kind: Literal["local", "ray"] = Field("local", description="In this process, or on a Ray cluster.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    compile: bool | None = Field(None, description="torch.compile; null: on GPUs. Last bits then differ.")
    batch_size: int = Field(16, ge=1, description="Views in one forward pass.")
    decode_threads: int | None = Field(
        None, ge=1, description="Threads that decode images; null: a GPU's share of the cores, 4 without one."
    )
    shards_in_flight: int = Field(2, ge=1, description="Shards that a process overlaps.")
    max_attempts: int = Field(5, ge=1, description="How often a shard is tried.")
    num_actors: int | None = Field(None, ge=1, description="On Ray; null: all it has, and nodes that join.")
    gpus_per_actor: float | None = Field(
        None, ge=0, description="null: 1, but small builds run on CPUs until GPUs come; 0 asks for CPUs."
    )
    cpus_per_actor: float = Field(1, gt=0, description="CPU cores that a process on Ray asks for.")
    stall_timeout_s: float = Field(600, gt=0, description="Seconds that a shard may stand still.")


GpuName = Literal["a100", "h100", "h200", "l40s", "rtx4090", "rtx5090"]


class Gpu(NamedTuple):
    """TFLOP/s in bfloat16: the data sheet's peak (dense), and what teachers' forward passes and a training
    sustain, "computed" as 30% and 20% of it or "measured". `usd_per_hour`: a round price on demand."""

    peak: float
    forward: float
    training: float
    usd_per_hour: float
    origin: str = "computed"


GPUS: dict[GpuName, Gpu] = {
    "a100": Gpu(312, 94, 62, 2),
    "h100": Gpu(989, 300, 200, 3),
    "h200": Gpu(989, 300, 200, 3.5),
    "l40s": Gpu(362, 110, 72, 1),
    "rtx4090": Gpu(165, 50, 33, 0.5),
    "rtx5090": Gpu(210, 63, 42, 0.8),
}


class PlanRecipe(Strict):
    """What `teachercache plan` assumes; state what you see and pay.

    Prices are S3 Standard's; a request reads a row of one array. `render_ms` was measured.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    gpu: GpuName = Field("h100", description="For the rate and the price that are not stated.")
    gpus: int = Field(8, ge=1, description="How many build, and train later.")
    teacher_tflops_per_gpu: float | None = Field(None, gt=0, description="Forward passes; null: by the gpu.")
    measure_s: float = Field(30, gt=0, description="How long `--measure` tries, in seconds.")
    student_images_per_s: float = Field(1000, gt=0, description="Images that a training takes, on all GPUs.")
    runs: int = Field(1, ge=1, description="Trainings that read the cache.")
    epochs: float = Field(30, gt=0, description="Passes of each training.")
    months: float = Field(1, ge=0, description="How long the cache is kept.")
    usd_per_gpu_hour: float | None = Field(None, ge=0, description="Price of a GPU; null: that of the gpu.")
    usd_per_tb_month: float = Field(23, ge=0, description="Price of keeping 10¹² bytes.")
    usd_per_million_requests: float = Field(0.4, ge=0, description="Price of reading rows; free in a folder.")
    storage_gb_per_s: float = Field(10, gt=0, description="10⁹ bytes a second, for all GPUs together.")
    render_ms: float = Field(6.5, gt=0, description="A student's view on a core; 6 to 7 at 384².")
    cores_per_gpu: int = Field(12, ge=1, description="Cores that render for each GPU.")

    @property
    def tflops(self) -> float:
        return self.teacher_tflops_per_gpu or GPUS[self.gpu].forward

    @property
    def gpu_usd_per_s(self) -> float:
        price = self.usd_per_gpu_hour
        return (GPUS[self.gpu].usd_per_hour if price is None else price) / 3600


class BuildRecipe(Strict):
    """A complete statement of a cache build.

    `budget` is of features, their statistics and copied images; `teachercache plan` says which grids and
    codecs fit it. Training reads the pixels that a cache with `images: rendered` keeps.
    """

    cache: str = Field(description="The cache's own folder or URL.")
    source: SourceRecipe
    teachers: dict[str, TeacherRecipe] = Field(min_length=1)
    views: ViewPolicy = ViewPolicy()
    rows_per_shard: int = Field(256, ge=1, description="Views in one file of features.")
    calibration_rows: int = Field(64, ge=1, description="Views from which codecs learn their tables.")
    tables_from: str | None = Field(
        None, description="A cache whose tables teachers of the same name take, so that both can be merged."
    )
    accept_loss: bool = Field(False, description="Build also where a codec ruins the features of a teacher.")
    budget: int | None = Field(None, ge=0, description="The most that the cache may take, such as 6TB.")
    covariance: bool = Field(False, description="Keep covariances among the statistics of features too.")
    images: ImagesKind = Field(
        "reference",
        description="reference: their place; copy: their files; rendered: a student's pixels of each row.",
    )
    store: StoreKind = Field("zarr", description="The format of features.")
    compressor: Compressor | None = Field(None, description="Compresses the rows of a Zarr store.")
    sak_compat: bool = Field(False, description="Feed teachers as SAK's authors do.")
    runner: RunnerRecipe = RunnerRecipe()
    plan: PlanRecipe = PlanRecipe()

    @model_validator(mode="after")
    def _compresses(self) -> Self:
        if self.compressor and self.store != "zarr":
            raise ValueError(
                f"compressor {self.compressor} needs store: zarr, got {self.store}: leave it out"
            )
        return self

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_in_bytes(cls, value: Any) -> Any:
        return None if value is None else parse_bytes(str(value))

    @field_validator("source", mode="before")
    @classmethod
    def _source_from_path(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return {"path": value} if isinstance(value, str) else value
        named = map(NamedSource.model_validate, value)
        several = {one.name: one.model_dump(exclude={"name"}) for one in named}
        if len(several) < max(len(value), 1):
            raise ValueError(
                "several sources have names of their own: [{name: a, path: …}, {name: b, path: …}]"
            )
        return {"path": json.dumps(several), "kind": KIND}

    @field_validator("teachers", mode="before")
    @classmethod
    def _teachers_by_name(cls, value: Any) -> Any:
        """`[dinov2_large, sam_large]` is short for presets (or timm models) under their own names.

        The name omits the tag of a timm model: a student names a part after each teacher, and the name of a
        part cannot contain a dot.
        """
        if isinstance(value, list):
            named = {
                str(model).partition(".")[0]: {"model": model} if "." in str(model) else {} for model in value
            }
            if len(named) < len(value):
                raise ValueError(
                    "two of these have the same name; give them names: {one: {model: …}, other: {model: …}}"
                )
            return named
        if isinstance(value, dict):
            for name in value:
                if not re.fullmatch(r"[A-Za-z0-9][\w-]*", str(name)) or name == IMAGES:
                    raise ValueError(
                        "a teacher's name becomes a folder and a part of the student: letters, digits, '_', "
                        f"'-', got {name!r}; its model may have any name: {{name: {{model: {name}}}}}"
                    )
            return {name: teacher for name, teacher in value.items() if teacher is not None}
        return value


class WeightsPlace(Strict):
    """`checkpoint`: where the file of the weights is now."""

    checkpoint: str


class WeightsRecipe(Strict):
    """Teachers of a cache, by name, whose weights are now elsewhere."""

    teachers: dict[str, WeightsPlace] = Field(default_factory=dict)

    @property
    def checkpoints(self) -> dict[str, str]:
        return {name: teacher.checkpoint for name, teacher in self.teachers.items()}


class RepairRecipe(RunnerRecipe, WeightsRecipe):
    """How to repair, and where the weights are."""


def with_checkpoints(spec: CacheSpec, checkpoints: Mapping[str, str | None]) -> CacheSpec:
    """`spec` with the weights of these teachers in other places; their hashes stay the same.

    Raises `CacheError` for a teacher that `spec` does not have.
    """
    teachers = {
        name: spec.teachers[name].model_copy(update={"checkpoint": checkpoints[name]})
        for name in spec.check_teachers(list(checkpoints))
    }
    return spec.model_copy(update={"teachers": {**spec.teachers, **teachers}})
