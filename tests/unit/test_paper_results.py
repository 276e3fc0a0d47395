"""The paper's rows beside ours: whether they were copied right, and which of them a student stands beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from teachercache import build_student
from teachercache.pipeline.errors import RecipeError
from teachercache.student.measuring.decoder_scores import scores_table
from teachercache.student.measuring.evaluate import Evaluation
from teachercache.student.measuring.paper_results import (
    KPU_ROWS,
    PAPER_ROWS,
    PaperRow,
    backbone_of,
    kpu_rows,
    paper_rows,
    single_task_scores,
)
from teachercache.student.measuring.task_outputs import TASK_OUTPUTS
from teachercache.student.metrics import mtl_gain

ROWS = [
    pytest.param(d, row, id=f"{d}-{row.title}")
    for d, rows in PAPER_ROWS.items()
    for row in rows
    if row.gain is not None
]


@pytest.mark.parametrize(("dataset", "row"), ROWS)
def test_the_gain_of_a_row_is_the_one_that_the_paper_prints(dataset: str, row: PaperRow) -> None:
    """One digit wrong among the scores of a row or of its baseline shows here."""
    baseline = single_task_scores(dataset, row.backbone)
    assert baseline
    lower = [task for task in row.scores if TASK_OUTPUTS[task].lower_is_better]
    assert 100 * mtl_gain(row.scores, baseline, lower) == pytest.approx(row.gain, abs=0.0051)


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
    assert "SAK of ViT-L teachers (ViT-L, 407M parameters; SAK, Table 5)* | 84.01 | 13.82 | – |" in table
    assert "ViT-B" not in table


FULL = {"semseg": 81.0, "parts": 74.0, "saliency": 84.0, "normals": 14.0, "boundary": 74.0}


def test_a_baseline_of_ones_own_moves_no_gain_of_the_paper() -> None:
    mine = {"semseg": 80.0, "parts": 70.0, "saliency": 80.0, "normals": 14.0, "boundary": 74.0}
    table = evaluation("ViT-B", **FULL).markdown(mine)
    header, _, first, second = table.splitlines()[:4]
    assert header.endswith("| Δm %, yours against your baseline |")
    assert first.endswith(f"| {evaluation('ViT-B', **FULL).gain(mine):.2f} |")
    assert second == "| your baseline | 80.00 | 70.00 | 80.00 | 14.00 | 74.00 | 0.00 |"
    for row in paper_rows("pascal_context", "ViT-B"):
        assert f"*{row.title}* | " in table
        assert table.split(f"*{row.title}*")[1].splitlines()[0].endswith(f" | {row.gain:.2f} |")


def test_the_papers_baseline_is_named_too() -> None:
    header = evaluation("ViT-B", **FULL).markdown().splitlines()[0]
    assert header.endswith("| Δm %, yours against the paper's single-task baseline of this size |")


def test_a_table_is_shown_when_it_is_asked_for() -> None:
    titles = [row.title for row in paper_rows("pascal_context", "ViT-B", 20)]
    assert titles[0] == "γ = 0.5 (ViT-B; SAK, Table 20)"
    assert len(titles) == 9
    lines = evaluation("ViT-B", **FULL).markdown(table=20).splitlines()
    assert [line.split("*")[1] for line in lines[3:]] == titles
    assert lines[-1].endswith("| 82.01 | 73.01 | 84.53 | 14.22 | 73.38 | -0.05 |")
    for table in (3, 4, 7, 8, 12, 13, 18, 19, 20, 25):
        assert paper_rows("pascal_context", None, table)
    with pytest.raises(RecipeError, match="6, 14, 16"):
        paper_rows("nyud", None, 20)


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


@pytest.mark.parametrize("row", KPU_ROWS, ids=lambda row: row[1])
def test_the_mean_of_a_row_of_kpu_is_the_one_that_the_paper_prints(
    row: tuple[int, str, dict[str, float], float | None],
) -> None:
    table, _, scores, mean = row
    assert (mean is not None) == (table == 1 and len(scores) == 4)
    assert mean is None or sum(scores.values()) / 4 == pytest.approx(mean, abs=0.0501)


def test_decoders_stand_beside_kpu_on_the_data_of_the_paper_alone() -> None:
    rows = kpu_rows("coco", 80, ["AP of boxes", "AP50 of boxes"], 2)
    assert list(rows) == [f"{model} (KPU, Table 2)" for model in ("Base_a", "Base_b", "Base_c", "KPU")]
    table = scores_table({"mine": {"AP of boxes": 50.0, "AP50 of boxes": 70.0}} | rows)
    assert "| mine | 50.00 | 70.00 |\n| Base_a (KPU, Table 2) | 50.30 | – |" in table
    assert len(kpu_rows("ade20k", 150, ["mIoU"])) == 18  # Uni-perceiver has no such score
    assert kpu_rows("scenes", 7, ["mIoU"]) == kpu_rows("image_classes", 10, ["top-1"]) == {}
    with pytest.raises(RecipeError, match="1, 2, 3"):
        kpu_rows("coco", 80, ["AP of boxes"], 4)
