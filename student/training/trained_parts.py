"""What of a student learns in a run, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping

from teachercache.pipeline.errors import RecipeError
from teachercache.student.models.lora import add_lora
from teachercache.student.models.student import Student
from teachercache.student.training.train_recipe import StudentRecipe


def set_learning(student: Student, wanted: StudentRecipe, num_levels: Mapping[str, int]) -> None:
    """Leave `requires_grad` exactly where the student learns; low-rank updates are added on the way.

    `num_levels`: of each teacher that is distilled; 0 where the run leaves it out.
    Raises `RecipeError` where nothing is left to learn, and for updates of a stem that is kept.
    """
    if wanted.lora_rank:
        _require_learning_stem(wanted, student)
        add_lora(student.get_submodule("stem"), wanted.lora_rank)
    for name, count in num_levels.items():
        student.keep_levels(name, count)
    student.freeze(*wanted.freeze)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise RecipeError(
            "Nothing of the student is left to learn.",
            got=f"student.freeze: [{', '.join(wanted.freeze)}]",
            expected="a part that is trained: " + ", ".join(name for name, _ in student.named_children()),
            do="freeze less",
        )


def require_kept(wanted: StudentRecipe, student: Student) -> None:
    """Raises `RecipeError` where the recipe says otherwise what a student that goes on keeps."""
    own = {key: student.config[key] for key in ("stem", "reduction", "adapter_paths", "sak_compat")}
    said = {key: getattr(wanted, key) for key in own if key in wanted.model_fields_set}
    if others := [key for key in said if said[key] != own[key]]:
        raise RecipeError(
            f"The student in {wanted.init_from} goes on as it is, and the recipe states another.",
            got=", ".join(f"student.{key}: {said[key]}" for key in others),
            expected=", ".join(f"student.{key}: {own[key]}" for key in others),
            do="state the student's own, or set student.init_from=null for a new student",
        )


def _require_learning_stem(wanted: StudentRecipe, student: Student) -> None:
    """Raises `RecipeError` where low-rank updates would change the stem of a student that grows."""
    if not any(parameter.requires_grad for parameter in student.get_submodule("stem").parameters()):
        raise RecipeError(
            "A student that gets a new teacher keeps its stem, and lora_rank would train it.",
            got=f"student.lora_rank: {wanted.lora_rank}, and a teacher that {wanted.init_from} does not have",
            expected="no updates of the stem: the maps of the teachers that it has stay what they are",
            do="set student.lora_rank=null",
        )
