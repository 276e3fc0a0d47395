"""Evaluation where the view is not the size of the image, and against a baseline of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from teachercache.pipeline.errors import CheckpointError, RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.labelled_dataset import LabelledDataset
from teachercache.student.measuring.evaluate import Evaluation, evaluate
from teachercache.student.measuring.figures import gate_figure
from teachercache.student.measuring.paper_results import read_baseline
from teachercache.student.models.student import Student, StudentOutput
from teachercache.student.sak.model import SAK

METRES = 3.0


class FlatRooms(LabelledDataset):
    """A wall, three metres away, in images of twice the student's size."""

    name = "flat_rooms"
    tasks: ClassVar = {"depth": 1}
    boundary_distance = 0.01
    FILES: ClassVar = {"images": ("images/{key}.png",)}
    LISTS: ClassVar = {"val": ("val.txt", None)}

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        return np.full(size, METRES, np.float32)


class Oracle(Student):
    """Sees what is there: in a view of half the size, a wall twice as far away."""

    kind = "oracle"
    experts: ClassVar[list[str]] = []

    def forward(self, pixels_B3HW: Tensor, full: bool = False, maps: bool = True) -> StudentOutput:
        return StudentOutput({}, {"depth": torch.full_like(pixels_B3HW[:, :1], 2 * METRES)}, {})

    def keep_levels(self, *_: object) -> None: ...

    def parameters_by_part(self) -> dict[str, int]:
        return {}


def test_depth_is_measured_in_metres_of_the_room(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images/a.png")
    (tmp_path / "val.txt").write_text("a")
    config = {"teacher_dims": {"any": 8}, "image_size": [24, 32], "tasks": {"depth": 1}}
    student = Oracle(config, (0, 0, 0), (1, 1, 1))
    found = evaluate(student, FlatRooms(tmp_path, "val"), output=tmp_path / "out")
    assert found.scores["depth"] == pytest.approx(0, abs=1e-5)
    with Image.open(tmp_path / "out/predictions/depth/a.png") as image:
        assert (np.array(image) == 1000 * METRES).all()
    with pytest.raises(CheckpointError, match=r"predictions cannot be written(.|\n)*Not a directory"):
        evaluate(student, FlatRooms(tmp_path, "val"), output=tmp_path / "val.txt")


def test_a_split_without_images_has_no_scores(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("")
    student = Oracle(
        {"teacher_dims": {}, "image_size": [24, 32], "tasks": {"depth": 1}}, (0, 0, 0), (1, 1, 1)
    )
    with pytest.raises(RecipeError, match="no images to evaluate on"):
        evaluate(student, FlatRooms(tmp_path, "val"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_beside_the_papers_are_those_of_predicting(tmp_path: Path) -> None:
    """SAK, B.1: aligners are needed during distillation alone."""
    config = {"teacher_dims": {}, "image_size": [24, 32], "tasks": {"depth": 1}}
    student = Oracle(config, (0, 0, 0), (1, 1, 1))
    student.parameters_by_part = lambda: {"stem": 5, "aligners": 3}  # type: ignore[method-assign]
    assert student.num_parameters == 8
    student.for_distillation = SAK.for_distillation  # type: ignore[misc]
    assert student.num_parameters == 5


def test_what_is_labelled_nowhere_is_null_in_json() -> None:
    found = Evaluation("mine", None, "scenes", "val", 1, 1, {"parts": math.nan, "depth": 0.9}, {}, 1.0)
    assert json.loads(json.dumps(found.record(), allow_nan=False))["scores"] == {"parts": None, "depth": 0.9}
    assert "| – | 0.9000 | – |" in found.markdown({"parts": 50.0, "depth": 1.0})


def test_gains_refer_to_a_baseline_of_ones_own() -> None:
    found = Evaluation("mine", None, "scenes", "val", 1, 1, {"semseg": 55.0, "depth": 0.9}, {}, 1.0)
    assert "| –" in found.markdown()
    assert "| 10.00 |" in found.markdown({"semseg": 50.0, "depth": 1.0})


def test_a_baseline_is_read_from_the_scores_of_each_task(tmp_path: Path) -> None:
    for task, score in (("semseg", 50.0), ("depth", 1.0)):
        (tmp_path / task).write_text(json.dumps({"dataset": "scenes", "scores": {task: score}}))
    files = [tmp_path / "semseg", tmp_path / "depth"]
    assert read_baseline(files, "scenes") == {"semseg": 50.0, "depth": 1.0}
    with pytest.raises(RecipeError, match="got:      scenes"):
        read_baseline(files, "nyud")
    (tmp_path / "depth").write_text("[]")
    with pytest.raises(RecipeError, match="TypeError"):
        read_baseline(files, "scenes")


def test_every_expert_has_a_bar_of_its_own_look() -> None:
    figure = gate_figure({"semseg": np.full((4, 9), 1 / 9)}, [f"teacher {i}" for i in range(9)])
    bars = figure.axes[0].containers
    assert len(bars) == 9
    assert len({(bar[0].get_facecolor(), bar[0].get_hatch()) for bar in bars}) == 9
