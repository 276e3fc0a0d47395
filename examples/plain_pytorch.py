"""Distil a small network from a cache, in a plain PyTorch loop.

python examples/plain_pytorch.py CACHE
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from teachercache import CachedTeachers, ShardBatches


class Student(nn.Module):
    """Strided convolutions, and for each teacher a projection to its channels."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        steps = [(3, 32), (32, 64), (64, 128)]
        layers = [nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.GELU()) for i, o in steps]
        self.backbone = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Conv2d(128, width, 1) for name, width in widths.items()})

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        features_BChw = self.backbone(images_B3HW.float() / 127.5 - 1)
        return {name: head(features_BChw) for name, head in self.heads.items()}


def distance(maps: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """1 − cosine to the last level of each teacher, on the teacher's own grid."""
    losses = []
    for name, map_BChw in maps.items():
        target_BCHW = targets[name][:, -1].permute(0, 3, 1, 2)
        resized_BCHW = F.interpolate(map_BChw, target_BCHW.shape[2:], mode="bilinear")
        losses.append(1 - F.cosine_similarity(resized_BCHW, target_BCHW, dim=1).mean())
    return torch.stack(losses).mean()


def main(cache: str, epochs: int = 10, batch_size: int = 64, workers: int = 2) -> list[float]:
    """Train, and return the mean loss of each epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = CachedTeachers(cache)
    sampler = ShardBatches(data, batch_size)  # shard by shard; shuffle=True would read row by row
    loader = DataLoader(data, sampler=sampler, batch_size=None, num_workers=workers)
    student = Student({name: data.cache.spec.teachers[name].width for name in data.teachers}).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    means = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        losses = []
        for batch in loader:
            targets = data.decode(batch, device)  # packed until they are on the device
            loss = distance(student(batch["pixels"].to(device)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch}: 1 - cosine {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    main(sys.argv[1])
