"""SAK's student (SAK, 3.2 and 3.3): the stem, an adapter path for each teacher, and the task decoder.

B  images                h, w  grid of the stem, n = h·w patch tokens
D  width of the stem     C     width of a teacher
Z_l, R_l (B, N, D)       tokens of the stem and of a path after block l, prefix tokens included; Z_0 after the
                         patch embedding
S  levels                blocks L/4, L/2, 3L/4, L
E  experts               the stem, then the paths
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.records.strict import Size
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import (
    ImageRepresentation,
    Student,
    StudentOutput,
    check_names,
    config_of,
    initialise_linear,
    require_teachers,
)
from teachercache.student.models.task_decoder import TaskDecoder


class Adapter(nn.Module):
    """R_out = α · GELU(R_in W_down) W_up + R_in (SAK, Eq. 3), α one learnable number.

    The paper does not state the initial α. It is 1 here, as in the authors' code: the small initial weights
    (σ = 0.02) already make a new adapter nearly the identity, and zero would block the gradient of W_down
    and W_up at the first step.
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        update_BND: Tensor = self.up(nn.functional.gelu(self.down(tokens_BND)))
        return self.scale * update_BND + tokens_BND


class AdapterPath(nn.Module):
    """The Teacher-Specific Adapter Path: L+1 adapters next to the stem, and their outputs. It is
    self-contained, so that teachers can be added and removed.

    `level_depths`: after how many blocks each level is read. If the teacher's width is not the stem's, an
    aligner (a linear layer) maps each level to it; only distillation needs the aligners.
    """

    def __init__(
        self, width: int, depth: int, level_depths: Sequence[int], teacher_width: int, reduction: int
    ) -> None:
        super().__init__()
        self.level_depths = tuple(level_depths)
        self.adapters = nn.ModuleList(Adapter(width, reduction) for _ in range(depth + 1))
        self.output_norms = nn.ModuleList(nn.LayerNorm(width) for _ in level_depths)
        self.aligners = nn.ModuleList(
            nn.Linear(width, teacher_width) for _ in level_depths if teacher_width != width
        )
        self.apply(initialise_linear)

    def forward(self, stem_tokens_BND: Sequence[Tensor], num_prefix_tokens: int) -> list[Tensor]:
        """[Z_0, …, Z_L] → the normalised patch tokens (B, n, D) of each level.

        R_0 = a_0(Z_0), R_l = a_l(R_{l-1} + Z_l) (SAK, Eq. 2).
        """
        tokens_BND = self.adapters[0](stem_tokens_BND[0])
        levels_BnD = []
        for block, stem_BND in enumerate(stem_tokens_BND[1:], start=1):
            tokens_BND = self.adapters[block](tokens_BND + stem_BND)
            if block in self.level_depths:
                levels_BnD.append(tokens_BND[:, num_prefix_tokens:])
        return [norm(tokens_BnD) for norm, tokens_BnD in zip(self.output_norms, levels_BnD, strict=True)]


