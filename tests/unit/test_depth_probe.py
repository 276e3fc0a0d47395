"""Depth read by a linear layer from frozen maps (SAK, Table 27)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.pipeline.errors import RecipeError
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.measuring.depth_probe import (
    FrozenMaps,
    LinearDepth,
    depth_probe,
    scale_invariant_loss,
)
from teachercache.student.models.stem import Stem
from teachercache.student.sak.model import SAK

SIZE = (48, 64)
TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, train=6, val=2, size=SIZE)
    return root


def test_maps_are_patch_tokens_beside_the_class_token() -> None:
    torch.manual_seed(0)
    student = SAK(TINY, {"a": 192}, SIZE)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    stem, path = (FrozenMaps(student, SIZE, expert) for expert in ("stem", "a"))
    found = student.representations(student.normalize(images))
    tokens = student.stem(student.normalize(images))
    for maps, expected in ((stem(images), found[0]), (path(images), found[1])):
        assert len(maps) == 4
        torch.testing.assert_close(maps[-1][:, :192].flatten(2).transpose(1, 2), expected[-1])
        torch.testing.assert_close(maps[-1][:, 192:, 1, 2], tokens[-1][:, 0])
    assert not any(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(RecipeError, match="expert of this student"):
        FrozenMaps(student, SIZE, "b")


def test_a_depth_is_the_mean_of_256_by_normalised_logits() -> None:
    """As DINOv2's head has it: maps four times as fine, and then the linear layer."""
    torch.manual_seed(0)
    head, maps_BChw = LinearDepth(8, SIZE), torch.randn(2, 8, 3, 4)
    fine = F.interpolate(maps_BChw, scale_factor=4, mode="bilinear", align_corners=False)
    share = head.linear(fine).relu() + 0.1
    depth = ((share / share.sum(1, keepdim=True)) * torch.linspace(0.001, 10, 256)[:, None, None]).sum(1)
    expected = F.interpolate(depth[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(head(maps_BChw), expected)


def test_the_loss_forgives_most_of_a_common_factor() -> None:
    target = torch.rand(1, 8, 8) * 5 + 1
    target[0, 0] = 0  # not measured
    assert float(scale_invariant_loss(target, target)) == pytest.approx(0, abs=1e-4)
    factor = torch.tensor(1.5)
    assert float(scale_invariant_loss(1.5 * target, target)) == pytest.approx(
        float(0.15**0.5 * factor.log()), rel=1e-4
    )


def test_a_layer_learns_depth(scenes: Path) -> None:
    torch.manual_seed(0)
    maps = FrozenMaps(Stem(TINY, SIZE), SIZE)
    data = [open_dataset("scenes", scenes, split) for split in ("train", "val")]
    few, many = (
        depth_probe(maps, *data, levels=4, steps=steps, batch_size=3, learning_rate=1e-2, threads=1).rmse_m
        for steps in (1, 60)
    )
    assert many < 0.95 * few
    with pytest.raises(RecipeError, match="1 or 4 levels"):
        depth_probe(maps, *data, levels=2)


def test_one_command_prints_both_beside_the_papers(scenes: Path) -> None:
    arguments = f"{TINY} scenes {scenes} --random --size 48 64 --steps 2 --batch-size 2"
    done = CliRunner().invoke(app, ["depth-probe", *arguments.split()], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    (own,) = (line for line in done.output.splitlines() if TINY in line)
    assert len([cell for cell in own.split() if cell.replace(".", "").isdigit()]) == 2
    (theirs,) = (line for line in done.output.splitlines() if "SAK of 3 teachers" in line)
    assert theirs.split()[-2:] == ["0.450", "0.436"]
