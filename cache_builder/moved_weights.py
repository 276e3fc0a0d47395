"""Weights that moved since the build. Their hash identifies them; their place may change."""

from collections.abc import Mapping

from pydantic import Field

from teachercache.cache_builder.build_recipe import RunnerRecipe
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.records.strict import Strict


class MovedTeacher(Strict):
    """`checkpoint`: where the file of the weights is now."""

    checkpoint: str


class MovedRecipe(Strict):
    """Teachers of a cache, by name, whose weights are now elsewhere."""

    teachers: dict[str, MovedTeacher] = Field(default_factory=dict)

    @property
    def checkpoints(self) -> dict[str, str]:
        return {name: teacher.checkpoint for name, teacher in self.teachers.items()}


class RepairRecipe(RunnerRecipe, MovedRecipe):
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
