"""The recipe of a build, as people write it. `draft.py` resolves it into a `CacheSpec`."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from teachercache.cache_builder.prices import PlanRecipe
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.records.spec import IMAGES, Compressor, ImagesKind, StoreKind
from teachercache.pipeline.records.strict import Strict
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.sources.several import KIND
from teachercache.pipeline.units import parse_bytes


class SourceRecipe(Strict):
    """Where the images are. `kind: auto` looks at the files. A list of these, each with a `name`, is all."""

    path: str
    kind: str = "auto"


class NamedSource(SourceRecipe):
    """One of several sources: the keys of its images begin with its name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")


class RunnerRecipe(Strict):
    """What computes. `num_actors`, `gpus_per_actor` and `cpus_per_actor` apply to Ray alone.

    `num_actors: null` uses the whole cluster, and nodes that join later; `gpus_per_actor: null` means 1, but
    small teachers run on CPUs until GPUs come; 0 asks for CPUs. `shards_in_flight` shards a process overlap.
    `compile`: torch.compile for the teachers' blocks; null for on GPUs. Features differ in their last bits.
    `stall_timeout_s`: after how long without a batch or an image a shard counts as hanging.
    """

    kind: Literal["local", "ray"] = "local"
    device: str = "auto"
    compile: bool | None = None
    batch_size: int = Field(16, ge=1)
    decode_threads: int = Field(4, ge=1)
    shards_in_flight: int = Field(2, ge=1)
    max_attempts: int = Field(5, ge=1)
    num_actors: int | None = Field(None, ge=1)
    gpus_per_actor: float | None = Field(None, ge=0)
    cpus_per_actor: float = Field(1, gt=0)
    stall_timeout_s: float = Field(600, gt=0)


class BuildRecipe(Strict):
    """A complete statement of a cache build.

    `calibration_rows`: from how many rows codecs learn their tables. `tables_from`: a cache whose tables they
    take instead, each teacher those of the same name there, so that the two caches can be merged.
    `accept_loss`: build also where a codec ruins the features of a teacher, which is else an error.
    `budget` ("6TB", or a number of bytes): the most that features, their statistics and copied images may
    take; `teachercache plan` says which grids and codecs fit it. `covariance`: include it in the statistics
    of the features, in addition to mean and variance. `images`: what the cache keeps of them beside their
    place: nothing, copies of their files, or the student's pixels of every row, which training then reads.
    `compressor`: of a Zarr store's rows.
    """

    cache: str
    source: SourceRecipe
    teachers: dict[str, TeacherRecipe] = Field(min_length=1)
    views: ViewPolicy = ViewPolicy()
    rows_per_shard: int = Field(256, ge=1)
    calibration_rows: int = Field(64, ge=1)
    tables_from: str | None = None
    accept_loss: bool = False
    budget: int | None = Field(None, ge=0)
    covariance: bool = False
    images: ImagesKind = "reference"
    store: StoreKind = "zarr"
    compressor: Compressor | None = None
    sak_compat: bool = False
    runner: RunnerRecipe = RunnerRecipe()
    plan: PlanRecipe = PlanRecipe()

    @model_validator(mode="after")
    def _compresses(self) -> Self:
        if self.compressor and self.store != "zarr":
            raise ValueError(
                f"compressor {self.compressor} needs store: zarr, got {self.store}: leave it out"
            )
        for name, teacher in self.teachers.items():
            if str(teacher.codec).startswith("bitround") and not self.compressor:
                raise ValueError(f"codec {teacher.codec} of {name} saves nothing alone: add compressor=zstd")
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
        several = {
            one.name: {"path": one.path, "kind": one.kind} for one in map(NamedSource.model_validate, value)
        }
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
            return {
                name: {} if teacher == {} else teacher
                for name, teacher in value.items()
                if teacher is not None
            }
        return value
