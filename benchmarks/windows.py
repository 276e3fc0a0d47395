"""What windows of wide views do to targets, on a trained teacher.

    python -m benchmarks.windows --checkpoint demo/trained/dinov2_small.safetensors

For a DINOv2 ViT-S/14 on random crops of photographs, by level: (1) the gradient of the distillation losses
from the adjoint and the pooled grid in windows, beside that from the teacher's own tokens in them (cosine),
for a student near its teacher and a random one; (2) what the teacher says of a window that it sees alone,
beside what it says of it within the wide view (token cosine, channels standardised). Without a checkpoint the
weights are random, and the figures mean nothing.

Prints two tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage import data
from skimage.transform import resize
from torch import Tensor
from torch.nn import functional as F

from benchmarks.signals import PHOTOGRAPHS
from teachercache.cache_builder.teachers import build_teacher
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.windows import cut
from teachercache.student.losses.distillation import Target
from teachercache.student.training.targets import target_of

BLOCKS = (2, 5, 8)  # those behind look tuned for saliency in the one checkpoint that a registry has
CASES = [  # (views, side of the teacher's input): the second fills the student's grid, a token for each
    (ViewPolicy(size=(192, 192), margin=64), 252),
    (ViewPolicy(size=(224, 224), margin=32), 252),
    (ViewPolicy(size=(224, 224), margin=32), 224),
]
ALONE = ViewPolicy(size=(196, 196), margin=56, patch=14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", help="of timm's vit_small_patch14_dinov2")
    parser.add_argument("--rows", type=int, default=4)
    arguments = parser.parse_args()
    console = Console(width=140)
    gradients = [row for case in CASES for row in _gradients(*case, arguments.checkpoint, arguments.rows)]
    alone = _alone(arguments.checkpoint, 2 * arguments.rows)
    for rows in (gradients, alone):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(
                *(", ".join(f"{x:.3f}" for x in v) if isinstance(v, list) else v for v in row.values())
            )
        console.print(table)
    print(
        json.dumps(
            {"benchmark": "windows", "torch": torch.__version__, "gradients": gradients, "alone": alone}
        )
    )


def _gradients(views: ViewPolicy, side: int, checkpoint: str | None, rows: int) -> list[dict[str, Any]]:
    pixels = F.interpolate(_crops(rows, views.stored_size[0]), (side, side), mode="bicubic", antialias=True)
    teacher = build_teacher(
        "dinov2_small", checkpoint=checkpoint, pretrained=checkpoint is not None, image_size=side,
        block_indices=BLOCKS,
    )  # fmt: skip
    with torch.no_grad():
        maps = _standardised(teacher(pixels.round().clamp(0, 255).byte()).feature_maps_BSHWC.double())
    steps = np.arange(rows) * 2 % views.windows_per_axis, np.arange(rows)[::-1] % views.windows_per_axis
    windows = np.stack(steps, 1) * views.patch
    student = views.stored_size[0] // views.patch, views.stored_size[1] // views.patch
    grids = {"native": GridSpec()} | {
        kind: GridSpec(kind=kind, size=student) for kind in ("adjoint", "bilinear")
    }
    targets = {
        kind: target_of(
            stored_form(maps, grid), None, teacher.spec.model_copy(update={"grid": grid}), windows, views
        )
        for kind, grid in grids.items()
    }
    found = []
    for state in ("random", "near"):
        for cosine in ("flattened", "token"):
            by_level = [_led(targets, level, state, cosine) for level in range(len(BLOCKS))]
            found.append(
                {
                    "view": f"{views.size[0]} + {views.margin} px",
                    "grids": f"{teacher.spec.native_grid[0]}² → {student[0]}²",
                    "student": state,
                    "cosine": cosine,
                }
                | {kind: [level[kind] for level in by_level] for kind in by_level[0]}
            )
    return found


def _led(targets: dict[str, Target], level: int, state: str, cosine: Any) -> dict[str, float]:
    """By target, what its gradient shares with that of the native one."""
    near = targets["adjoint"].feature_maps_BSHWC[:, level].permute(0, 3, 1, 2)
    noise = torch.randn(near.shape, generator=torch.Generator().manual_seed(0), dtype=near.dtype)
    student = (near + 0.3 * noise if state == "near" else noise).requires_grad_()
    gradients = {
        kind: torch.autograd.grad(target.compare(level, student, cosine, "squared_error")[0].mean(), student)[
            0
        ]
        for kind, target in targets.items()
    }
    native = gradients.pop("native").flatten()
    return {kind: F.cosine_similarity(one.flatten(), native, dim=0).item() for kind, one in gradients.items()}


def _alone(checkpoint: str | None, rows: int) -> list[dict[str, Any]]:
    pixels = _crops(rows, ALONE.stored_size[0]).round().byte()
    settings: dict[str, Any] = {
        "checkpoint": checkpoint,
        "pretrained": checkpoint is not None,
        "block_indices": BLOCKS,
    }
    wide, narrow = (
        build_teacher("dinov2_small", image_size=side, **settings)
        for side in (ALONE.stored_size[0], ALONE.size[0])
    )
    found = []
    with torch.no_grad():
        maps = wide(pixels).feature_maps_BSHWC.double()
        for top, left in ((0, 0), (28, 28), (56, 14)):
            seen = cut(maps, np.array([(top, left)] * rows), ALONE)
            own = narrow(pixels[:, :, top : top + 196, left : left + 196].contiguous()).feature_maps_BSHWC
            mean, std = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True)
            cosines = F.cosine_similarity((own - mean) / std, (seen - mean) / std, dim=-1)
            found.append({"window": f"{top}, {left}", "token cosine": cosines.mean((0, 2, 3)).tolist()})
    return found


def _standardised(maps: Tensor) -> Tensor:
    return (maps - maps.mean((0, 2, 3), keepdim=True)) / maps.std((0, 2, 3), keepdim=True)


def _crops(count: int, side: int) -> Tensor:
    """(count, 3, side, side) of photographs, 0 to 255."""
    generator = np.random.default_rng(0)
    crops = []
    for i in range(count):
        photograph = getattr(data, PHOTOGRAPHS[i % len(PHOTOGRAPHS)])()
        length = int(generator.integers(min(photograph.shape[:2]) // 3, min(photograph.shape[:2])))
        top, left = (int(generator.integers(0, whole - length + 1)) for whole in photograph.shape[:2])
        crop = photograph[top : top + length, left : left + length]
        crops.append(255 * resize(crop, (side, side), anti_aliasing=True))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()


if __name__ == "__main__":
    main()
