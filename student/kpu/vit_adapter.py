"""ViT-Adapter (Chen et al., 2022): learns next to a frozen ViT (KPU, "Knowledge Adapter").

B  images      D  width       n  patch tokens of the ViT
C1 … C4        the adapter's maps (B, D, h, w), a quarter to a thirty-second of the image's sides
N  tokens of C2, C3 and C4, map by map
"""

import math
from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachercache.pipeline.grids import upsample
from teachercache.student.kpu.deformable_attention import DeformableAttention, Grids
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import initialise_linear

NormKind = Literal["group", "sync_batch"]
STRIDES = (4, 8, 16, 32)
_HEAD_WIDTH = 64
_CONV_WIDTH = 64
_FFN_RATIO = 0.25
_EXTRA_EXTRACTORS = 2


class ViTAdapter(nn.Module):
    """Convolutions look at the image (`SpatialPrior`); before each quarter of the ViT's blocks, an injector
    adds their maps to the patch tokens, and after it an extractor takes the tokens back, with two more at the
    end. Class token and registers bypass the adapter.

    All is as in the original, except for the norms: `GroupNorm` replaces its `SyncBatchNorm`, so that nothing
    depends on how a batch is divided (docs/design.md). `norm="sync_batch"` is the original's: batch norms,
    which training on several GPUs turns into those. A new injector adds nothing: its gamma is 0.
    """

    extractors: Any  # a ModuleList of ModuleLists, which its type cannot express

    def __init__(self, width: int, level_depths: Collection[int], norm: NormKind = "group") -> None:
        super().__init__()
        self._ends = list(level_depths)
        self._starts = [0, *self._ends[:-1]]
        self.prior = SpatialPrior(width, norm)
        self.scale_embedding = nn.Parameter(torch.empty(len(STRIDES) - 1, width))
        self.injectors = nn.ModuleList(Injector(width) for _ in self._starts)
        self.extractors = nn.ModuleList(
            nn.ModuleList(Extractor(width) for _ in range(1 + _EXTRA_EXTRACTORS * (end == self._ends[-1])))
            for end in self._ends
        )
        self.up = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.norms = nn.ModuleList(_NORMS[norm](width) for _ in STRIDES)
        self.apply(_initialise)
        nn.init.normal_(self.scale_embedding)

    def forward(self, stem: Stem, pixels_B3HW: Tensor, scales: Iterable[int]) -> tuple[Tensor, list[Tensor]]:
        """(the stem's last tokens (B, prefix + n, D), the map (B, D, h, w) of each of `scales`, 0 to 3).

        Sides that a stride does not divide are rounded up.
        """
        prior_BDhw = self.prior(pixels_B3HW)
        grids = tuple((map_BDhw.shape[2], map_BDhw.shape[3]) for map_BDhw in prior_BDhw)
        map_grids, stem_grids = grids[1:], (stem.grid,)
        tokens_BND = torch.cat(
            [_tokens(prior_BDhw[i + 1]) + self.scale_embedding[i] for i in range(len(map_grids))], dim=1
        )
        taps_BnD: list[Tensor] = []

        def between(block: int, stem_BnD: Tensor) -> Tensor:
            nonlocal tokens_BND
            prefix, patches_BnD = stem_BnD.tensor_split([stem.num_prefix_tokens], dim=1)
            if block in self._ends:
                for extractor in self.extractors[len(taps_BnD)]:
                    tokens_BND = extractor(tokens_BND, map_grids, patches_BnD, stem_grids)
                taps_BnD.append(patches_BnD)
            if block not in self._starts:
                return stem_BnD
            injector = self.injectors[len(taps_BnD)]
            return torch.cat([prefix, injector(patches_BnD, stem_grids, tokens_BND, map_grids)], dim=1)

        last_BND = stem(pixels_B3HW, between)[-1]
        maps_BDhw = _maps(tokens_BND, map_grids)

        def output(scale: int) -> Tensor:
            height, width = grids[scale]
            map_BDhw = maps_BDhw[max(scale - 1, 0)]
            if scale == 0:
                map_BDhw = self.up(map_BDhw)[:, :, :height, :width] + prior_BDhw[0]
            (stem_BDhw,) = _maps(taps_BnD[scale], stem_grids)
            return self.norms[scale](map_BDhw + upsample(stem_BDhw, (height, width)))

        return last_BND, [output(scale) for scale in scales]

    def keep_scales(self, scales: Collection[int]) -> None:
        """Exclude from training the parts that lead only to maps outside `scales`."""
        for scale, norm in enumerate(self.norms):
            norm.requires_grad_(scale in scales)
        for layer in (self.up, self.prior.projections[0]):
            layer.requires_grad_(0 in scales)


