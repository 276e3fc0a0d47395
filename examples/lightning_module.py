"""Distil a timm backbone from a cache with Lightning.

python examples/lightning_module.py CACHE
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from teachercache import CachedTeachers, ShardBatches


class Distilled(lightning.LightningModule):
    """A backbone whose last map is compared with that of one teacher."""

    def __init__(self, data: CachedTeachers, teacher: str, backbone: str) -> None:
        super().__init__()
        self.data, self.teacher = data, teacher
        self.backbone = timm.create_model(backbone, features_only=True, out_indices=[-1])
        width = self.backbone.feature_info.channels()[-1]
        self.head = nn.Conv2d(width, data.cache.spec.teachers[teacher].width, 1)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        target_BCHW = self.data.decode(batch, self.device)[self.teacher][:, -1].permute(0, 3, 1, 2)
        map_BChw = self.head(self.backbone(batch["pixels"].float() / 127.5 - 1)[-1])
        resized_BCHW = F.interpolate(map_BChw, target_BCHW.shape[2:], mode="bilinear")
        loss = 1 - F.cosine_similarity(resized_BCHW, target_BCHW, dim=1).mean()
        self.log("loss", loss, prog_bar=True, batch_size=len(target_BCHW))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(
    cache: str, epochs: int = 10, batch_size: int = 64, workers: int = 2, backbone: str = "resnet18"
) -> list[float]:
    """Train on the first teacher, and return the loss of each step."""
    data = CachedTeachers(cache)
    # Lightning calls `set_epoch` itself. The sampler divides the rows among processes, so Lightning must not.
    loader = DataLoader(data, sampler=ShardBatches(data, batch_size), batch_size=None, num_workers=workers)
    module = Distilled(data, data.teachers[0], backbone)
    trainer = lightning.Trainer(
        max_epochs=epochs, use_distributed_sampler=False, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader)
    return module.losses


if __name__ == "__main__":
    main(sys.argv[1])
