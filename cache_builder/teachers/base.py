"""What every teacher gives: `TeacherFeatures`, and how pixels get in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.spec import TeacherSpec


@dataclass
class TeacherFeatures:
    """One forward pass over B views (S levels, H×W native grid, C channels).

    `feature_maps_BSHWC` are raw block outputs: no final norm, prefix tokens dropped.
    `cls_token_BSC` is None for teachers without one (SAM, SigLIP), never zeros.
    `global_feature_BD` is the projected or pooled image feature, when the spec asks for it.
    """

    feature_maps_BSHWC: Tensor
    cls_token_BSC: Tensor | None
    global_feature_BD: Tensor | None


class Teacher(nn.Module, ABC):
    """A frozen encoder in eval mode."""

    spec: TeacherSpec
    weights_hash: str

    @abstractmethod
    def forward(self, pixels_B3HW: Tensor) -> TeacherFeatures:
        """`pixels_B3HW` is uint8 at `spec.render_size`; normalisation happens here, on the device."""


def preprocess(pixels_B3HW: Tensor, spec: TeacherSpec) -> Tensor:
    """uint8 views at `render_size` → normalised float32 at `image_size`."""
    mean = torch.tensor(spec.mean, device=pixels_B3HW.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=pixels_B3HW.device).view(1, 3, 1, 1)
    x = (pixels_B3HW.float() / 255 - mean) / std
    if spec.render_size != spec.image_size:
        x = nn.functional.interpolate(x, size=spec.image_size, mode="bilinear", align_corners=False)
    return x