class SpatialPrior(nn.Module):
    """Convolutions over the image: C1 to C4 before any interaction (the spatial prior module)."""

    def __init__(self, width: int, norm: NormKind = "group") -> None:
        super().__init__()
        widths = [_CONV_WIDTH, 2 * _CONV_WIDTH, 4 * _CONV_WIDTH, 4 * _CONV_WIDTH]
        self.stem = nn.Sequential(
            _convolution(3, _CONV_WIDTH, norm, stride=2),
            _convolution(_CONV_WIDTH, _CONV_WIDTH, norm),
            _convolution(_CONV_WIDTH, _CONV_WIDTH, norm),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.ModuleList(
            _convolution(before, after, norm, stride=2) for before, after in pairwise(widths)
        )
        self.projections = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)

    def forward(self, pixels_B3HW: Tensor) -> list[Tensor]:
        maps_Bchw = [self.stem(pixels_B3HW)]
        for stage in self.stages:
            maps_Bchw.append(stage(maps_Bchw[-1]))
        return [project(map_Bchw) for project, map_Bchw in zip(self.projections, maps_Bchw, strict=True)]


class _Attending(nn.Module):
    """attention(LN(queries), LN(features))."""

    def __init__(self, width: int, num_maps: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.feature_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = DeformableAttention(width, max(1, width // _HEAD_WIDTH), num_maps)

    def _attend(
        self, queries_BQD: Tensor, grids: Grids, features_BND: Tensor, feature_grids: Grids
    ) -> Tensor:
        queries_BQD, features_BND = self.query_norm(queries_BQD), self.feature_norm(features_BND)
        return self.attention(queries_BQD, grids, features_BND, feature_grids)


class Injector(_Attending):
    """patches + γ · attention(LN(patches), LN(tokens)) (ViT-Adapter, Eq. 1); γ (D,) starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__(width, num_maps=len(STRIDES) - 1)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, patches_BnD: Tensor, stem_grids: Grids, tokens_BND: Tensor, map_grids: Grids) -> Tensor:
        return patches_BnD + self.gamma * self._attend(patches_BnD, stem_grids, tokens_BND, map_grids)


class Extractor(_Attending):
    """The adapter's tokens attend to the ViT's, then a feed-forward layer follows (ViT-Adapter, Eq. 2, 3)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, num_maps=1)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-6)
        self.ffn = ConvFFN(width, int(width * _FFN_RATIO))

    def forward(self, tokens_BND: Tensor, map_grids: Grids, patches_BnD: Tensor, stem_grids: Grids) -> Tensor:
        tokens_BND = tokens_BND + self._attend(tokens_BND, map_grids, patches_BnD, stem_grids)
        return tokens_BND + self.ffn(self.ffn_norm(tokens_BND), map_grids)


class ConvFFN(nn.Module):
    """A feed-forward layer whose hidden tokens see their neighbours on each map (3×3, depthwise)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.leave = nn.Linear(hidden, width)

    def forward(self, tokens_BND: Tensor, grids: Grids) -> Tensor:
        maps_BDhw = _maps(self.enter(tokens_BND), grids)
        hidden_BNE = torch.cat([_tokens(self.depthwise(map_BDhw)) for map_BDhw in maps_BDhw], dim=1)
        return self.leave(F.gelu(hidden_BNE))


def _tokens(map_BDhw: Tensor) -> Tensor:
    return map_BDhw.flatten(2).transpose(1, 2)


def _maps(tokens_BND: Tensor, grids: Grids) -> list[Tensor]:
    """The maps (B, D, h, w) whose tokens follow each other map by map."""
    parts_BnD = tokens_BND.split([math.prod(grid) for grid in grids], dim=1)
    return [part.transpose(1, 2).unflatten(2, grid) for part, grid in zip(parts_BnD, grids, strict=True)]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


_NORMS: dict[NormKind, Callable[[int], nn.Module]] = {"group": _group_norm, "sync_batch": nn.BatchNorm2d}


def _convolution(before: int, after: int, norm: NormKind, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, _NORMS[norm](after), nn.ReLU(inplace=True))


def _initialise(module: nn.Module) -> None:
    """As in the original; `nn.Module.apply` reaches an attention after its layers."""
    initialise_linear(module)
    if isinstance(module, DeformableAttention):
        module.reset_parameters()
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
