"""Move weights from one student to another, accounting for every tensor."""

import os
from collections.abc import Mapping

import torch

from teachercache.pipeline.errors import CheckpointError, RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.sak.model import SAK


def load_stage_1(student: SAK, source: str | os.PathLike[str], revision: str | None = None) -> None:
    """Give `student` the stem and the paths of a saved student, a folder or a repository of the Hub.

    The position embeddings are resampled to the image size of `student`, and it takes over the
    normalisation of pixels. Only routers and heads may be missing from `source`, and stay as they are.
    Raises `CheckpointError`, naming the tensors, for any other difference, and `RecipeError` if only one of
    the two normalises pixels as SAK's authors do.
    """
    stage_1 = SAK.from_pretrained(source, revision)
    trained_with, given = (one.config["sak_compat"] for one in (stage_1, student))
    if trained_with != given and not (
        torch.equal(stage_1.mean, student.mean) and torch.equal(stage_1.std, student.std)
    ):
        raise RecipeError(
            f"The student in {os.fspath(source)} was trained with another normalisation of pixels.",
            got=f"student.sak_compat: {given}, mean {student.mean.flatten().tolist()}",
            expected=f"student.sak_compat: {trained_with}, mean {stage_1.mean.flatten().tolist()}",
            do=f"set student.sak_compat={str(trained_with).lower()}, or train stage 1 with the other",
        )
    stage_1.stem.resize(student.image_size)
    tensors, own = stage_1.state_dict(), student.state_dict()
    shared = own.keys() & tensors.keys()
    problems = {
        "missing": {name for name in own.keys() - shared if not name.startswith("decoder.")},
        "unknown": tensors.keys() - shared,
        "of another shape": {name for name in shared if own[name].shape != tensors[name].shape},
    }
    if any(problems.values()):
        raise CheckpointError(
            f"The student in {os.fspath(source)} does not fit this one.",
            got="; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names),
            expected="the same stem, teachers (in name and width), reduction and adapter paths",
            do="build this student with those of the other's config.json, or add and remove teachers there",
        )
    student.load_state_dict(tensors, strict=False)


def grow(student: SAK, teacher_dims: Mapping[str, int], image_size: Size) -> None:
    """Let a student of stage 1 continue with these teachers: name → channels.

    It gets a path for each new teacher, and then only the new paths learn (SAK, D.4). If it has them all,
    everything learns except the paths of other teachers.
    Raises `RecipeError` if a teacher and its path differ in width, or the images have another size.
    """
    own = student.config["teacher_dims"]
    if student.image_size != tuple(image_size):
        raise RecipeError(
            "The student to continue with takes images of another size.",
            got=f"views of {tuple(image_size)} in the cache",
            expected=student.image_size,
            do="build a cache of the new teacher with views of the student's size",
        )
    for name in own.keys() & teacher_dims.keys():
        if own[name] != teacher_dims[name]:
            raise RecipeError(
                f"The student already has another teacher called {name}.",
                got=f"{teacher_dims[name]} channels in the cache",
                expected=own[name],
                do="give the new teacher a name of its own in the recipe of the cache",
            )
    new = [name for name in teacher_dims if name not in own]
    for name in new:
        student.add_teacher(name, teacher_dims[name])
    for name in new:
        student.paths[name].requires_grad_(True)
    if not new:
        student.freeze(*(f"paths.{name}" for name in student.teachers if name not in teacher_dims))
