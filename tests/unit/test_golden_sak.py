"""Ten steps of a tiny SAK on the CPU, against losses that were written down.

A change that is meant to change them: `python -m tests.unit.test_golden_sak` writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teachercache import build_student
from teachercache.student.losses.distillation import DistillationLoss, LossOutput, Target
from tests.ten_steps import ten_steps

GOLDEN = Path(__file__).parents[1] / "goldens" / "sak_stage1_losses.json"


def ten_losses() -> list[float]:
    """Fixed images and targets; teachers of the stem's width and of another, on grids of their own."""
    torch.manual_seed(0)
    student = build_student(
        "sak", stem="vit_tiny_patch16_224", teacher_dims={"same": 192, "wide": 256}, image_size=(64, 96)
    )
    images_B3HW = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = {
        "same": Target(torch.randn(2, 4, 4, 6, 192)),
        "wide": Target(torch.randn(2, 4, 9, 13, 256)),
    }
    loss = DistillationLoss()

    def total() -> Tensor:
        output: LossOutput = loss(student(student.normalize(images_B3HW)), targets)
        return output.total

    return ten_steps(student, total, lr=1e-4, weight_decay=1e-2)


def test_ten_steps_have_the_losses_that_were_written_down() -> None:
    assert ten_losses() == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(ten_losses(), indent=2) + "\n")
