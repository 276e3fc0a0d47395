"""Rows of the paper's tables, to set beside ours: percent, degrees (normals) and metres (depth)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from teachercache.pipeline.errors import RecipeError
from teachercache.student.models.base import Student

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


def _pascal(
    model: str, backbone: str, table: int, parameters_m: int | None, *values: float, gain: float | None
) -> PaperRow:
    tasks = "semseg", "parts", "saliency", "normals", "boundary"
    return PaperRow(model, backbone, table, parameters_m, dict(zip(tasks, values, strict=True)), gain)


def _nyud(
    model: str, backbone: str, table: int, parameters_m: int | None, *values: float, gain: float | None
) -> PaperRow:
    tasks = "semseg", "depth", "normals", "boundary"
    return PaperRow(model, backbone, table, parameters_m, dict(zip(tasks, values, strict=True)), gain)


def _ablation(table: int, model: str, *values: float, gain: float | None) -> PaperRow:
    """Of ViT-B students on PASCAL-Context."""
    return _pascal(model, "ViT-B", table, None, *values, gain=gain)


_SINGLE, _MULTI = "Single-task baseline", "Multi-task baseline"
_OF_B, _OF_L = "SAK of ViT-B teachers", "SAK of ViT-L teachers"

PAPER_ROWS: dict[str, tuple[PaperRow, ...]] = {
    "pascal_context": (
        _pascal(_SINGLE, "ViT-S", 15, 117, 77.59, 66.58, 84.60, 14.16, 70.95, gain=0.00),
        _pascal(_MULTI, "ViT-S", 15, 29, 73.94, 61.22, 83.96, 14.89, 67.03, gain=-4.84),
        _pascal("Theia", "ViT-S", 15, 29, 70.82, 62.71, 83.95, 14.87, 67.52, gain=-5.03),
        _pascal(_OF_B, "ViT-S", 15, 34, 78.66, 68.46, 84.66, 14.33, 70.28, gain=0.43),
        _pascal(_SINGLE, "ViT-B", 13, 462, 80.25, 70.54, 84.54, 13.57, 74.22, gain=0.00),
        _pascal(_MULTI, "ViT-B", 13, 116, 76.76, 65.26, 84.39, 13.98, 70.37, gain=-4.04),
        _pascal("RADIO", "ViT-B", 13, 128, 78.06, 68.13, 85.18, 13.59, 72.64, gain=-1.53),
        _pascal("Theia", "ViT-B", 13, 115, 76.51, 67.53, 84.38, 14.56, 70.34, gain=-4.33),
        _pascal(_OF_B + ", frozen", "ViT-B", 12, None, 80.61, 71.15, 83.34, 15.22, 71.94, gain=-3.07),
        _pascal(_OF_B, "ViT-B", 12, 134, 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _pascal(_OF_L, "ViT-B", 13, 134, 81.88, 74.30, 84.79, 14.02, 74.09, gain=0.83),
        _pascal(_SINGLE, "ViT-L", 5, 1573, 81.61, 72.77, 83.80, 13.87, 75.24, gain=0.00),
        _pascal(_MULTI, "ViT-L", 5, 357, 79.26, 68.28, 84.16, 14.06, 71.59, gain=-2.97),
        _pascal("RADIO", "ViT-L", 5, 372, 81.11, 71.50, 85.17, 13.49, 74.80, gain=0.29),
        _pascal(_OF_L, "ViT-L", 5, 407, 84.01, 76.99, 84.65, 13.82, 76.27, gain=2.30),
    ),
    "nyud": (
        _nyud(_SINGLE, "ViT-S", 16, 94, 48.11, 0.5911, 20.27, 75.17, gain=0.00),
        _nyud(_MULTI, "ViT-S", 16, 28, 45.87, 0.6626, 20.55, 74.44, gain=-4.78),
        _nyud("Theia", "ViT-S", 16, 28, 46.54, 0.6047, 20.95, 74.59, gain=-2.42),
        _nyud(_OF_B, "ViT-S", 16, 32, 54.30, 0.5785, 19.67, 76.58, gain=4.96),
        _nyud(_SINGLE, "ViT-B", 14, 369, 51.15, 0.5792, 19.77, 77.35, gain=0.00),
        _nyud(_MULTI, "ViT-B", 14, 110, 49.27, 0.5823, 19.92, 75.88, gain=-1.72),
        _nyud("RADIO", "ViT-B", 14, 122, 55.03, 0.5186, 18.49, 77.97, gain=6.33),
        _nyud("Theia", "ViT-B", 14, 109, 51.80, 0.5367, 19.70, 76.08, gain=1.83),
        _nyud(_OF_L, "ViT-B", 14, 126, 59.93, 0.4942, 17.60, 78.60, gain=11.11),
        _nyud(_SINGLE, "ViT-L", 6, 1259, 54.19, 0.5560, 19.22, 78.09, gain=0.00),
        _nyud(_MULTI, "ViT-L", 6, 346, 52.42, 0.5413, 19.29, 76.50, gain=-0.76),
        _nyud("RADIO", "ViT-L", 6, 362, 59.32, 0.4698, 17.46, 79.41, gain=8.95),
        _nyud(_OF_L, "ViT-L", 6, 394, 63.18, 0.4313, 16.25, 79.43, gain=14.05),
    ),
}
"""By data set: comparisons of students, by their size."""

ABLATION_ROWS: dict[str, tuple[PaperRow, ...]] = {
    "pascal_context": (
        _ablation(2, "Oracle of teachers", 81.18, 74.38, 81.48, 16.21, 75.89, gain=None),
        _ablation(2, "Student without biases", 80.18, 69.13, 82.72, 16.00, 71.16, gain=None),
        _ablation(3, "no adapter paths, no routers", 80.97, 69.71, 84.64, 14.11, 72.82, gain=-1.21),
        _ablation(3, "adapter paths, summed", 81.26, 69.92, 84.31, 14.45, 71.41, gain=-2.03),
        _ablation(3, "adapter paths and routers", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(4, "neither stage 1 nor distillation", 76.76, 65.26, 84.39, 13.98, 70.37, gain=-4.04),
        _ablation(4, "distillation, no stage 1", 77.06, 65.08, 84.67, 13.83, 70.74, gain=-3.63),
        _ablation(4, "stage 1, no distillation in stage 2", 80.48, 71.16, 85.04, 13.92, 72.60, gain=-0.60),
        _ablation(4, "stage 1 and distillation", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(7, "Multi-task baseline", 76.76, 65.26, 84.39, 13.98, 70.37, gain=-4.04),
        _ablation(7, "DINOv2", 79.05, 69.55, 84.29, 14.07, 71.14, gain=-2.21),
        _ablation(7, "CLIP", 80.12, 67.57, 83.81, 14.41, 70.62, gain=-3.26),
        _ablation(7, "SAM", 63.47, 63.99, 85.02, 13.95, 73.27, gain=-6.74),
        _ablation(7, "DINOv2+CLIP", 81.53, 71.95, 84.49, 14.16, 72.59, gain=-0.60),
        _ablation(7, "DINOv2+CLIP+SAM", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _pascal("SAK of ViT-B teachers", "ViT-S", 8, None, 78.66, 68.46, 84.66, 14.33, 70.28, gain=None),
        _pascal("SAK of ViT-B teachers", "ViT-B", 8, None, 81.65, 72.38, 84.87, 14.05, 73.23, gain=None),
        _pascal("SAK of ViT-L teachers", "ViT-B", 8, None, 81.88, 74.30, 84.79, 14.02, 74.09, gain=None),
        _pascal("SAK of ViT-L teachers", "ViT-L", 8, None, 84.01, 76.99, 84.65, 13.82, 76.27, gain=None),
        _ablation(9, "ViT, MLoRE decoder", 79.26, 67.82, 85.31, 13.65, 74.69, gain=-0.83),
        _ablation(9, "SAK, Simple decoder", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(9, "SAK, MLoRE decoder", 82.74, 74.28, 84.58, 13.89, 75.96, gain=1.69),
        _ablation(12, "ViT, ST Full", 80.25, 70.54, 84.54, 13.57, 74.22, gain=0.00),
        _ablation(12, "ViT, MT Full", 76.76, 65.26, 84.39, 13.98, 70.37, gain=-4.04),
        _ablation(12, "ViT, Freeze", 71.36, 56.08, 81.06, 17.17, 64.03, gain=-15.19),
        _ablation(12, "DINOv2, ST Full", 80.77, 68.62, 85.30, 13.24, 78.55, gain=1.42),
        _ablation(12, "DINOv2, MT Full", 77.89, 70.57, 84.89, 13.62, 74.27, gain=-0.56),
        _ablation(12, "DINOv2, Freeze", 81.18, 74.38, 80.48, 16.85, 70.83, gain=-5.39),
        _ablation(12, "CLIP, ST Full", 79.83, 67.16, 84.65, 13.39, 74.93, gain=-0.58),
        _ablation(12, "CLIP, MT Full", 76.84, 65.87, 84.61, 13.91, 70.50, gain=-3.66),
        _ablation(12, "CLIP, Freeze", 78.33, 65.31, 81.48, 16.84, 67.43, gain=-9.33),
        _ablation(12, "SAM, ST Full", 71.13, 68.03, 86.52, 13.26, 79.51, gain=-0.63),
        _ablation(12, "SAM, MT Full", 66.39, 65.65, 85.38, 13.74, 77.20, gain=-4.09),
        _ablation(12, "SAM, Freeze", 49.11, 59.85, 81.10, 16.21, 75.89, gain=-15.05),
        _ablation(12, "RADIO, MT Full", 78.06, 68.13, 85.18, 13.59, 72.64, gain=-1.53),
        _ablation(12, "RADIO, Freeze", 81.42, 71.71, 82.43, 16.21, 72.91, gain=-4.12),
        _ablation(12, "Theia, MT Full", 76.51, 67.53, 84.38, 14.56, 70.34, gain=-4.33),
        _ablation(12, "Theia, Freeze", 62.09, 54.50, 81.69, 16.87, 63.70, gain=-17.45),
        _ablation(18, "Multi-task baseline, 25% of the data", 72.10, 59.71, 81.40, 15.63, 68.87, gain=-10.32),
        _ablation(18, "RADIO, 25% of the data", 73.47, 63.18, 81.94, 15.13, 71.49, gain=-7.43),
        _ablation(18, "Theia, 25% of the data", 71.12, 63.65, 81.73, 15.57, 69.18, gain=-9.20),
        _ablation(18, "SAK, 25% of the data", 80.09, 69.77, 81.47, 15.28, 72.32, gain=-4.02),
        _ablation(18, "Multi-task baseline, 50% of the data", 74.95, 60.65, 83.04, 14.72, 69.59, gain=-7.42),
        _ablation(18, "RADIO, 50% of the data", 76.23, 63.90, 83.67, 14.27, 72.07, gain=-4.70),
        _ablation(18, "Theia, 50% of the data", 74.60, 64.01, 83.19, 14.89, 69.84, gain=-6.70),
        _ablation(18, "SAK, 50% of the data", 81.33, 70.19, 83.35, 14.54, 72.71, gain=-1.95),
        _ablation(18, "Multi-task baseline, 75% of the data", 75.17, 61.23, 84.08, 14.15, 70.04, gain=-6.00),
        _ablation(18, "RADIO, 75% of the data", 76.82, 64.26, 84.59, 13.76, 72.29, gain=-3.42),
        _ablation(18, "Theia, 75% of the data", 74.98, 64.57, 83.83, 14.64, 70.04, gain=-5.88),
        _ablation(18, "SAK, 75% of the data", 81.32, 70.51, 84.33, 14.28, 73.01, gain=-1.16),
        _ablation(18, "Multi-task baseline, 100% of the data", 76.76, 65.26, 84.39, 13.98, 70.37, gain=-4.04),
        _ablation(18, "RADIO, 100% of the data", 78.06, 68.13, 85.18, 13.59, 72.64, gain=-1.53),
        _ablation(18, "Theia, 100% of the data", 76.51, 67.53, 84.38, 14.56, 70.34, gain=-4.33),
        _ablation(18, "SAK, 100% of the data", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(
            19, "Upper-bound, Addition, 378M parameters", 80.27, 71.44, 84.74, 13.82, 72.69, gain=-0.47
        ),
        _ablation(19, "Upper-bound, Concat, 820M parameters", 82.26, 73.85, 84.63, 13.98, 75.55, gain=1.21),
        _ablation(19, "Upper-bound, MoR, 384M parameters", 80.58, 72.73, 84.88, 14.05, 74.01, gain=0.02),
        _ablation(19, "SAK, MoR, 134M parameters", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(20, "γ = 0.5", 81.19, 71.98, 84.95, 14.01, 73.06, gain=-0.22),
        _ablation(20, "γ = 0.75", 81.46, 72.22, 84.91, 14.03, 73.17, gain=-0.10),
        _ablation(20, "γ = 1.0", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(20, "γ = 1.25", 81.76, 72.51, 84.84, 14.06, 73.29, gain=0.03),
        _ablation(20, "γ = 1.5", 81.84, 72.62, 84.81, 14.08, 73.33, gain=0.06),
        _ablation(20, "γ = 2.0", 81.92, 72.78, 84.74, 14.11, 73.37, gain=0.07),
        _ablation(20, "γ = 2.5", 81.97, 72.88, 84.68, 14.14, 73.39, gain=0.06),
        _ablation(20, "γ = 3.0", 81.99, 72.95, 84.62, 14.17, 73.39, gain=0.03),
        _ablation(20, "γ = 4.0", 82.01, 73.01, 84.53, 14.22, 73.38, gain=-0.05),
        _ablation(23, "CLIP, MT Full", 76.84, 65.87, 84.61, 13.91, 70.50, gain=-3.66),
        _ablation(23, "CLIP, Freeze", 78.33, 65.31, 81.48, 16.84, 67.43, gain=-9.33),
        _ablation(23, "DFN CLIP, MT Full", 75.19, 63.78, 84.63, 14.00, 70.57, gain=-4.77),
        _ablation(23, "DFN CLIP, Freeze", 69.35, 53.48, 81.36, 17.24, 64.85, gain=-16.24),
        _ablation(23, "SigLIP, MT Full", 75.32, 63.57, 84.67, 14.00, 70.50, gain=-4.81),
        _ablation(23, "SigLIP, Freeze", 51.72, 45.34, 77.93, 18.35, 60.33, gain=-26.61),
        _ablation(24, "DINOv2+CLIP", 81.53, 71.95, 84.49, 14.16, 72.59, gain=-0.60),
        _ablation(24, "DINOv2+SigLIP", 81.41, 71.03, 84.62, 14.06, 72.92, gain=-0.63),
        _ablation(25, "DINOv2+CLIP+SAM", 81.65, 72.38, 84.87, 14.05, 73.23, gain=-0.03),
        _ablation(25, "+SigLIP", 81.78, 70.66, 84.85, 14.02, 73.21, gain=-0.45),
    ),
}
"""By data set: what stands beside a student only when its table is asked for."""

LINEAR_PROBES = {
    "DINOv2, ViT-B/14": 84.5,
    "CLIP, ViT-B/16": 84.7,
    "SAM, ViT-B/16": 46.9,
    "RADIO, ViT-B/16": 78.2,
    "Theia, ViT-B/16": 75.2,
    "SAK, ViT-B/16": 79.1,
}
"""Top-1 accuracy on ImageNet-1k's validation set, of linear classifiers at 224 pixels (SAK, Table 26)."""

DEPTH_PROBES = {
    "ViT, ViT-B/16": (1.118, 1.117),
    "SAM, ViT-B/16": (0.678, 0.652),
    "Theia, ViT-B/16": (0.644, 0.629),
    "OpenCLIP, ViT-G/14": (0.541, 0.510),
    "MAE, ViT-H/14": (0.517, 0.483),
    "DINO, ViT-B/8": (0.555, 0.539),
    "DINOv2 (teacher upper bound), ViT-B/14": (0.399, 0.362),
    "DINOv2 (reproduced), ViT-B/14": (0.406, 0.366),
    "SAK of DINOv2, ViT-B/16": (0.482, 0.463),
    "SAK of 3 teachers, ViT-B/16": (0.450, 0.436),
}
"""RMSE in metres on NYUd's test images, of a linear layer on the last level and on four (SAK, Table 27)."""
