"""`DecoderRecipe`: what a run is that trains decoders on a student's features, or on those of teachers."""

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from teachercache.pipeline.records.strict import Size, Strict
from teachercache.student.decoders import DecoderKind
from teachercache.student.training.student_recipe import AtHome
from teachercache.student.training.train_recipe import (
    PLACES_AND_SPEED,
    DatasetRecipe,
    RunRecipe,
    TrainRecipe,
    Weight,
    flatten,
)


class DecoderInput(Strict):
    """A decoder with images of its own."""

    kind: DecoderKind = Field(description="Which decoder.")
    dataset: DatasetRecipe
    batch_size_per_process: int = Field(16, ge=1, description="Images of a step, in each process.")
    options: dict[str, int] = Field({}, description="The numbers of its constructor, such as width.")
    weight: Weight = Field(1.0, description="Weight of its loss.")
    cache: str | None = Field(None, description="Cache of its images, if there is no student.")
    teachers: tuple[str, ...] | None = Field(None, description="Teachers to read from it; null: all.")


class DecoderRecipe(RunRecipe):
    """Decoders, by names of your choice, trained side by side: each step takes a batch of each, and their
    losses add up (KPU, "Implementation Details").

    The student is frozen unless it `learns`. Without one, each decoder reads the teachers of a `cache`, which
    decides `image_size`.
    """

    student: AtHome | None = Field(None, description="A folder that `train` wrote; null: on teachers.")
    learns: bool = Field(False, description="Train the student too.")
    image_size: Size = Field((512, 512), description="Size of images in pixels, multiples of 32.")
    decoders: dict[str, DecoderInput] = Field(min_length=1)

    makes: ClassVar[str] = "decoders"
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
        single = [name for name, one in self.decoders.items() if one.batch_size_per_process == 1]
        if single := [name for name in single if self.decoders[name].kind == "upernet"]:
            raise ValueError(
                f"upernet's norms need 2 images or more at once: raise batch_size_per_process of {single}"
            )
        if self.loader.kind != "random":
            raise ValueError("decoders read rows in random order: leave out loader.kind")
        if self.schedule.epochs is not None and len(self.decoders) > 1:
            raise ValueError(
                "decoders with data sets of their own have no epoch in common: give schedule.max_steps"
            )
        return self

    @property
    def batch_sizes(self) -> list[int]:
        return [one.batch_size_per_process for one in self.decoders.values()]


AnyRecipe = TrainRecipe | DecoderRecipe


def decoder_run_identity(recipe: DecoderRecipe, facts: dict[str, Any]) -> dict[str, Any]:
    """As `run_identity`: what decides the numbers of a run. `facts` stand for the contents of its folders."""
    said = recipe.model_dump(mode="json", exclude=PLACES_AND_SPEED | {"student"})
    for one in said["decoders"].values():
        del one["cache"], one["dataset"]["root"], one["batch_size_per_process"]
    return flatten(said | facts)
