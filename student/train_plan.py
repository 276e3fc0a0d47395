"""What a training run will cost, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.spec import Size
from student import build_student
from student.recipe import StudentRecipe, TrainRecipe

_PASSES = 3  # backward computes twice what forward does: gradients of inputs and of weights


@dataclass(frozen=True)
class TrainPlan:
    """`gmacs`: 10⁹ multiply-accumulates of the student's forward pass on one view. `row_bytes`: what is read
    of the cache for one view; 0 where its features are left unread. `tflops_per_gpu`: what a GPU sustains.

    Hours are those of the arithmetic: optimizer, losses and small kernels come on top."""

    steps: int
    images_per_step: int
    parameters: int
    gmacs: float
    row_bytes: int
    processes: int
    tflops_per_gpu: float

    @property
    def images(self) -> int:
        return self.steps * self.images_per_step

    @property
    def gpu_hours(self) -> float:
        flops = 2e9 * self.gmacs * _PASSES * self.images
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
) -> TrainPlan:
    """The plan of `recipe` on `num_samples` samples, whose rows take `row_bytes`; needs no weights.

    Raises `RecipeError` for a student that cannot be built.
    """
    images_per_step = recipe.images_per_step(processes)
    parameters, gmacs = student_size(recipe.student, image_size, teacher_dims, tasks)
    reads = recipe.distills or recipe.student.kind == "amalgam"
    return TrainPlan(
        steps=recipe.schedule.steps(num_samples / images_per_step)[0],
        images_per_step=images_per_step,
        parameters=parameters,
        gmacs=gmacs,
        row_bytes=row_bytes if reads and recipe.features == "cached" else 0,
        processes=processes,
        tflops_per_gpu=tflops_per_gpu,
    )


def student_size(
    recipe: StudentRecipe, image_size: Size, teacher_dims: Mapping[str, int], tasks: Mapping[str, int] | None
) -> tuple[int, float]:
    """(parameters, 10⁹ multiply-accumulates of a view), with all that distillation and tasks need.

    All matrix products are counted, those of attention too.
    """
    arguments = recipe.model_dump(exclude={"init_from", "freeze", "lora_rank"}) | {"pretrained": False}
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        student = build_student(**arguments, teacher_dims=teacher_dims, image_size=image_size, tasks=tasks)
        inputs = {}
        if student.reads_features:
            grid = image_size[0] // 16, image_size[1] // 16
            inputs["features"] = {n: torch.empty(1, 4, *grid, width) for n, width in teacher_dims.items()}
        student.eval()(torch.empty(1, 3, *image_size), full=True, **inputs)
    return sum(parameter.numel() for parameter in student.parameters()), counter.get_total_flops() / 2e9
