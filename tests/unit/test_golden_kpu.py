"""Ten steps of a tiny KPU on the CPU, against losses that were written down.

A change that is meant to change them: `python -m tests.unit.test_golden_kpu` writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teachercache import build_student
from teachercache.student.kpu.latent_space import Features
from teachercache.student.losses.alignment import AlignmentLoss
from tests.ten_steps import ten_steps

GOLDEN = Path(__file__).parents[1] / "goldens" / "kpu_losses.json"


def ten_losses() -> list[float]:
    """Fixed images and targets: a teacher with a class token, and one without on a finer grid."""
    torch.manual_seed(0)
    student = build_student(
        "kpu",
        stem="vit_tiny_patch16_224",
        teacher_dims={"global": 192, "local": 256},
        image_size=(64, 96),
        teacher_grids={"global": (4, 6), "local": (9, 13)},
        class_tokens=["global"],
    )
    images_B3HW = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    teachers = {
        "global": Features(torch.randn(2, 192), torch.randn(2, 192, 4, 6)),
        "local": Features(None, torch.randn(2, 256, 9, 13)),
    }
    loss = AlignmentLoss()

    def total() -> Tensor:
        return loss(student(student.normalize(images_B3HW), teachers=teachers))[0]

    return ten_steps(student, total, lr=2e-4, weight_decay=5e-2)


def test_ten_steps_have_the_losses_that_were_written_down() -> None:
    assert ten_losses() == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ten_losses(), indent=2) + "\n")
