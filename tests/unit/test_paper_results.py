"""The paper's rows beside ours: whether they were copied right, and which of them a student stands beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from student import build_student
from student.evaluate import Evaluation
from student.metrics import mtl_gain
from student.paper_results import PAPER_ROWS, PaperRow, backbone_of, paper_rows
from student.task_outputs import TASK_OUTPUTS

ROWS = [pytest.param(d, row, id=f"{d}-{row.title}") for d, rows in PAPER_ROWS.items() for row in rows]


@pytest.mark.parametrize(("dataset", "row"), ROWS)
def test_the_gain_of_a_row_is_the_one_that_the_paper_prints(dataset: str, row: PaperRow) -> None:
    """One digit wrong among the scores of a row or of its baseline shows here."""
    baseline = paper_rows(dataset, row.backbone)[0]
    lower = [task for task in row.scores if TASK_OUTPUTS[task].lower_is_better]
    assert 100 * mtl_gain(row.scores, baseline.scores, lower) == pytest.approx(row.gain, abs=0.0051)


def test_every_size_has_its_baselines_and_sak() -> None:
    for dataset in PAPER_ROWS:
        for backbone in ("ViT-S", "ViT-B", "ViT-L"):
            models = [row.model for row in paper_rows(dataset, backbone)]
            assert models[:2] == ["Single-task baseline", "Multi-task baseline"]
            assert any(model.startswith("SAK") for model in models)


def evaluation(backbone: str | None, **scores: float) -> Evaluation:
    facts: dict[str, Any] = {"split": "val", "num_images": 2, "parameters": 407_000_000, "images_per_s": 1.0}
    return Evaluation(
        student="mine", backbone=backbone, dataset="pascal_context", scores=scores, gates={}, **facts
    )


def test_a_large_student_stands_beside_large_ones() -> None:
    table = evaluation("ViT-L", semseg=81.61, normals=13.87).markdown()
    assert "| mine (407M parameters) | 81.61 | 13.87 | 0.00 |" in table
    assert "SAK of ViT-L teachers (ViT-L, 407M parameters; SAK, Table 5)* | 84.01 | 13.82 |" in table
    assert "ViT-B" not in table


def test_a_student_of_no_size_of_the_paper_stands_alone() -> None:
    lines = evaluation(None, semseg=50.0).markdown().splitlines()
    assert lines[2:] == ["| mine (407M parameters) | 50.00 | – |"]


@pytest.mark.parametrize(
    ("kind", "stem", "width", "backbone"),
    [
        ("sak", "vit_small_patch16_384", 48, "ViT-S"),
        ("sak", "test_vit", 1024, None),
        ("amalgam", None, 1024, "ViT-L"),
        ("amalgam", "test_vit", 1024, None),
    ],
)
def test_the_stem_decides_the_size(kind: str, stem: str | None, width: int, backbone: str | None) -> None:
    dims = {"one": width, "two": 48}
    with torch.device("meta"):
        student = build_student(kind, stem=stem, teacher_dims=dims, image_size=(32, 32), tasks={"semseg": 2})
    assert backbone_of(student) == backbone
