"""`DecoderRecipe`: what a run is that trains decoders on a student's features, or on those of teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from teachercache.pipeline.records.strict import Size, Strict
from teachercache.student.training.student_recipe import AtHome
from teachercache.student.training.train_recipe import (
    DatasetRecipe,
    LoaderRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    Tracker,
    TrainRecipe,
    Weight,
    flatten,
)


class DecoderInput(Strict):
    """A decoder with images of its own. `options`: the numbers of its constructor, such as `width`.
    `weight`: of its loss. `cache`: of the data set's images, from which it reads `teachers` (null: all)
    where the run has no student."""

    kind: Literal["upernet", "mask_dino", "linear"]
    dataset: DatasetRecipe
    batch_size_per_process: int = Field(16, ge=1)
    options: dict[str, int] = Field({})
    weight: Weight = 1.0
    cache: str | None = None
    teachers: tuple[str, ...] | None = None


class DecoderRecipe(Strict):
    """Decoders, by names of your choice, trained side by side: each step takes a batch of each, and their
    losses add up (KPU, "Implementation Details").

    `student`: a folder that `train` wrote, frozen unless it `learns`; null for decoders of cached teachers,
    each with a `cache`. `image_size`: of all of them, in multiples of 32 pixels; without a student the
    caches decide.
    """

    student: AtHome | None = None
    learns: bool = False
    image_size: Size = (512, 512)
    output: AtHome
    decoders: dict[str, DecoderInput] = Field(min_length=1)
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    gradient_accumulation_steps: int = Field(1, ge=1)
    clip_norm: float = Field(0.0, ge=0)
    mixed_precision: Literal["no", "bf16"] = "bf16"
    seed: int = Field(0, ge=0)
    resume: bool = True
    checkpoint_every_steps: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every_steps: int = Field(50, ge=1)
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    loader: LoaderRecipe = LoaderRecipe()

    validation: ClassVar[None] = None  # what other runs have, and their log asks for
    picture_every_steps: ClassVar[int] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        without = [name for name, one in self.decoders.items() if one.cache is None]
        if self.student is None and (self.learns or without):
            raise ValueError(
                f"without a student every decoder needs a cache, and nothing else learns: {without}"
            )
        if self.student is not None and len(without) < len(self.decoders):
            raise ValueError("a student sees images: leave out the decoders' caches, or the student")
        if self.loader.kind != "random":
            raise ValueError("decoders read rows in random order: leave out loader.kind")
        if self.schedule.epochs is not None and len(self.decoders) > 1:
            raise ValueError(
                "decoders with data sets of their own have no epoch in common: give schedule.max_steps"
            )
        return self

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.output) / "checkpoints"

    def images_per_step(self, num_processes: int) -> int:
        """Images of one optimizer step, over all decoders and processes."""
        images = sum(one.batch_size_per_process for one in self.decoders.values())
        return images * self.gradient_accumulation_steps * num_processes


AnyRecipe = TrainRecipe | DecoderRecipe

_PLACES_AND_SPEED = {
    *("student", "output", "resume", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps"),
    *("trackers", "loader", "gradient_accumulation_steps"),
}


def decoder_run_identity(recipe: DecoderRecipe, facts: dict[str, Any]) -> dict[str, Any]:
    """As `run_identity`: what decides the numbers of a run. `facts` stand for the contents of its folders."""
    said = recipe.model_dump(mode="json", exclude=_PLACES_AND_SPEED)
    for one in said["decoders"].values():
        del one["cache"], one["dataset"]["root"], one["batch_size_per_process"]
    return flatten(said | facts)
