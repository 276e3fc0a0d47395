"""Distil the neck of a YOLO-like detector: its own data set brings images and boxes, the cache the targets.

python examples/detector_neck.py CACHE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from teachercache import CachedTeachers, FeatureCache, render_view


class Detections(Dataset):
    """Somebody else's images with boxes (left, top, right, bottom), cut to the views of the teachers."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str, int, Tensor]:
        number = int(torch.randint(self.cache.num_views, ()))
        view, image = self.cache.view(self.cache[index].row(number)), self.cache.image(index)
        boxes_N4 = torch.tensor([[0.25 * image.width, 0, 0.75 * image.width, image.height]])  # yours
        left, top, right, bottom = view.box
        scale = torch.tensor([view.size[1] / (right - left), view.size[0] / (bottom - top)]).repeat(2)
        boxes_N4 = (boxes_N4 - torch.tensor([left, top, left, top])) * scale
        if view.flip:
            boxes_N4[:, [0, 2]] = view.size[1] - boxes_N4[:, [2, 0]]
        return render_view(image, view), boxes_N4, self.cache.key(index), number, torch.tensor(view.crop)


class Neck(nn.Module):
    """A feature pyramid: coarser maps are added to finer ones."""

    def __init__(self, widths: list[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(one, width, 1) for one in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)

    def forward(self, maps: list[Tensor]) -> Iterator[Tensor]:
        above = None
        for map_BChw, lateral, smooth in reversed(list(zip(maps, self.lateral, self.smooth, strict=True))):
            size = map_BChw.shape[2:]
            above = lateral(map_BChw) + (F.interpolate(above, size) if isinstance(above, Tensor) else 0)
            yield smooth(above)


def main(cache: str, epochs: int = 10, batch_size: int = 16, backbone: str = "resnet18") -> list[float]:
    """Train on the first teacher, and return the loss of each step."""
    data = CachedTeachers(cache)
    teacher = data.teachers[0]
    model = timm.create_model(backbone, features_only=True, out_indices=[-3, -2, -1])
    neck = Neck(model.feature_info.channels(), data.cache.spec.teachers[teacher].width)
    optimizer = torch.optim.AdamW([*model.parameters(), *neck.parameters()], lr=1e-3)
    losses = []
    for _ in range(epochs):
        for images, _boxes, keys, views, crops in DataLoader(
            Detections(data.cache), batch_size, shuffle=True
        ):
            target_BCHW = data.targets(keys, views, crops)[teacher][:, -1].permute(0, 3, 1, 2)
            levels = [F.adaptive_avg_pool2d(one, target_BCHW.shape[2:]) for one in neck(model(images / 255))]
            loss = torch.stack([1 - F.cosine_similarity(one, target_BCHW).mean() for one in levels]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
