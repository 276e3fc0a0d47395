"""SAK's student (SAK, 3.2 and 3.3): the stem, an adapter path for each teacher, and the task decoder.

B  images                h, w  grid of the stem, n = h·w patch tokens
D  width of the stem     C     width of a teacher
Z_l, R_l (B, N, D)       tokens of the stem and of a path after block l, prefix tokens included
S  levels                blocks L/4, L/2, 3L/4, L
E  experts               the stem, then the paths
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.records.strict import Size
from teachercache.student.models.stem import Stem
from teachercache.student.models.student import (
    NUM_LEVELS,
    ImageRepresentation,
    Student,
    StudentOutput,
    check_names,
    require_teachers,
)
from teachercache.student.models.task_decoder import TaskDecoder
from teachercache.student.sak.adapter_path import AdapterPath, AlignerPath, align


@dataclass
class Representations:
    """The patch tokens (B, n, D) of each level: the stem's unchanged, each path's after its norm."""

    stem: list[Tensor]
    paths: dict[str, list[Tensor]]


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
    paths: Any  # a ModuleDict of AdapterPath or AlignerPath, which its type cannot express
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
        module = Stem(stem, image_size, pretrained, sak_compat)
        config = {
            "stem": stem,
            "teacher_dims": dict(teacher_dims),
            "image_size": list(image_size),
            "reduction": reduction,
            "tasks": tasks,
            "fusion": fusion,
            "decoder": decoder,
            "adapter_paths": adapter_paths,
            "sak_compat": sak_compat,
        }
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

    def representations(self, pixels_B3HW: Tensor) -> Representations:
        tokens_BND = self.stem(pixels_B3HW)
        prefix = self.stem.num_prefix_tokens
        return Representations(
            stem=[tokens_BND[block][:, prefix:] for block in self.stem.level_depths],
            paths={name: self.paths[name](tokens_BND, prefix) for name in self.experts[1:]},
        )

    def features(self, pixels_B3HW: Tensor) -> ImageRepresentation:
        """The last class token of the stem, or the mean of its patch tokens, and the experts side by side at
        each level."""
        stem, paths = self.stem, self.paths
        tokens_BND = stem(pixels_B3HW)
        prefix = stem.num_prefix_tokens
        experts = [[tokens_BND[block][:, prefix:] for block in stem.level_depths]]
        experts += [paths[name](tokens_BND, prefix) for name in self.experts[1:]]
        maps = [
            torch.cat(level, 2).transpose(1, 2).unflatten(2, stem.grid)
            for level in zip(*experts, strict=True)
        ]
        last_BND = tokens_BND[-1]
        return ImageRepresentation(last_BND[:, 0] if stem.has_class_token else last_BND.mean(1), maps)

    def forward(
        self, pixels_B3HW: Tensor, full: bool = False, maps: bool = True
    ) -> dict[str, list[Tensor]] | dict[str, Tensor] | StudentOutput:
        """See `Student.forward`. The aligners, which only distillation needs, run only for feature maps."""
        representations = self.representations(pixels_B3HW)
        if self.decoder is None:
            feature_maps = self._feature_maps(representations)
            return StudentOutput(feature_maps, {}, {}) if full else feature_maps
        experts_SBEnD = [
            torch.stack(levels, dim=1)
            for levels in zip(representations.stem, *representations.paths.values(), strict=True)
        ]
        predictions: dict[str, Tensor]
        predictions, gates = self.decoder(experts_SBEnD, self.stem.grid)
        if full:
            return StudentOutput(self._feature_maps(representations) if maps else {}, predictions, gates)
        return predictions

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

    def _new_path(self, teacher_width: int) -> AdapterPath | AlignerPath:
        stem = self.stem
        if not self.config["adapter_paths"]:
            return AlignerPath(stem.width, NUM_LEVELS, teacher_width)
        return AdapterPath(stem.width, stem.depth, stem.level_depths, teacher_width, self.config["reduction"])

    def _feature_maps(self, representations: Representations) -> dict[str, list[Tensor]]:
        """For each teacher its levels (B, C, h, w), without a copy: channels stay last in memory."""
        return {
            name: [
                tokens_BnC.unflatten(1, self.stem.grid).permute(0, 3, 1, 2)
                for tokens_BnC in align(path, representations.paths.get(name, representations.stem))
            ]
            for name, path in self.paths.items()
        }

    def _require_no_tasks(self) -> None:
        if self.tasks:
            raise RecipeError(
                "The teachers of a student with tasks cannot be changed: its routers are trained for them.",
                got=f"a student with the tasks {', '.join(self.tasks)}",
                expected="a student of stage 1",
                do="change the student of stage 1, then start stage 2 from it",
            )
