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
    parts = student.parameters_by_part()
    counts = {**parts, "all": sum(parts.values())}
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
        parts="\n".join(f"| {part} | {count:,} |" for part, count in counts.items()),
        licences=licence_rows(licences),
    )
    with replacing(folder / CARD_FILE) as file:
        file.write_text(text)


_KEPT = {
    "cache": 1,
    "images": 1,
    "output": 1,
    "root": 1,
    "init_from": 2,
}  # <run>/student, or user/name on the Hub


def recipe_for_card(recipe: TrainRecipe) -> dict[str, Any]:
    """The recipe without where things lie on the machine it ran on: of each folder its name alone."""
    told: dict[str, Any] = _by_name(recipe.model_dump(mode="json"))
    return told


def _by_name(tree: Any, key: str = "") -> Any:
    if isinstance(tree, dict):
        return {name: _by_name(one, name) for name, one in tree.items()}
    if key in _KEPT and isinstance(tree, str):
        return "/".join(PurePosixPath(tree).parts[-_KEPT[key] :])
    return [_by_name(one) for one in tree] if isinstance(tree, list) else tree


def _teachers(student: Student, specs: Mapping[str, TeacherSpec]) -> str:
    return "\n".join(_teacher(name, specs.get(name)) for name in student.teachers) or (
        "None: trained on labels alone."
    )


def _teacher(name: str, spec: TeacherSpec | None) -> str:
    if spec is None:
        return f"- {name}, of an earlier run"
    weights = f"weights {spec.weights_hash}" if spec.pretrained else "random weights: a trial, no use"
    return f"- {name}: {spec.model}, {weights}; stored as {spec.codec}, grid {spec.grid.kind}"
