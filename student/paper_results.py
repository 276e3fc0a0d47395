"""Rows of the paper's tables, to set beside ours: percent, degrees (normals) and metres (depth)."""

from __future__ import annotations

from dataclasses import dataclass

from student.base import Student

_BACKBONES = {384: "ViT-S", 768: "ViT-B", 1024: "ViT-L"}


@dataclass(frozen=True)
class PaperRow:
    """`table`: of SAK. `parameters_m`: millions, where the paper counts all of them. `gain`: Δm in percent
    as printed there (SAK, Eq. 7), against the single-task baseline of the same backbone."""

    model: str
    backbone: str
    table: int
    parameters_m: int | None
    scores: dict[str, float]
    gain: float

    @property
    def title(self) -> str:
        count = f", {self.parameters_m}M parameters" if self.parameters_m else ""
        return f"{self.model} ({self.backbone}{count}; SAK, Table {self.table})"


def paper_rows(dataset: str, backbone: str | None) -> list[PaperRow]:
    """The paper's rows of a data set and a size of student, its single-task baseline first; none where the
    paper has none."""
    return [row for row in PAPER_ROWS.get(dataset, ()) if row.backbone == backbone]


def backbone_of(student: Student) -> str | None:
    """The paper's name of a student of this width (of its teachers, where it has no stem), if it has one."""
    stem = getattr(student, "stem", None)
    width = stem.width if stem is not None else max(student.config["teacher_dims"].values())
    return _BACKBONES.get(width)


def _pascal(
    model: str, backbone: str, table: int, parameters_m: int | None, *values: float, gain: float
) -> PaperRow:
    tasks = "semseg", "parts", "saliency", "normals", "boundary"
    return PaperRow(model, backbone, table, parameters_m, dict(zip(tasks, values, strict=True)), gain)


def _nyud(
    model: str, backbone: str, table: int, parameters_m: int | None, *values: float, gain: float
) -> PaperRow:
    tasks = "semseg", "depth", "normals", "boundary"
    return PaperRow(model, backbone, table, parameters_m, dict(zip(tasks, values, strict=True)), gain)


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
"""By data set."""

LINEAR_PROBES = {
    "DINOv2, ViT-B/14": 84.5,
    "CLIP, ViT-B/16": 84.7,
    "SAM, ViT-B/16": 46.9,
    "RADIO, ViT-B/16": 78.2,
    "Theia, ViT-B/16": 75.2,
    "SAK, ViT-B/16": 79.1,
}
"""Top-1 accuracy on ImageNet-1k's validation set, of linear classifiers at 224 pixels (SAK, Table 26)."""
