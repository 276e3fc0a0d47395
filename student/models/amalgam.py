"""Tasks learnt directly from the teachers' features: frozen teachers and heads, with no encoder to run.

Table 12's "Freeze" is one teacher with `fusion="sum"`; Table 19's upper bounds are three teachers plus a
learnt stem. The features come from a cache, so the teachers do not slow down a step.

B  images     S  levels     h, w  grid of the experts, n = h·w     D  width of the experts
C  width of a teacher       H, W  grid of a teacher's features
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import ArgumentError
from teachercache.pipeline.grids import pool
from teachercache.pipeline.records.spec import GridSpec
from teachercache.pipeline.records.strict import Size
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import NUM_LEVELS, Student, StudentOutput, config_of
from teachercache.student.models.task_decoder import TaskDecoder

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Amalgam(Student):
    """`stem`: a timm ViT that learns along with the teachers, as one more expert, or None.

    Experts have the stem's width, or the widest teacher's; linear layers, one per level, map teachers of
    another width to it. They are fused on the stem's grid or, without a stem, on the finest grid of the given
    features, so that SAM's 64×64 tokens alone stay 64×64. (The paper does not state the grid. On the stem's
    32×32, at 512², routers take 6.2 G MACs more than a sum and concatenation 6570 G, as in Table 19, which
    has 6 and 6570; on SAM's 64×64 it would be 24.7 and 6705.)
    """

    kind = "amalgam"
    PARTS: ClassVar = {
        "stem": r"stem\.",
        "aligners": r"aligners\.",
        "routers": r"decoder\.routers\.",
        "heads": r"decoder\.heads\.",
    }
    reads_features = True
    aligners: Any  # a ModuleDict of ModuleLists, which its type cannot express

    def __init__(
        self,
        stem: str | None,
        teacher_dims: Mapping[str, int],
        image_size: Size,
        tasks: Mapping[str, int],
        pretrained: bool = False,
        fusion: str = "mor",
        decoder: str = "simple",
        sak_compat: bool = False,
    ) -> None:
        config = config_of(locals())
        module = Stem(stem, image_size, pretrained, sak_compat) if stem else None
        super().__init__(config, *((module.mean, module.std) if module else _IMAGENET))
        self.stem = module
        width = module.width if module else max(teacher_dims.values())
        self.aligners = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.Linear(channels, width) for _ in range(NUM_LEVELS))
                for name, channels in teacher_dims.items()
                if channels != width
            }
        )
        self.decoder = TaskDecoder(width, len(self.experts), tasks, self.image_size, fusion, decoder)

    @property
    def experts(self) -> list[str]:
        return [*(["stem"] if self.config["stem"] else []), *self.teachers]

    def forward(
        self,
        pixels_B3HW: Tensor,
        full: bool = False,
        maps: bool = True,
        features: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor] | StudentOutput:
        """As `Student.forward`; `features`: for each teacher (B, S, H, W, C), on any grid.

        Raises `ValueError` if the features of a teacher are missing.
        """
        experts = []
        if self.stem is not None:
            levels_BnD = self.stem.levels(self.stem(pixels_B3HW))
            experts.append(torch.stack(levels_BnD, dim=1).unflatten(2, self.stem.grid))
        for name in self.teachers:
            if features is None or name not in features:
                raise ArgumentError(
                    "This student works on its teachers' features, not on images alone.",
                    got=f"no features of {name}",
                    expected=f"features of {', '.join(self.teachers)}",
                    do="read them from a cache of these images, and pass them as `features`",
                )
            experts.append(self._teacher_maps(name, features[name]))
        grids = [(maps.shape[2], maps.shape[3]) for maps in experts]
        grid = grids[0] if self.stem else max(grids, key=math.prod)
        experts_EBSnD = [pool(maps, GridSpec(kind="bilinear", size=grid)).flatten(2, 3) for maps in experts]
        levels_SBEnD = torch.stack(experts_EBSnD, dim=2).unbind(1)
        predictions, gates = self.decoder(levels_SBEnD, grid)
        return StudentOutput({}, predictions, gates) if full else predictions

    def _teacher_maps(self, name: str, features_BSHWC: Tensor) -> Tensor:
        """(B, S, H, W, D), on the grid of the features."""
        features_BSHWC = features_BSHWC.to(self.mean.dtype)
        if name not in self.aligners:
            return features_BSHWC
        levels = zip(self.aligners[name], features_BSHWC.unbind(1), strict=True)
        return torch.stack([aligner(level) for aligner, level in levels], dim=1)
