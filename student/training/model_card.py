"""The model card of a finished run."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from teachercache.student.hub import CARD_FILE
from teachercache.student.models.student import Student
from teachercache.student.saving import replacing

if TYPE_CHECKING:
    from teachercache.pipeline.cache import FeatureCache
    from teachercache.student.training.train import TrainResult
    from teachercache.student.training.train_recipe import TrainRecipe


def write_model_card(
    folder: Path,
    student: Student,
    recipe: TrainRecipe,
    cache: FeatureCache,
    result: TrainResult,
) -> None:
    """Write `folder`/README.md: what the student gives, how to use it, and how it came to be."""
    height, width = student.image_size
    head = {
        "library_name": "teachercache",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["knowledge-distillation", "multi-task-learning", student.kind],
    }
    gives = (
        f"{{task: (B, channels, {height}, {width})}} for {', '.join(student.tasks)}"
        if student.tasks
        else f"{{teacher: {student.num_levels} × (B, C, h, w)}} for {', '.join(student.teachers)}"
    )
    loss = "" if result.last_loss is None else f", last loss {result.last_loss:.4f}"
    found = [f"{one.mean:.4f} to {name}" for name, one in result.similarity.items()]
    loss += f", similarity on held-out images {' and '.join(found)}" if found else ""
    text = f"""---
{yaml.safe_dump(head, sort_keys=False)}---
# {student.kind.upper()}, {student.config["stem"]}

```python
from teachercache import load_student

student = load_student("THIS_FOLDER_OR_REPOSITORY")
output = student(student.normalize(images))  # uint8 (B, 3, {height}, {width}) → {gives}
```

## Teachers

{_teachers(student, cache)}

## Training

{result.steps:,} steps{loss}, from {cache.num_samples:,} images in {cache.num_views} views each (cache
`{cache.spec.cache_id}`). The recipe:

```yaml
{yaml.safe_dump(recipe_for_card(recipe), sort_keys=False)}```

| part | parameters |
|---|---|
{_parts(student)}

The licences of the teachers' weights apply to what was distilled from them: see their model cards.
"""
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
        (validation, "cache", 1),
        (validation, "images", 1),
        (dataset, "root", 1),
        (told["student"], "init_from", 2),  # <run>/student, or user/name on the Hub
    ):
        if tree.get(key):
            tree[key] = "/".join(PurePosixPath(tree[key]).parts[-kept:])
    return told


def _teachers(student: Student, cache: FeatureCache) -> str:
    lines = []
    for name in student.teachers:
        teacher = cache.spec.teachers.get(name)
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
