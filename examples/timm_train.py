"""Distil a timm model from a cache, with timm's own optimiser, schedule and averages, as its train.py does.

python examples/timm_train.py CACHE
"""

from __future__ import annotations

import sys

import timm
import torch
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from teachercache import CachedTeachers, ShardBatches


def main(
    cache: str, epochs: int = 10, batch_size: int = 64, workers: int = 2, model_name: str = "resnet18"
) -> list[float]:
    """Train on the first teacher, and return the mean loss of each epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = CachedTeachers(cache)
    teacher = data.teachers[0]
    sampler = ShardBatches(data, batch_size)
    loader = DataLoader(data, sampler=sampler, batch_size=None, num_workers=workers)

    model = timm.create_model(model_name, features_only=True, out_indices=[-1]).to(device)
    width = model.feature_info.channels()[-1]
    head = nn.Conv2d(width, data.cache.spec.teachers[teacher].width, 1).to(device)
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    optimizer = create_optimizer_v2(nn.ModuleList([model, head]), opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs * len(loader), t_in_epochs=False)

    means, updates = [], 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        losses = AverageMeter()
        model.train()
        for batch in loader:
            pixels_B3HW = (batch["pixels"].to(device).float() / 255 - mean) / std
            target_BCHW = data.decode(batch, device)[teacher][:, -1].permute(0, 3, 1, 2)
            map_BChw = head(model(pixels_B3HW)[-1])
            resized_BCHW = F.interpolate(map_BChw, target_BCHW.shape[2:], mode="bilinear")
            loss = 1 - F.cosine_similarity(resized_BCHW, target_BCHW, dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            scheduler.step_update(updates)
            losses.update(loss.item(), len(pixels_B3HW))
        means.append(losses.avg)
        print(f"Train: {epoch} loss {losses.avg:.4f} lr {optimizer.param_groups[0]['lr']:.2e}")
    return means


if __name__ == "__main__":
    main(sys.argv[1])
