"""The student that a run starts with: new, new on the weights of stage 1, or one that goes on."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.build import build_student
from teachercache.student.models.lora import add_lora
from teachercache.student.models.student import Student, TeacherFacts
from teachercache.student.sak.model import SAK
from teachercache.student.sak.transfer import grow, load_stage_1
from teachercache.student.training.student_recipe import StudentRecipe

_KEPT = {"stem", "reduction", "adapter_paths", "sak_compat"}  # by a student that goes on


def first_student(
    wanted: StudentRecipe,
    teachers: Mapping[str, TeacherFacts],
    image_size: Size,
    tasks: Mapping[str, int] | None,
    *,
    distills: bool,
    blank: bool = False,
) -> Student:
    """The student, with `requires_grad` exactly where it learns.

    `tasks`: name → output channels, None for stage 1. Without `distills` nothing is trained that distillation
    alone needs. `blank`: without weights, on the device "meta", to be asked and counted.
    Raises `RecipeError` for what cannot be built or learns nothing, `CheckpointError` where `init_from` holds
    no student that fits.
    """
    with torch.device("meta") if blank else nullcontext():
        if wanted.init_from and tasks is None:
            saved = SAK.from_pretrained(wanted.init_from, weights=not blank)
            _require_kept(wanted, saved)
            grow(saved, {name: facts.width for name, facts in teachers.items()}, image_size)
            student: Student = saved
        else:
            arguments = wanted.arguments(teachers) | {"image_size": image_size, "tasks": tasks}
            arguments["pretrained"] = wanted.pretrained and not (wanted.init_from or blank)
            student = build_student(**arguments)
            if wanted.init_from and not blank:
                assert isinstance(student, SAK)
                load_stage_1(student, wanted.init_from)
        if wanted.lora_rank:
            _require_learning_stem(wanted, student)
            add_lora(student.get_submodule("stem"), wanted.lora_rank)
    for name, facts in teachers.items():
        student.keep_levels(name, facts.num_levels if distills else 0)
    student.freeze(*wanted.freeze)
    _require_learning(wanted, student)
    return student


def _require_learning(wanted: StudentRecipe, student: Student) -> None:
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise RecipeError(
            "Nothing of the student is left to learn.",
            got=f"student.freeze: [{', '.join(wanted.freeze)}]",
            expected="a part that is trained: " + ", ".join(name for name, _ in student.named_children()),
            do="freeze less",
        )


def _require_kept(wanted: StudentRecipe, student: Student) -> None:
    """Raises `RecipeError` where the recipe says otherwise what a student that goes on keeps."""
    said = wanted.model_dump(include=_KEPT & wanted.model_fields_set)
    if others := [key for key in said if said[key] != student.config[key]]:
        raise RecipeError(
            f"The student in {wanted.init_from} goes on as it is, and the recipe states another.",
            got=", ".join(f"student.{key}: {said[key]}" for key in others),
            expected=", ".join(f"student.{key}: {student.config[key]}" for key in others),
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
