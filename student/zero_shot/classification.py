"""Zero-shot classification: a student's class tokens against the names of classes (KPU, Figure 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.sources import Source
from teachercache.student.kpu.model import KPU
from teachercache.student.measuring.image_features import StudentFeatures
from teachercache.student.models.student import Student
from teachercache.student.zero_shot.clip import Clip

TEMPLATES = ("a photo of a {}.",)
_BEST, _SHOWN, _AT_ONCE = 5, 20, 1024  # classes of an image, images of a table, images scored at once


@dataclass(frozen=True)
class Classification:
    """`images`: of each its key, label and best classes, `class_1` with `probability_1` and so on. `top1` and
    `top5`: percent of the `labelled` images, those whose label is one of the classes; None without any."""

    name: str
    num_classes: int
    labelled: int
    top1: float | None
    top5: float | None
    images: list[dict[str, Any]]

    def markdown(self) -> str:
        told = f"{self.name}: {len(self.images):,} images, {self.num_classes:,} classes"
        if self.labelled:
            told += f"; top-1 {self.top1:.2f}, top-5 {self.top5:.2f} on {self.labelled:,} images with labels"
        lines = [told, "", "| image | classes |", "|---|---|"]
        for one in self.images[:_SHOWN]:
            places = range(1, min(_BEST, self.num_classes) + 1)
            best = ", ".join(f"{one[f'class_{n}']} {one[f'probability_{n}']:.1%}" for n in places)
            lines.append(f"| {one['key']} | {best} |")
        return "\n".join(lines)


def classify(
    student: Student,
    images: Source,
    clip: Clip,
    classes: Mapping[str, str],
    templates: Sequence[str] = TEMPLATES,
    *,
    teacher: str | None = None,
    name: str = "student",
    batch_size: int = 16,
) -> Classification:
    """`student`, on its device, in the place of the vision tower of `clip`, which moves there too.

    `classes`: the images' label → the name in the templates. `teacher`: the CLIP among the student's, where
    several have a class token. Raises `RecipeError` as `require_clip` does.
    """
    teacher = require_clip(student, clip, teacher)
    assert isinstance(student, KPU)
    tokens = ClassTokens(student, images, student.size_for(teacher), batch_size)
    tokens.teacher, tokens.width = teacher, clip.width
    clip.model.to(student.mean.device)
    names_KP, labels = clip.embed(list(classes.values()), templates), list(classes)
    rows: list[dict[str, Any]] = []
    for tokens_BC in tokens.read(range(len(tokens.labels))).split(_AT_ONCE):
        chances_BK = clip.logits(tokens_BC.to(names_KP.device), names_KP).softmax(1)
        best = chances_BK.topk(min(_BEST, len(labels)))
        for chances, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row = {"key": tokens.keys[len(rows)], "label": tokens.labels[len(rows)]}
            for n, (chance, place) in enumerate(zip(chances, places, strict=True), 1):
                row |= {f"class_{n}": labels[place], f"probability_{n}": chance}
            rows.append(row)
    known = [row for row in rows if row["label"] in classes]
    return Classification(name, len(labels), len(known), _top(1, known), _top(_BEST, known), rows)


def _top(most: int, rows: Sequence[Mapping[str, Any]]) -> float | None:
    hits = sum(any(row["label"] == row.get(f"class_{n}") for n in range(1, most + 1)) for row in rows)
    return 100 * hits / len(rows) if rows else None


class ClassTokens(StudentFeatures):
    """A KPU's version of the class token of `teacher` after the last block, raw."""

    teacher: str

    def _vectors(self, pixels_B3HW: Tensor) -> Tensor:
        assert isinstance(self.student, KPU)
        token_BC = self.student.project(pixels_B3HW, [self.teacher])[self.teacher].image
        assert token_BC is not None
        return token_BC


def require_clip(student: Student, clip: Clip, teacher: str | None = None) -> str:
    """The student's teacher whose class token `clip` goes on with. Raises `RecipeError` for a student without
    such a token, and for a CLIP of another width."""
    able = student.config["class_tokens"] if isinstance(student, KPU) else []
    name = teacher or (able[0] if len(able) == 1 else "")
    if name not in able:
        raise RecipeError(
            "The student has no class token to classify by.",
            got=f"a {student.kind} with class tokens of: {', '.join(able) or 'no teacher'}",
            expected="a KPU, and one of its teachers whose cache has cls_token: true",
            do="name the teacher" if able else "distil such a student (docs/zero_shot.md)",
        )
    if (width := student.config["teacher_dims"][name]) != clip.width:
        raise RecipeError(
            f"This CLIP is another than the student's teacher {name}.",
            got=f"a vision tower of {clip.width} channels",
            expected=f"{width} channels",
            do=f"pass the CLIP whose vision tower {name} is",
        )
    return name


def read_classes(file: Path) -> dict[str, str]:
    """Label → name, of a class a line: its name alone, or the label of its images, a tab, and the name.

    Raises `RecipeError` for fewer than two, and for a label or a name that is there twice.
    """
    split = [line.partition("\t") for line in _lines(file)]
    labels, names = [label for label, *_ in split], [name or label for label, _, name in split]
    doubles = {one for column in (labels, names) for one in column if column.count(one) > 1}
    if doubles or len(labels) < 2:
        raise RecipeError(
            f"{file} is not a list of classes.",
            got=f"twice {', '.join(sorted(doubles)[:5])}" if doubles else f"{len(labels)} classes",
            expected="two classes or more, a line each: its name, or a label, a tab and its name; none twice",
            do="remove duplicates, or make the names differ: crane bird, construction crane",
        )
    return dict(zip(labels, names, strict=True))


def read_templates(file: Path) -> list[str]:
    """A template a line. Raises `RecipeError` for a line without exactly one place for the name."""
    templates = _lines(file)
    if wrong := [line for line in templates or ["no line"] if line.count("{}") != 1]:
        raise RecipeError(
            f"{file} is not a list of templates.",
            got=wrong[0],
            expected="in each line one {} where the name goes, such as: a photo of a {}.",
            do="correct it, or leave it out",
        )
    return templates


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read.", got=error, expected="text in UTF-8") from error
