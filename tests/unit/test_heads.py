"""The heads: SAK's against a plain twin, the stronger one for its shapes and what it sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from teachercache.student.models.heads import HEADS, SimpleHead, UPerHead

WIDTH, SIZE = 16, (12, 20)


def levels(batch: int = 2, grid: tuple[int, int] = (3, 5)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, WIDTH, *grid, dtype=torch.float64) for _ in range(4)]


def test_simple_head_is_what_the_paper_describes() -> None:
    torch.manual_seed(0)
    head = SimpleHead(WIDTH, 7, SIZE).double()
    conv, norm, _ = head.fuse
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    reduced = []
    for linear, map_BChw in zip(head.linears, levels(), strict=True):
        assert isinstance(linear, nn.Linear)
        map_ = torch.einsum("oc,bchw->bohw", linear.weight, map_BChw) + linear.bias[:, None, None]
        reduced.append(nn.functional.interpolate(map_, SIZE, mode="bilinear", align_corners=False))
    hidden = nn.functional.conv2d(torch.cat(reduced, 1), conv.weight, conv.bias, padding=1)
    mean = hidden.mean((0, 2, 3), keepdim=True)
    variance = hidden.var((0, 2, 3), correction=0, keepdim=True)
    hidden = nn.functional.gelu((hidden - mean) / (variance + norm.eps).sqrt())
    expected = torch.einsum("oc,bchw->bohw", head.predict.weight[..., 0, 0], hidden)
    expected = expected + head.predict.bias[:, None, None]  # type: ignore[index]
    torch.testing.assert_close(head.train()(levels()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_heads_predict_at_their_size_and_train_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name](WIDTH, 7, SIZE).double()
    prediction = head(levels())
    assert prediction.shape == (2, 7, *SIZE)
    prediction.square().sum().backward()
    assert [key for key, p in head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", HEADS)
def test_heads_use_every_level(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name](WIDTH, 7, SIZE).double().eval()
    before = head(levels())
    for level in range(4):
        changed = levels()
        changed[level] = changed[level] + torch.randn_like(changed[level])
        assert not torch.allclose(head(changed), before)


def test_upernet_sees_the_whole_image_at_every_pixel() -> None:
    """The pooled last level reaches the far corner, where convolutions of a large map do not."""
    torch.manual_seed(0)
    head = UPerHead(WIDTH, 7, (128, 128), hidden=8).double().eval()
    inputs = [map_.requires_grad_() for map_ in levels(batch=1, grid=(32, 32))]
    head(inputs)[0, :, 0, 0].sum().backward()
    reached = [map_.grad[0, :, -1, -1].any().item() for map_ in inputs]  # type: ignore[index]
    assert reached == [False, False, False, True]


def test_upernet_trains_on_one_image() -> None:
    head = UPerHead(WIDTH, 7, SIZE, hidden=8).double().train()
    assert head(levels(batch=1)).isfinite().all()
