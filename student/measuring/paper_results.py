"""What the papers print, to set beside ours: `paper.yaml` has the numbers and their units."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from teachercache.pipeline.errors import RecipeError
from teachercache.student.models.student import Student

_BACKBONES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L"}


@dataclass(frozen=True)
class PaperRow:
    """`table`: of SAK. `parameters_m`: millions, where the paper counts all of them. `gain`: Δm in percent
    as printed there (SAK, Eq. 7), against the single-task baseline of the same backbone; None where it
    prints none."""

    model: str
    backbone: str
    table: int
    parameters_m: int | None
    scores: dict[str, float]
    gain: float | None

    @property
    def title(self) -> str:
        count = f", {self.parameters_m}M parameters" if self.parameters_m else ""
        return f"{self.model} ({self.backbone}{count}; SAK, Table {self.table})"

    def gain_over(self, tasks: Collection[str]) -> float | None:
        """The printed gain, if it is over these tasks, all and alone."""
        return self.gain if set(tasks) == self.scores.keys() else None


def paper_rows(dataset: str, backbone: str | None, table: int | None = None) -> list[PaperRow]:
    """The paper's rows of a data set: those of one table, or else those that compare students of one size,
    the single-task baseline first; none where the paper has none.

    Raises `RecipeError` for a table without rows of this data set.
    """
    if table is None:
        return [row for row in PAPER_ROWS.get(dataset, ()) if row.backbone == backbone]
    rows = [*PAPER_ROWS.get(dataset, ()), *ABLATION_ROWS.get(dataset, ())]
    found = [row for row in rows if row.table == table]
    if not found:
        raise RecipeError(
            f"No row of this table of the paper is on {dataset}.",
            got=f"Table {table}",
            expected=", ".join(map(str, sorted({row.table for row in rows}))) or "a data set of the paper",
            do="name one of these tables, or leave it out",
        )
    return found


def single_task_scores(dataset: str, backbone: str | None) -> dict[str, float] | None:
    """What the paper's gains refer to."""
    rows = paper_rows(dataset, backbone)
    return rows[0].scores if rows else None


def backbone_of(student: Student) -> str | None:
    """The paper's name of a student of this width (of its teachers, where it has no stem), if it has one."""
    stem = getattr(student, "stem", None)
    width = stem.width if stem is not None else max(student.config["teacher_dims"].values())
    return _BACKBONES.get(width)


def _rows(kind: str) -> dict[str, tuple[PaperRow, ...]]:
    return {
        dataset: tuple(_row(tables["tasks"], *row) for row in tables.get(kind, ()))
        for dataset, tables in _PAPER["students"].items()
    }


def _row(
    tasks: Sequence[str], table: int, backbone: str, model: str, parameters_m: int | None, *values: Any
) -> PaperRow:
    *scores, gain = values
    return PaperRow(model, backbone, table, parameters_m, dict(zip(tasks, scores, strict=True)), gain)


_PAPER = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))

PAPER_ROWS = _rows("compared")
"""By data set: comparisons of students, by their size."""

ABLATION_ROWS = _rows("ablations")
"""By data set: what stands beside a student only when its table is asked for."""

SIMILARITIES: dict[str, dict[str, float]] = _PAPER["similarities"]
"""Of students without and with adapter paths to each teacher's maps, and their mean (SAK, Table 17)."""

LINEAR_PROBES: dict[str, float] = _PAPER["linear_probes"]
"""Top-1 accuracy on ImageNet-1k's validation set, of linear classifiers at 224 pixels (SAK, Table 26)."""

KPU_LINEAR_PROBE: float = _PAPER["kpu_linear_probe"]
"""The same of KPU's Base (KPU, Tables 1 and 2)."""

DEPTH_PROBES: dict[str, tuple[float, float]] = {
    model: (one, four) for model, (one, four) in _PAPER["depth_probes"].items()
}
"""RMSE in metres on NYUd's test images, of a linear layer on the last level and on four (SAK, Table 27)."""

GMACS: dict[str, int] = _PAPER["gmacs"]
"""Of an image through the ViT-L student, and with its teachers through all (SAK, Table 21)."""
