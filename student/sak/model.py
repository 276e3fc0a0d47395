"""SAK's student of stage 1: the stem and an adapter path for each teacher (SAK, 3.2).

B  images                h, w  grid of the stem, n = h·w patch tokens
D  width of the stem     C     width of a teacher
Z_l, R_l (B, N, D)       tokens of the stem and of a path after block l, prefix tokens included
levels                   blocks L/4, L/2, 3L/4, L
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import RecipeError
from pipeline.spec import Size
from student.base import Student
from student.sak.adapter_path import AdapterPath
from student.sak.stem import Stem


@dataclass
class Representations:
    """The patch tokens (B, n, D) of each level: the stem's as they are, each path's after its norm."""

    stem: list[Tensor]
    paths: dict[str, list[Tensor]]


class SAK(Student):
    """`forward` gives what distillation compares; `representations` what is used downstream."""

    kind = "sak"
    paths: Any  # a ModuleDict of AdapterPath, which its type cannot say

    def __init__(
        self,
        stem: str,
        teacher_dims: Mapping[str, int],
        image_size: Size,
        reduction: int = 4,
        pretrained: bool = False,
    ) -> None:
        _check_teacher_names(teacher_dims)
        module = Stem(stem, image_size, pretrained)
        config = {
            "stem": stem,
            "teacher_dims": dict(teacher_dims),
            "image_size": list(image_size),
            "reduction": reduction,
        }
        super().__init__(config, module.mean, module.std)
        self.stem = module
        self.paths = nn.ModuleDict(
            {
                name: AdapterPath(module.width, module.depth, module.level_blocks, width, reduction)
                for name, width in teacher_dims.items()
            }
        )

    def representations(self, pixels_B3HW: Tensor) -> Representations:
        tokens_BND = self.stem(pixels_B3HW)
        prefix = self.stem.num_prefix_tokens
        return Representations(
            stem=[tokens_BND[block][:, prefix:] for block in self.stem.level_blocks],
            paths={name: path(tokens_BND, prefix) for name, path in self.paths.items()},
        )

    def forward(self, pixels_B3HW: Tensor) -> dict[str, list[Tensor]]:
        levels_BnD = self.representations(pixels_B3HW).paths
        return {
            name: [self._feature_map(tokens_BnC) for tokens_BnC in path.align(levels_BnD[name])]
            for name, path in self.paths.items()
        }

    def _feature_map(self, tokens_BnC: Tensor) -> Tensor:
        """(B, n, C) → (B, C, h, w) without a copy: in memory the channels stay last."""
        maps_BhwC: Tensor = tokens_BnC.unflatten(1, self.stem.grid)
        return maps_BhwC.permute(0, 3, 1, 2)

    def parameters_by_part(self) -> dict[str, int]:
        paths = list(self.paths.values())
        return {
            "stem": _count(self.stem),
            "adapter paths": sum(_count(path.adapters) for path in paths),
            "output norms": sum(_count(path.output_norms) for path in paths),
            "aligners": sum(_count(path.aligners) for path in paths),
        }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_teacher_names(teacher_dims: Mapping[str, int]) -> None:
    if not teacher_dims:
        raise RecipeError("A student needs a teacher.", got="none", expected="one or more", do="name them")
    for name in teacher_dims:
        if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict(), name):
            raise RecipeError(
                "This teacher's name cannot be the name of a part of the student.",
                got=repr(name),
                expected="letters, digits, - and _",
                do="build the cache with another name for this teacher",
            )
