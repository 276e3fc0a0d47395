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
    """A decoder with images of its own."""

    kind: Literal["upernet", "mask_dino", "linear"] = Field(description="Which decoder.")
    dataset: DatasetRecipe
    batch_size_per_process: int = Field(16, ge=1, description="Images of a step, in each process.")
    options: dict[str, int] = Field({}, description="The numbers of its constructor, such as width.")
    weight: Weight = Field(1.0, description="Of its loss in the sum.")
    cache: str | None = Field(None, description="Of the data set's images, where the run has no student.")
    teachers: tuple[str, ...] | None = Field(None, description="Whose features it reads of it; null: all.")


class DecoderRecipe(Strict):
    """Decoders, by names of your choice, trained side by side: each step takes a batch of each, and their
    losses add up (KPU, "Implementation Details").

    The student is frozen unless it `learns`. Without one, each decoder reads the teachers of a `cache`, which
    decides `image_size`.
    """

    student: AtHome | None = Field(None, description="A folder that `train` wrote; null: on teachers.")
    learns: bool = Field(False, description="Train the student too.")
    image_size: Size = Field((512, 512), description="Of images in pixels; multiples of 32.")
    output: AtHome = Field(description="The folder that the run writes.")
    decoders: dict[str, DecoderInput] = Field(min_length=1)
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches that make up a step.")
    clip_norm: float = Field(0.0, ge=0, description="Longest gradient that is kept whole; 0: all are.")
    mixed_precision: Literal["no", "bf16"] = Field("bf16", description="Of the forward pass, not the losses.")
    seed: int = Field(0, ge=0, description="Of the order and of new weights.")
    resume: bool = Field(True, description="Go on from the last checkpoint in output.")
    checkpoint_every_steps: int = Field(1000, ge=1, description="Steps from one checkpoint to the next.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the last stay.")
    log_every_steps: int = Field(50, ge=1, description="Steps from one line of the log to the next.")
    trackers: tuple[Tracker, ...] = Field(("tensorboard",), description="Logs beside the run's own file.")
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
