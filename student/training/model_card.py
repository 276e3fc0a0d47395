"""The model card of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from string import Template
from typing import TYPE_CHECKING, Any

import yaml

from teachercache.pipeline.places.hub_storage import CARD_FILE
from teachercache.pipeline.sharing.licences import UNSTATED, card_header, licence_of, licence_rows
from teachercache.student.models.student import Student
from teachercache.student.saving import replacing

if TYPE_CHECKING:
    from teachercache.pipeline.cache import FeatureCache
    from teachercache.pipeline.records.spec import TeacherSpec
    from teachercache.student.training.run import RunResult
    from teachercache.student.training.train_recipe import TrainRecipe


def write_model_card(
    folder: Path,
    student: Student,
    recipe: TrainRecipe,
    caches: Sequence[FeatureCache],
    result: RunResult,
    inherited: Mapping[str, str],
) -> None:
    """Write `folder`/README.md: what the student gives, how it came to be, what licences it `inherited`."""
    height, width = student.image_size
    specs = {name: spec for cache in caches for name, spec in cache.spec.teachers.items()}
    own = {name: licence_of(specs[name]) for name in student.teachers if name in specs}
    licences = dict.fromkeys(student.teachers, UNSTATED) | dict(inherited) | own
    gives = (
        f"{{task: (B, channels, {height}, {width})}} for {', '.join(student.tasks)}"
        if student.tasks
        else f"{{teacher: {student.num_levels} × (B, C, h, w)}} for {', '.join(student.teachers)}"
    )
    loss = "" if result.last_loss is None else f", last loss {result.last_loss:.4f}"
    found = [f"{one.mean:.4f} to {name}" for name, one in result.similarity.items()]
    loss += f", similarity on held-out images {' and '.join(found)}" if found else ""
    text = Template(Path(__file__).with_name("model_card.md.template").read_text()).substitute(
        kind=student.kind,
        header=card_header(licences),
        name=f"{student.kind.upper()}, {student.config['stem']}",
        height=height,
        width=width,
        gives=gives,
        teachers=_teachers(student, specs),
        steps=f"{result.steps:,} steps{loss}",
        images=" and ".join(f"{one.num_samples:,} images in {one.num_views} views each" for one in caches),
        cache_id=", ".join(cache.spec.cache_id for cache in caches),
        recipe=yaml.safe_dump(recipe_for_card(recipe), sort_keys=False),
        parts=_parts(student),
        licences=licence_rows(licences),
    )
    with replacing(folder / CARD_FILE) as file:
        file.write_text(text)


def recipe_for_card(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe without where things lie on the machine it ran on: of each folder its name alone."""
    told = recipe.model_dump(mode="json")
    dataset, validation = (told["multitask"] or {}).get("dataset", {}), told["validation"] or {}
    for tree, key, kept in (
        (told, "cache", 1),
        (told, "images", 1),
        (told, "output", 1),
        *((one, key, 1) for one in told["inputs"] for key in ("cache", "images")),
        (validation, "cache", 1),
        (validation, "images", 1),
        (dataset, "root", 1),
        (told["student"], "init_from", 2),  # <run>/student, or user/name on the Hub
    ):
        if tree.get(key):
            tree[key] = "/".join(PurePosixPath(tree[key]).parts[-kept:])
    return told


def _teachers(student: Student, specs: Mapping[str, TeacherSpec]) -> str:
    lines = []
    for name in student.teachers:
        teacher = specs.get(name)
        if teacher is None:
            lines.append(f"- {name}, of an earlier run")
            continue
        weights = (
            f"weights {teacher.weights_hash}" if teacher.pretrained else "random weights: a trial, no use"
        )
        lines.append(
            f"- {name}: {teacher.model}, {weights}; stored as {teacher.codec}, grid {teacher.grid.kind}"
        )
    return "\n".join(lines) or "None: trained on labels alone."


def _parts(student: Student) -> str:
    parts = student.parameters_by_part()
    return "\n".join(
        f"| {part} | {count:,} |" for part, count in (*parts.items(), ("all", sum(parts.values())))
    )
