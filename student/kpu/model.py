"""KPU's student: a frozen sentinel teacher, an adapter next to it that learns from the others, and the spaces
in which they are compared (KPU, "Knowledge Preservation and Unification").

B  images      D  width of the sentinel      C  width of a teacher
h, w  grid of one of the student's maps      H, W  grid of a teacher
X = {x, V}     image feature x (B, D) and feature map V (B, D, h, w)
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.student.kpu.latent_space import Alignment, Features, Projection
from teachercache.student.kpu.vit_adapter import STRIDES, NormKind, ViTAdapter
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import (
    ImageRepresentation,
    Student,
    StudentOutput,
    check_names,
    config_of,
    require_teachers,
)


class KPU(Student):
    """`stem` is the sentinel, any plain ViT of timm. `teacher_grids`: (H, W) of each teacher's map as
    compared; the scale of V whose grid is nearest to it represents the teacher. `class_tokens`: the teachers
    with a class token, which x is compared with.

    Table 2's rows: `preservation=False` trains the ViT itself, without an adapter; `unification` and
    `reconstruction` are Eq. 2 and 3. `norm`: that of the adapter. `image_sizes`: (height, width) of the
    images that are compared with a teacher, where not `image_size`. x is the sentinel's last class token (or
    the mean of its patch tokens) after a norm.

    Parts that are not compared with any teacher are not trained: scales of V that are nearest to none, and
    the norm of x where no teacher has a class token.
    """

    kind = "kpu"
    PARTS: ClassVar = {
        "stem": r"stem\.",
        "spatial prior": r"vit_adapter\.prior\.",
        "injectors": r"vit_adapter\.injectors\.",
        "extractors": r"vit_adapter\.extractors\.",
        "maps": r"vit_adapter\.(up|norms|scale_embedding)",
        "norm": r"norm\.",
        "h_s2t": r"latent_space\.s2t\.",
        "h_t2s": r"latent_space\.t2s\.",
        "h_rec": r"latent_space\.rec\.",
    }
    num_levels = 1
    for_distillation = frozenset({"h_t2s", "h_rec"})
    latent_space: Any  # by h, a ModuleDict of the teachers' projections, which its type cannot express

    def __init__(
        self,
        stem: str,
        teacher_dims: Mapping[str, int],
        image_size: Size,
        teacher_grids: Mapping[str, Size] | None = None,
        class_tokens: Collection[str] = (),
        pretrained: bool = False,
        tasks: Mapping[str, int] | None = None,
        preservation: bool = True,
        unification: bool = True,
        reconstruction: bool = True,
        norm: NormKind = "group",
        image_sizes: Mapping[str, Size] | None = None,
    ) -> None:
        check_names("teacher", teacher_dims)
        require_teachers(teacher_dims)
        teacher_grids = teacher_grids or {}
        _require_grids(teacher_dims, teacher_grids)
        tasks = tasks or {}
        _require_learnable(tasks, unification, reconstruction)
        teacher_grids = {name: teacher_grids[name] for name in teacher_dims}
        class_tokens = [name for name in teacher_dims if name in class_tokens]
        image_sizes = {
            name: size for name, size in (image_sizes or {}).items() if tuple(size) != tuple(image_size)
        }
        config = config_of(locals())
        module = Stem(stem, image_size, pretrained, resizes=bool(image_sizes))
        super().__init__(config, module.mean, module.std)
        self.stem = module
        self.norm = nn.LayerNorm(module.width, eps=1e-6)
        self.vit_adapter = ViTAdapter(module.width, module.level_depths, norm) if preservation else None
        student_dims = dict.fromkeys(teacher_dims, module.width)
        ends: dict[str, Any] = {"s2t": (student_dims, teacher_dims)}
        if unification:
            ends["t2s"] = teacher_dims, student_dims
        if reconstruction:
            ends["rec"] = student_dims, teacher_dims
        self.latent_space = nn.ModuleDict()
        for h, (before, after) in ends.items():
            self.latent_space[h] = nn.ModuleDict()
            for name in teacher_dims:
                h_t = Projection(before[name], after[name], module.width, name in class_tokens)
                self.latent_space[h][name] = h_t
        self._scales = {name: self._nearest_scale(name) for name in teacher_dims}
        if self.vit_adapter is not None:
            self.stem.requires_grad_(False)
            self.norm.requires_grad_(bool(class_tokens))
            self.vit_adapter.keep_scales(self.scales)

    @property
    def scales(self) -> list[int]:
        """The scales of V that are compared with teachers."""
        return sorted(set(self._scales.values()))

    def features(self, pixels_B3HW: Tensor) -> ImageRepresentation:
        """X of normalised pixels; V at strides 4, 8, 16 and 32, or without a ViT-Adapter on the ViT's grid.

        Scales that are not compared with a teacher (all but `scales`) end in untrained layers.
        """
        return self._represent(pixels_B3HW, range(len(STRIDES)) if self.vit_adapter else [0])

    def size_for(self, teacher: str) -> Size:
        """The (height, width) of the images on which the student learnt from this teacher."""
        height, width = self.config["image_sizes"].get(teacher, self.image_size)
        return height, width

    def project(self, pixels_B3HW: Tensor, teachers: Iterable[str] | None = None) -> dict[str, Features]:
        """h_s2t(X) for each of `teachers` (None: all): the student's version of its class token and map of
        raw tokens, before any norm and head of the teacher's own."""
        student = self._for_teachers(pixels_B3HW, self.teachers if teachers is None else teachers)
        return {
            name: self.latent_space["s2t"][name](features, self._grid(name))
            for name, features in student.items()
        }

    def unify(self, teachers: Mapping[str, Features]) -> dict[str, Features]:
        """h_t2s(X^t) of each teacher, on the grid of the scale that represents it."""
        return {
            name: self.latent_space["t2s"][name](teacher, self._scale_grids(name)[self._scales[name]])
            for name, teacher in teachers.items()
        }

    def forward(
        self,
        pixels_B3HW: Tensor,
        full: bool = False,
        maps: bool = True,
        teachers: Mapping[str, Features] | None = None,
    ) -> Any:
        """As `Student.forward`: one map (B, C, H, W) per teacher, for its last level. With the features of
        `teachers`, an `Alignment` for each, which is what training compares."""
        if teachers is not None:
            student = self._for_teachers(pixels_B3HW, teachers)
            return {name: self._align(name, student[name], teacher) for name, teacher in teachers.items()}
        feature_maps = {name: [features.map] for name, features in self.project(pixels_B3HW).items()}
        return StudentOutput(feature_maps, {}, {}) if full else feature_maps

    def _align(self, name: str, student: Features, teacher: Features) -> Alignment:
        h = {space: of_teachers[name] for space, of_teachers in self.latent_space.items()}
        s2t = h["s2t"](student, teacher.grid)
        t2s = h["t2s"](teacher, student.grid) if "t2s" in h else None
        rec = h["rec"](t2s, teacher.grid) if "rec" in h else None
        return Alignment(student, teacher, s2t, t2s, rec)

    def _grid(self, teacher: str) -> Size:
        height, width = self.config["teacher_grids"][teacher]
        return height, width

    def _nearest_scale(self, teacher: str) -> int:
        """The scale of V whose number of tokens is nearest to that of the teacher's grid, by their ratio."""
        wanted, sizes = math.prod(self._grid(teacher)), map(math.prod, self._scale_grids(teacher))
        ratios = [abs(math.log(size / wanted)) for size in sizes]
        return ratios.index(min(ratios))

    def _scale_grids(self, teacher: str) -> list[Size]:
        height, width = self.size_for(teacher)
        if self.vit_adapter is None:
            return [self.stem.grid_of((height, width))]
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]

    def _for_teachers(self, pixels_B3HW: Tensor, teachers: Iterable[str]) -> dict[str, Features]:
        """What is compared with each of these: x, and one scale of V."""
        scales = {name: self._scales[name] for name in teachers}
        wanted = sorted(set(scales.values()))
        image_BD, maps_BDhw = self._represent(pixels_B3HW, wanted)
        by_scale = dict(zip(wanted, maps_BDhw, strict=True))
        return {name: Features(image_BD, by_scale[scale]) for name, scale in scales.items()}

    def _represent(self, pixels_B3HW: Tensor, scales: Sequence[int]) -> ImageRepresentation:
        if self.config["image_sizes"]:
            self.stem.resize((pixels_B3HW.shape[2], pixels_B3HW.shape[3]))
        if self.vit_adapter is None:
            tokens_BND = self.stem(pixels_B3HW)[-1]
            patches_BnD = self.norm(tokens_BND[:, self.stem.num_prefix_tokens :])
            maps_BDhw = [patches_BnD.transpose(1, 2).unflatten(2, self.stem.grid)]
        else:
            tokens_BND, maps_BDhw = self.vit_adapter(self.stem, pixels_B3HW, scales)
        return ImageRepresentation(self.norm(self.stem.summary(tokens_BND)), maps_BDhw)


def _require_grids(teacher_dims: Mapping[str, int], teacher_grids: Mapping[str, Size]) -> None:
    if missing := [name for name in teacher_dims if name not in teacher_grids]:
        raise RecipeError(
            "A KPU compares whole maps, so it needs to know the teachers' grids.",
            got=f"no grid of {', '.join(missing)}",
            expected="(rows, columns) for each teacher",
            do="pass teacher_grids, such as {'clip': (24, 24)}",
        )


def _require_learnable(tasks: Mapping[str, int], unification: bool, reconstruction: bool) -> None:
    if tasks:
        raise RecipeError(
            "A KPU represents images; it cannot be trained on tasks here.",
            got=f"the tasks {', '.join(tasks)}",
            expected="none",
            do="leave out tasks, or choose kind sak",
        )
    if reconstruction and not unification:
        raise RecipeError(
            "Reconstruction starts from the shared space, which only unification makes.",
            got="reconstruction without unification",
            expected="both, unification alone, or neither (KPU, Table 2)",
            do="set unification, or leave out reconstruction",
        )
