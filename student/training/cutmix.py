"""Each two images of a batch exchange a rectangle, of their pixels and of their teachers' maps."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.crops import uniforms
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.student.losses.distillation import Target


class CutMix:
    """CutMix (Yun et al., 2019) of images 2k and 2k + 1 of a batch, whose share of pixels is uniform.

    A rectangle is of whole patches of the student, of which an image has `grid`. It is drawn by the seed, the
    step and the key of image 2k, so that a run resumes, and several processes with even batches mix what one
    does. A token is exchanged where its centre is.
    """

    def __init__(self, grid: Size, seed: int) -> None:
        self._grid, self._seed = grid, seed

    def __call__(
        self, batch: Batch, images_B3HW: Tensor, targets: Mapping[str, Target]
    ) -> tuple[Tensor, dict[str, Target]]:
        """The images, (B, 3, H, W) of any dtype, and the targets of what they show then."""
        patches_Bhw = self._patches(batch).to(images_B3HW.device, non_blocking=True)

        def exchanged(values: Tensor, grid: Size, shape: tuple[int, ...]) -> Tensor:
            rows, columns = (
                ((torch.arange(count, device=values.device) + 0.5) * patches / count).long()
                for count, patches in zip(grid, self._grid, strict=True)
            )
            inside = patches_Bhw[:, rows][:, :, columns].view(shape)
            others = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            return torch.where(inside, others, values)

        def of(target: Target) -> Target:
            maps_BSHWC = target.feature_maps_BSHWC
            height, width = maps_BSHWC.shape[2:4]
            shape = (-1, 1, height, width, 1)
            return replace(target, feature_maps_BSHWC=exchanged(maps_BSHWC, (height, width), shape))

        height, width = images_B3HW.shape[2:]
        images_B3HW = exchanged(images_B3HW, (height, width), (-1, 1, height, width))
        return images_B3HW, {name: of(target) for name, target in targets.items()}

    def _patches(self, batch: Batch) -> Tensor:
        """Which are exchanged: (B, rows, columns) of the student's patches."""
        keys = [f"cutmix/{key}" for key in batch.sample_keys[::2]]
        drawn = uniforms(self._seed, keys, np.array([batch.step]), draws=3)[:, 0]
        share = np.sqrt(drawn[:, 0])
        inside = list[np.ndarray]()
        for axis, patches in enumerate(self._grid):
            length = np.rint(share * patches)
            first = np.floor(drawn[:, axis + 1] * (patches - length + 1))
            at = np.arange(patches)
            inside.append((at >= first[:, None]) & (at < (first + length)[:, None]))
        rectangles = inside[0][:, :, None] & inside[1][:, None]
        return torch.from_numpy(rectangles.repeat(2, axis=0))


def unmixable(
    batch_size: int, views: ViewPolicy, teachers: Mapping[str, TeacherSpec]
) -> Iterator[RecipeError]:
    """What keeps the images of a cache from being mixed."""
    if batch_size % 2:
        yield RecipeError(
            "CutMix pairs the images of a batch.",
            got=f"batch_size_per_process {batch_size}",
            expected="an even number",
            do=f"set batch_size_per_process={batch_size + 1}, or cutmix=false",
        )
    padded = [name for name, spec in teachers.items() if spec.is_padded]
    adjoint = [name for name, spec in teachers.items() if spec.grid.kind == "adjoint"]
    unfit = [
        *([f"views.margin {views.margin}"] if views.margin else []),
        *([f"padding in the maps of {', '.join(padded)}"] if padded else []),
        *([f"grid: adjoint of {', '.join(adjoint)}"] if adjoint else []),
    ]
    if unfit:
        yield RecipeError(
            "CutMix exchanges tokens of maps that fill the view and are the teachers' own.",
            got="; ".join(unfit),
            expected="a cache without a margin, of teachers that see the aspect of the views, on native or "
            "bilinear grids",
            do="set cutmix=false, or build such a cache of these images (square views, or no sak_compat)",
        )
