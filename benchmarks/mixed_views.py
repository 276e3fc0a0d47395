"""Other ways to make more of a stored view, which `benchmarks.view_curve` tries.

cutmix     a rectangle of patches, pixels and tokens, comes from the next image of the batch
zoom       the student sees a window of the view, enlarged to the view's size, and of the stored tokens those
           whose centres lie in it; its map is sampled where they lie. A step has one scale
tolerant   of the student's map and the eight that lie a token beside it, the one that comes nearest counts

Each is drawn by torch's random numbers, which training seeds at each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.grids import Places, upsample
from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.windows import _Axis
from teachercache.student.losses.cosine import cosine_similarity
from teachercache.student.losses.distillation import CosineKind, DistanceKind, Target
from teachercache.student.training.targets import TARGET_SOURCES, CachedTargets

Mix = Literal["cutmix", "zoom", "tolerant"]
LEAST_SIDE = 0.6  # of a view's side that a window shows


@contextmanager
def mixed(mix: Mix | None, patch: int) -> Iterator[None]:
    """Runs with cached features on native grids train like this."""
    plain = TARGET_SOURCES["cached"]
    if mix is not None:
        change = {"cutmix": _cutmix, "zoom": _zoom, "tolerant": _tolerant}[mix]

        class Mixed(CachedTargets):
            def __call__(self, batch: Batch) -> dict[str, Target]:
                return change(batch, super().__call__(batch), patch)

        TARGET_SOURCES["cached"] = Mixed
    try:
        yield
    finally:
        TARGET_SOURCES["cached"] = plain


def _cutmix(batch: Batch, targets: dict[str, Target], patch: int) -> dict[str, Target]:
    """The share that is kept is uniform, as in CutMix (Yun et al., 2019), in whole patches."""
    sides = torch.tensor(batch.images.shape[2:])
    share = (1 - torch.rand(())).sqrt()
    box = (share * sides / patch).round().long() * patch
    first = (torch.rand(2) * ((sides - box) // patch + 1)).long() * patch
    inside = [
        (torch.arange(side) >= start) & (torch.arange(side) < start + length)
        for side, start, length in zip(sides.tolist(), first, box, strict=True)
    ]
    batch.images = torch.where(inside[0][:, None] & inside[1], batch.images.roll(1, 0), batch.images)

    def of(target: Target) -> Target:
        maps_BSHWC = target.feature_maps_BSHWC
        rows, columns = (
            where[((torch.arange(count) + 0.5) * len(where) / count).long()]
            for where, count in zip(inside, maps_BSHWC.shape[2:4], strict=True)
        )
        of_the_next = (rows[:, None] & columns)[:, :, None]
        return replace(target, feature_maps_BSHWC=torch.where(of_the_next, maps_BSHWC.roll(1, 0), maps_BSHWC))

    return {name: of(target) for name, target in targets.items()}


def _zoom(batch: Batch, targets: dict[str, Target], patch: int) -> dict[str, Target]:
    count, _, height, width = batch.images.shape
    share = LEAST_SIDE + (1 - LEAST_SIDE) * torch.rand(()).item()
    seen = round(share * height), round(share * width)
    firsts = [
        (torch.rand(count) * (side - part + 1)).long().tolist()
        for side, part in zip((height, width), seen, strict=True)
    ]
    windows = [
        image[:, top : top + seen[0], left : left + seen[1]]
        for image, top, left in zip(batch.images, *firsts, strict=True)
    ]
    batch.images = F.interpolate(
        torch.stack(windows).float(), (height, width), mode="bicubic", antialias=True, align_corners=False
    ).round().clamp(0, 255).byte()  # fmt: skip

    def of(target: Target) -> Target:
        maps_BSHWC = target.feature_maps_BSHWC
        rows, columns = (
            _Axis(tokens, part, side, patch)
            for tokens, part, side in zip(maps_BSHWC.shape[2:4], seen, (height, width), strict=True)
        )
        cut = [
            maps_SHWC[:, rows.tokens_in(top), columns.tokens_in(left)]
            for maps_SHWC, top, left in zip(maps_BSHWC, *firsts, strict=True)
        ]
        places = Places(
            *(
                torch.stack([axis.places(first) for first in starts])
                for axis, starts in zip((rows, columns), firsts, strict=True)
            )
        )
        return replace(target, feature_maps_BSHWC=torch.stack(cut), grid=places)

    return {name: of(target) for name, target in targets.items()}


class _TolerantTarget(Target):
    def compare(
        self, level: int, student_BChw: Tensor, cosine: CosineKind, distance: DistanceKind
    ) -> tuple[Tensor, Tensor]:
        """Of each image the shift with the largest flattened cosine, and the distance of the same shift."""
        assert (cosine, distance) == ("flattened", "smooth_l1"), "what the curve trains with"
        teacher_BHWC = self.feature_maps_BSHWC[:, level].float()
        rows, columns = teacher_BHWC.shape[1:3]
        grid, (height, width) = self.grid or (rows, columns), student_BChw.shape[2:]
        padded_BChw = F.pad(student_BChw, (1, 1, 1, 1), mode="replicate")
        cosines, distances = list[Tensor](), list[Tensor]()
        for row, column in product(range(3), repeat=2):
            shifted_BChw = padded_BChw[:, :, row : row + height, column : column + width]
            student_BHWC = upsample(shifted_BChw, grid).permute(0, 2, 3, 1)
            cosines.append(cosine_similarity(student_BHWC.flatten(1), teacher_BHWC.flatten(1), dim=-1))
            apart = F.smooth_l1_loss(student_BHWC, teacher_BHWC, reduction="none")
            distances.append(apart.flatten(1).mean(1))
        nearest_1B = torch.stack(cosines).argmax(0, keepdim=True)
        cosine_B, distance_B = (torch.stack(one).gather(0, nearest_1B)[0] for one in (cosines, distances))
        return 1 - cosine_B, distance_B


def _tolerant(batch: Batch, targets: dict[str, Target], patch: int) -> dict[str, Target]:
    return {
        name: _TolerantTarget(one.feature_maps_BSHWC, one.cls_token_BC, one.grid)
        for name, one in targets.items()
    }
