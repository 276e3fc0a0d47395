"""LoRA: starts as the same function, trains nothing else, and disappears when merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.beit import Attention as BeitAttention
from torch import nn

from teachercache.student.build import build_student, load_student
from teachercache.student.models.lora import add_lora, merge_lora, merged_state_dict
from teachercache.student.sak.model import SAK

SIZE = (64, 96)


def tiny(stem: str = "test_vit", image_size: tuple[int, int] = SIZE) -> SAK:
    torch.manual_seed(0)
    student = build_student("sak", stem=stem, teacher_dims={"a": 48}, image_size=image_size)
    assert isinstance(student, SAK)
    return student


def step(student: SAK, pixels_B3HW: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    torch.stack([level.square().mean() for level in student(pixels_B3HW)["a"]]).sum().backward()
    optimizer.step()


def test_it_starts_as_the_same_function_and_merges_into_one(tmp_path: Path) -> None:
    student, pixels_B3HW = tiny(), torch.randn(2, 3, *SIZE)
    before, names = student(pixels_B3HW)["a"], list(student.state_dict())
    add_lora(student.stem, rank=4)
    assert all(torch.equal(x, y) for x, y in zip(before, student(pixels_B3HW)["a"], strict=True))
    for _ in range(2):  # after the first, `up` is no longer zero, and `down` has a gradient
        step(student, pixels_B3HW)
    trained = student(pixels_B3HW)["a"]
    assert not torch.allclose(before[0], trained[0])

    student.save_pretrained(tmp_path)
    state = merged_state_dict(student)
    merge_lora(student.stem)
    merged = student.state_dict()
    assert set(merged) == set(names) == set(state)
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
    for other in (student, load_student(tmp_path)):
        assert all(torch.equal(x, y) for x, y in zip(trained, other(pixels_B3HW)["a"], strict=True))


@pytest.mark.parametrize(("stem", "patch"), [("test_vit", 16), ("eva02_tiny_patch14_224", 14)])
def test_only_the_updates_of_the_stem_are_trained(stem: str, patch: int) -> None:
    image_size = (2 * patch, 2 * patch)
    student = tiny(stem, image_size)
    before = {name: tensor.clone() for name, tensor in student.stem.state_dict().items()}
    linears = sum(isinstance(module, nn.Linear) for module in student.stem.modules())
    add_lora(student.stem, rank=4)
    updates = [(name, p) for name, p in student.stem.named_parameters() if p.requires_grad]
    assert len(updates) == 2 * linears
    assert all(min(p.shape) == 4 for _, p in updates)
    pixels_B3HW = torch.randn(2, 3, *image_size)
    for _ in range(2):
        student.zero_grad()
        step(student, pixels_B3HW)
    assert [name for name, p in updates if p.grad is None or not p.grad.any()] == []
    after = student.stem.state_dict()
    for name, tensor in before.items():
        base, _, last = name.rpartition(".")
        original = f"{base}.parametrizations.{last}.original"
        assert torch.equal(after[original if original in after else name], tensor)


def test_attentions_that_take_a_weight_without_calling_its_layer_are_trained_too() -> None:
    attention = BeitAttention(32, num_heads=2, qkv_bias=True)
    add_lora(attention, rank=4)
    attention(torch.randn(1, 5, 32)).sum().backward()
    updates = {name: p for name, p in attention.named_parameters() if p.requires_grad}
    assert [name.split(".")[0] for name in updates] == ["qkv", "qkv", "proj", "proj"]
    assert [name for name, p in updates.items() if p.grad is None] == []