class SAK(Student):
    """Without `tasks`, the student of stage 1, which is distilled; with them that of stage 2 or, without
    teachers, the multi-task baseline (with a single task, the single-task baseline).

    `adapter_paths=False` is the baseline of Table 3, row 1: only linear aligners between stem and teachers,
    and the stem as the only expert. `fusion` and `decoder` are `TaskDecoder`'s.

    `forward` returns the maps that distillation compares or the predictions; both are made from
    `representations`.
    """

    kind = "sak"
    PARTS: ClassVar = {
        "stem": r"stem\.",
        "adapter paths": r"paths\.[^.]+\.adapters\.",
        "output norms": r"paths\.[^.]+\.output_norms\.",
        "aligners": r"paths\.[^.]+\.aligners\.",
        "routers": r"decoder\.routers\.",
        "heads": r"decoder\.heads\.",
    }
    for_distillation = frozenset({"aligners"})
    paths: Any  # a ModuleDict of AdapterPath or of `aligners` alone, which its type cannot express
    decoder: TaskDecoder | None

    def __init__(
        self,
        stem: str,
        teacher_dims: Mapping[str, int],
        image_size: Size,
        reduction: int = 4,
        pretrained: bool = False,
        tasks: Mapping[str, int] | None = None,
        fusion: str = "mor",
        decoder: str = "simple",
        adapter_paths: bool = True,
        sak_compat: bool = False,
    ) -> None:
        tasks = dict(tasks or {})
        check_names("teacher", teacher_dims)
        check_names("task", tasks)
        if not tasks:
            require_teachers(teacher_dims)
        config = config_of(locals())
        module = Stem(stem, image_size, pretrained, sak_compat)
        super().__init__(config, module.mean, module.std)
        self.stem = module
        self.paths = nn.ModuleDict()
        for name, width in teacher_dims.items():
            self.paths[name] = self._new_path(width)
        self.decoder = None
        if tasks:
            width, num_experts = module.width, len(self.experts)
            self.decoder = TaskDecoder(width, num_experts, tasks, self.image_size, fusion, decoder)

    @property
    def experts(self) -> list[str]:
        """The names along the last axis of the gates."""
        return ["stem", *(self.teachers if self.config["adapter_paths"] else [])]

    def representations(self, pixels_B3HW: Tensor) -> list[list[Tensor]]:
        """The patch tokens (B, n, D) of each of `experts`, level by level: the stem's unchanged, a path's
        after its norm."""
        return self._of_experts(self.stem(pixels_B3HW))

    def _of_experts(self, tokens_BND: list[Tensor]) -> list[list[Tensor]]:
        prefix = self.stem.num_prefix_tokens
        of_paths = [self.paths[name](tokens_BND, prefix) for name in self.experts[1:]]
        return [self.stem.levels(tokens_BND), *of_paths]

    def features(self, pixels_B3HW: Tensor) -> ImageRepresentation:
        """The last class token of the stem, or the mean of its patch tokens, and the experts side by side at
        each level."""
        tokens_BND = self.stem(pixels_B3HW)
        levels = [torch.cat(level, 2) for level in zip(*self._of_experts(tokens_BND), strict=True)]
        maps = [level.transpose(1, 2).unflatten(2, self.stem.grid) for level in levels]
        return ImageRepresentation(self.stem.summary(tokens_BND[-1]), maps)

    def forward(
        self, pixels_B3HW: Tensor, full: bool = False, maps: bool = True
    ) -> dict[str, list[Tensor]] | dict[str, Tensor] | StudentOutput:
        """See `Student.forward`. The aligners, which only distillation needs, run only for feature maps."""
        representations = self.representations(pixels_B3HW)
        if self.decoder is None:
            output = StudentOutput(self._feature_maps(representations), {}, {})
            return output if full else output.feature_maps
        experts_SBEnD = [torch.stack(level, dim=1) for level in zip(*representations, strict=True)]
        predictions, gates = self.decoder(experts_SBEnD, self.stem.grid)
        feature_maps = self._feature_maps(representations) if full and maps else {}
        return StudentOutput(feature_maps, predictions, gates) if full else predictions

    def add_teacher(self, name: str, width: int) -> None:
        """Add a path for one more teacher and freeze everything else (SAK, D.4).

        The new path is then distilled from a cache of that teacher alone; the others' feature maps stay
        bitwise the same. Raises `RecipeError` for a student with tasks, and for a name that is taken.
        """
        self._require_no_tasks()
        check_names("teacher", [name])
        if name in self.paths:
            raise RecipeError(
                "The student has this teacher already.",
                got=name,
                expected=f"another name than {', '.join(self.paths)}",
                do="choose another name, or remove the teacher first",
            )
        self.requires_grad_(False)
        self.paths[name] = self._new_path(width).to(self.mean.device)
        self.config["teacher_dims"] = {**self.config["teacher_dims"], name: width}

    def remove_teacher(self, name: str) -> None:
        """Remove a teacher's path (SAK, D.4); the others' feature maps stay bitwise the same.

        Raises `RecipeError` for a student with tasks, and for an unknown or the only teacher.
        """
        self._require_no_tasks()
        require_known("teacher of this student", name, self.teachers)
        teacher_dims = {other: width for other, width in self.config["teacher_dims"].items() if other != name}
        require_teachers(teacher_dims)
        del self.paths[name]
        self.config["teacher_dims"] = teacher_dims

    def keep_levels(self, teacher: str, count: int) -> None:
        """As `Student.keep_levels`: aligners and, if no task uses them, output norms."""
        path = self.paths[teacher]
        norms = [] if self.tasks else getattr(path, "output_norms", [])
        for layers in (path.aligners, norms):
            for layer in layers[: len(layers) - count]:
                layer.requires_grad_(False)

    def _new_path(self, teacher_width: int) -> nn.Module:
        stem = self.stem
        if not self.config["adapter_paths"]:
            aligners = nn.ModuleList(nn.Linear(stem.width, teacher_width) for _ in stem.level_depths)
            return nn.ModuleDict({"aligners": aligners}).apply(initialise_linear)
        return AdapterPath(stem.width, stem.depth, stem.level_depths, teacher_width, self.config["reduction"])

    def _feature_maps(self, representations: list[list[Tensor]]) -> dict[str, list[Tensor]]:
        """For each teacher its levels (B, C, h, w), without a copy: channels stay last in memory."""
        feature_maps, compared = {}, representations[1:] or representations * len(self.paths)
        for (name, path), levels in zip(self.paths.items(), compared, strict=True):
            if path.aligners:
                levels = [aligner(level) for aligner, level in zip(path.aligners, levels, strict=True)]
            feature_maps[name] = [level.unflatten(1, self.stem.grid).permute(0, 3, 1, 2) for level in levels]
        return feature_maps

    def _require_no_tasks(self) -> None:
        if self.tasks:
            raise RecipeError(
                "The teachers of a student with tasks cannot be changed: its routers are trained for them.",
                got=f"a student with the tasks {', '.join(self.tasks)}",
                expected="a student of stage 1",
                do="change the student of stage 1, then start stage 2 from it",
            )
