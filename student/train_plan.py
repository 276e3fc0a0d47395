"""What a training run will cost, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.spec import Size
from student import KPU, build_student
from student.kpu.latent_space import Features
from student.recipe import StudentRecipe, TrainRecipe


@dataclass(frozen=True)
class TrainPlan:
    """`gmacs`: 10⁹ multiply-accumulates of the student's forward pass on one view, `train_gmacs` with what
    backward adds. `row_bytes`: what is read of the cache for one view; 0 where its features are left unread.
    `tflops_per_gpu`: what a GPU sustains.

    Hours are those of the arithmetic: optimizer, losses and small kernels come on top."""

    steps: int
    images_per_step: int
    parameters: int
    gmacs: float
    train_gmacs: float
    row_bytes: int
    processes: int
    tflops_per_gpu: float

    @property
    def images(self) -> int:
        return self.steps * self.images_per_step

    @property
    def gpu_hours(self) -> float:
        flops = 2e9 * self.train_gmacs * self.images
        return flops / (self.tflops_per_gpu * 1e12) / 3600

    @property
    def hours(self) -> float:
        return self.gpu_hours / self.processes

    @property
    def images_per_s(self) -> float:
        """Over all processes, when the GPUs never wait."""
        return self.images / (3600 * self.hours)

    @property
    def read_bytes_per_s(self) -> float:
        """What the cache must be read with for that."""
        return self.images_per_s * self.row_bytes


def make_train_plan(
    recipe: TrainRecipe,
    *,
    num_samples: int,
    image_size: Size,
    teacher_dims: Mapping[str, int],
    tasks: Mapping[str, int] | None,
    row_bytes: int,
    processes: int,
    tflops_per_gpu: float,
    teacher_grids: Mapping[str, Size] | None = None,
    class_tokens: Collection[str] = (),
) -> TrainPlan:
    """The plan of `recipe` on `num_samples` samples, whose rows take `row_bytes`; needs no weights.

    Raises `RecipeError` for a student that cannot be built.
    """
    images_per_step = recipe.images_per_step(processes)
    size = student_size(recipe.student, image_size, teacher_dims, tasks, teacher_grids, class_tokens)
    reads = recipe.distills or recipe.student.kind == "amalgam"
    return TrainPlan(
        steps=recipe.schedule.steps(num_samples / images_per_step)[0],
        images_per_step=images_per_step,
        parameters=size.parameters,
        gmacs=size.gmacs,
        train_gmacs=size.train_gmacs,
        row_bytes=row_bytes if reads and recipe.features == "cached" else 0,
        processes=processes,
        tflops_per_gpu=tflops_per_gpu,
    )


class StudentSize(NamedTuple):
    """`gmacs`: 10⁹ multiply-accumulates of a view forward; `train_gmacs`: forward and backward."""

    parameters: int
    gmacs: float
    train_gmacs: float


def student_size(
    recipe: StudentRecipe,
    image_size: Size,
    teacher_dims: Mapping[str, int],
    tasks: Mapping[str, int] | None,
    teacher_grids: Mapping[str, Size] | None = None,
    class_tokens: Collection[str] = (),
) -> StudentSize:
    """The size of a student with all that distillation and tasks need, counted without weights.

    All matrix products and convolutions are counted, those of attention too, and backward as it runs: what
    is frozen costs no more than the gradients that pass through it. `teacher_grids`: patches of 16 pixels
    where none are given.
    """
    arguments = recipe.model_dump(exclude={"init_from", "freeze", "lora_rank"}) | {"pretrained": False}
    patches = image_size[0] // 16, image_size[1] // 16
    grids = {name: (teacher_grids or {}).get(name, patches) for name in teacher_dims}
    arguments |= {"teacher_grids": grids, "class_tokens": class_tokens}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        student = build_student(**arguments, teacher_dims=teacher_dims, image_size=image_size, tasks=tasks)
        student.freeze(*recipe.freeze)
        inputs: dict[str, Any] = {}
        if isinstance(student, KPU):
            inputs["teachers"] = {
                name: Features(
                    torch.empty(1, width) if name in class_tokens else None,
                    torch.empty(1, width, *grids[name]),
                )
                for name, width in teacher_dims.items()
            }
        elif student.reads_features:
            inputs["features"] = {n: torch.empty(1, 4, *patches, width) for n, width in teacher_dims.items()}
        output = student.eval()(torch.empty(1, 3, *image_size), full=True, **inputs)
        forward = counter.get_total_flops()
        torch.stack([tensor.sum() for tensor in _learning(output)]).sum().backward()
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return StudentSize(parameters, forward / 2e9, counter.get_total_flops() / 2e9)


def _learning(output: Any) -> Iterator[Tensor]:
    """The tensors with a gradient, however nested in mappings and sequences."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif output is not None:
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _learning(part)
