"""Heads: four levels of features → the prediction of one task, at a quarter of the image.

B  images     C  channels of each level     h, w  grid of the levels     H, W  a quarter of the image
"""

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.student.models.student import NUM_LEVELS

_POOLED_SIZES = 1, 2, 3, 6  # rows and columns that UPerNet pools the last level to


class SimpleHead(nn.Module):
    """SAK's head (4.1): each level linear to C/4 → resized → together through a 3×3 convolution → 1×1.

    The norm is a BatchNorm, as in the authors' code; train it as a SyncBatchNorm in several processes.
    """

    def __init__(self, width: int, num_outputs: int, size: Size) -> None:
        super().__init__()
        self.size = size
        reduced = width // NUM_LEVELS
        self.linears = nn.ModuleList(nn.Linear(width, reduced) for _ in range(NUM_LEVELS))
        self.fuse = nn.Sequential(
            nn.Conv2d(reduced * NUM_LEVELS, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()
        )
        self.predict = nn.Conv2d(width, num_outputs, 1)

    def forward(self, levels_BChw: Sequence[Tensor]) -> Tensor:
        """Four maps (B, C, h, w) → (B, `num_outputs`, H, W)."""
        reduced_BCHW = [
            upsample(linear(map_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), self.size)
            for linear, map_BChw in zip(self.linears, levels_BChw, strict=True)
        ]
        return self.predict(self.fuse(torch.cat(reduced_BCHW, dim=1)))


class UPerHead(nn.Module):
    """UPerNet (Xiao et al., 2018) on a plain ViT: pyramid pooling of the last level, a feature pyramid.

    The levels of a ViT share one grid; they are resized to 1, 1/2, 1/4 and 1/8 of `size` to form a pyramid.
    The norm is over each pixel's channels, so that a batch of one image can train, even where a map is
    pooled to one pixel.
    """

    def __init__(self, width: int, num_outputs: int, size: Size, hidden: int = 256) -> None:
        super().__init__()
        self.sizes = [(max(1, size[0] >> level), max(1, size[1] >> level)) for level in range(NUM_LEVELS)]
        self.laterals = nn.ModuleList(_conv(width, hidden, 1) for _ in range(NUM_LEVELS))
        self.pools = nn.ModuleList(_conv(hidden, hidden, 1) for _ in _POOLED_SIZES)
        self.context = _conv(hidden * (1 + len(_POOLED_SIZES)), hidden, 3)
        self.smooth = nn.ModuleList(_conv(hidden, hidden, 3) for _ in range(NUM_LEVELS - 1))
        self.fuse = _conv(hidden * NUM_LEVELS, hidden, 3)
        self.predict = nn.Conv2d(hidden, num_outputs, 1)

    def forward(self, levels_BChw: Sequence[Tensor]) -> Tensor:
        """Four maps (B, C, h, w) → (B, `num_outputs`, H, W)."""
        pyramid = [
            upsample(lateral(map_BChw), size)
            for lateral, map_BChw, size in zip(self.laterals, levels_BChw, self.sizes, strict=True)
        ]
        pooled = [
            upsample(conv(F.adaptive_avg_pool2d(pyramid[-1], pooled_size)), self.sizes[-1])
            for conv, pooled_size in zip(self.pools, _POOLED_SIZES, strict=True)
        ]
        pyramid[-1] = self.context(torch.cat([pyramid[-1], *pooled], dim=1))
        for level in reversed(range(NUM_LEVELS - 1)):
            pyramid[level] = pyramid[level] + upsample(pyramid[level + 1], self.sizes[level])
        smoothed = [smooth(map_) for smooth, map_ in zip(self.smooth, pyramid[:-1], strict=True)]
        together = [upsample(map_, self.sizes[0]) for map_ in (*smoothed, pyramid[-1])]
        return self.predict(self.fuse(torch.cat(together, dim=1)))


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False),
        LayerNorm2d(channels_out),
        nn.GELU(),
    )


HeadKind = Literal["simple", "upernet"]
HEADS: dict[str, type[SimpleHead | UPerHead]] = {"simple": SimpleHead, "upernet": UPerHead}
"""The decoders by name. `Head(width, num_outputs, size)` turns four levels (B, width, h, w) into
(B, num_outputs, *size)."""
