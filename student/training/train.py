"""Train a student from a cache: stage 1, distillation alone, and stage 2, with tasks (SAK, 3.4).

`train(recipe)` is what every process runs, under `accelerate launch`, `torchrun` or alone. It reads the
cache, never a teacher, unless the recipe says `features: online`.

    <output>/checkpoints/   to continue from; running the same command again does
    <output>/metrics.jsonl  one line for each step
    <output>/tensorboard/   the same, as means
    <output>/student/       the finished student with its model card, for `teachercache.load_student`
"""

from __future__ import annotations

import difflib
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CheckpointError, RecipeError
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.places.durable import make_folder
from teachercache.student.build import build_student
from teachercache.student.losses.alignment import AlignmentLoss
from teachercache.student.losses.distillation import DistillationLoss
from teachercache.student.losses.tasks import MultiTaskLoss
from teachercache.student.models.student import NUM_LEVELS, Student, teacher_facts
from teachercache.student.sak.model import SAK
from teachercache.student.sak.transfer import grown_student, load_stage_1
from teachercache.student.saving import saving
from teachercache.student.timing import bottleneck
from teachercache.student.training.checkpoint import (
    DAMAGED_SUFFIX,
    load_newest,
    misnamed,
    newest_checkpoint,
    set_aside,
)
from teachercache.student.training.environment import accelerator_for, overruled
from teachercache.student.training.loop import TrainingLoop
from teachercache.student.training.model_card import write_model_card
from teachercache.student.training.not_finite import not_finite
from teachercache.student.training.notices import notices
from teachercache.student.training.objectives import KPUObjective, Objective
from teachercache.student.training.run_lock import only_trainer
from teachercache.student.training.run_log import METRICS_FILE, RunLog, logged_steps
from teachercache.student.training.run_pictures import RunPictures
from teachercache.student.training.schedule import SCHEDULES
from teachercache.student.training.targets import (
    TARGET_SOURCES,
    TargetSource,
    complete_teachers,
    require_experts,
    require_maps,
)
from teachercache.student.training.train_recipe import OF_KPU, TrainRecipe, run_identity
from teachercache.student.training.trained_parts import require_kept, set_learning
from teachercache.student.training.view_labels import ViewLabels

_COMPILED: dict[str, Any] = {"dynamic": False, "options": {"combo_kernels": True}}  # small ones, side by side


@dataclass(frozen=True)
class TrainResult:
    """`student` is None when the run was interrupted by SIGTERM; the same command then continues it.

    `steps` counts those of the whole run, earlier processes' included; `last_loss` is None where there
    was no step left to take. `images_per_s` is over all processes.
    """

    output: Path
    student: Path | None
    steps: int
    last_loss: float | None
    images_per_s: float
    bottleneck: str

    @property
    def interrupted(self) -> bool:
        return self.student is None


def train(recipe: TrainRecipe) -> TrainResult:
    """Train, or continue, the run that `recipe` states; returns when it is finished or SIGTERM came.

    Raises `CacheError` where the cache is missing, incomplete or without one of the teachers,
    `RecipeError` for what cannot work with this cache or under this launcher, `CheckpointError` when the
    output folder holds another run, one that lives, or no sound checkpoint of this one.
    """
    with ExitStack() as stack:
        return _train(recipe, stack)


def _train(recipe: TrainRecipe, stack: ExitStack) -> TrainResult:
    """`stack` holds the output folder until the run has ended."""
    output = Path(recipe.output)
    accelerator = accelerator_for(recipe)
    cache = FeatureCache.open(recipe.cache, images=recipe.images)
    teachers = cache.check_teachers(recipe.teachers)
    tasks = ViewLabels(recipe.multitask, cache) if recipe.multitask else None
    held = _held(recipe, cache, teachers)
    sampler = ShardShuffleSampler(
        cache,
        held or None,
        batch_size_per_process=recipe.batch_size_per_process,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=recipe.seed,
        fraction=recipe.fraction,
    )
    images_per_step = recipe.images_per_step(accelerator.num_processes)
    _require_fit(recipe, cache, teachers, images_per_step, sampler.num_samples)
    _require_folder(output)
    require_held = stack.enter_context(only_trainer(accelerator, output))
    for notice in overruled(recipe) + notices(recipe, cache.spec, held if recipe.reads_cache else []):
        accelerator.print(notice)
    total_steps, warmup_steps = recipe.schedule.steps(sampler.num_samples / images_per_step)

    torch.manual_seed(recipe.seed)
    student = _build(recipe, cache, teachers, tasks)
    _require_grids(recipe, cache, held, student)
    if accelerator.device.type == "cuda" and accelerator.num_processes > 1:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    targets = TARGET_SOURCES[recipe.features](cache, teachers, accelerator.device)
    reads = targets.reads if recipe.distills or student.reads_features else []
    optimizer = AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad],
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    run = run_identity(
        recipe,
        {
            "images_per_step": images_per_step,
            "samples": sampler.num_samples,
            "teachers": {name: cache.spec.content_id(name) for name in teachers},
        },
    )
    with warnings.catch_warnings():  # accelerate 1.15 passes what torch 2.15 calls deprecated
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, optimizer = accelerator.prepare(student, optimizer)
    first_step = _resume(recipe, accelerator, student, optimizer, run)
    loop = TrainingLoop(
        accelerator,
        recipe,
        model,
        optimizer,
        _objective(recipe, model, student, targets, tasks),
        partial(
            SCHEDULES[recipe.schedule.kind],
            peak=recipe.optimizer.lr,
            final=recipe.schedule.final_lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        ),
        run,
        partial(not_finite, cache, reads, tasks),
    )
    log = RunLog(
        accelerator,
        output,
        first_step=first_step,
        total_steps=total_steps,
        every_steps=recipe.log_every_steps,
        pictures=RunPictures(cache, held if recipe.distills else [], student).draw,
        picture_every_steps=recipe.picture_every_steps,
        before_writing=require_held,
    )
    loader = FeatureLoader(
        cache,
        sampler,
        reads,
        labels=tasks,
        extra_sizes=targets.extra_sizes,
        fresh=recipe.features == "fresh",
        jitter=recipe.student_jitter,
        seed=recipe.seed,
        start_step=first_step * recipe.gradient_accumulation_steps,
        threads=recipe.loader.threads,
        prefetch=recipe.loader.prefetch,
        pin_memory=accelerator.device.type == "cuda",
    )
    with log, loader:
        done = loop.run(iter(loader), first_step, total_steps, log)
    verdict = bottleneck(done.seconds, done.steps)
    accelerator.print(verdict)
    if not done.interrupted and accelerator.is_main_process:
        with saving("The finished student", output / "student"):
            student.save_pretrained(output / "student")
            write_model_card(output / "student", student, recipe, cache, done.next_step, done.last_loss)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return TrainResult(
        output=output,
        student=None if done.interrupted else output / "student",
        steps=done.next_step,
        last_loss=done.last_loss,
        images_per_s=done.steps * images_per_step / done.wall_s if done.steps else 0.0,
        bottleneck=verdict,
    )


def _require_folder(output: Path) -> None:
    try:
        make_folder(output)
    except OSError as error:
        raise RecipeError(
            "The output folder cannot be made.",
            got=f"{error.filename}: {error.strerror}",
            expected="a folder, or a place where this user can make one",
            do="choose another output",
        ) from error


def _build(
    recipe: TrainRecipe, cache: FeatureCache, teachers: list[str], tasks: ViewLabels | None
) -> Student:
    """The student, with `requires_grad` exactly where it learns."""
    wanted, image_size = recipe.student, cache.spec.views.size
    facts = teacher_facts({name: cache.spec.teachers[name] for name in teachers}, cache.spec.views)
    if wanted.init_from and tasks is None:
        student: Student = grown_student(wanted.init_from, facts["teacher_dims"], image_size)
        require_kept(wanted, student)
    else:
        arguments = wanted.model_dump(exclude={"init_from", "freeze", "lora_rank", "compile"})
        arguments |= {"pretrained": wanted.pretrained and wanted.init_from is None}
        student = build_student(
            **arguments, **facts, image_size=image_size, tasks=tasks.channels if tasks else None
        )
        if wanted.init_from:
            assert isinstance(student, SAK)
            load_stage_1(student, wanted.init_from)
    set_learning(
        student,
        wanted,
        {name: cache.spec.teachers[name].num_levels if recipe.distills else 0 for name in teachers},
    )
    return student


def _objective(
    recipe: TrainRecipe,
    model: nn.Module,
    student: Student,
    targets: TargetSource,
    tasks: ViewLabels | None,
) -> Objective | KPUObjective:
    settings = recipe.distillation.model_dump(exclude={"weight"} | OF_KPU, exclude_none=True)
    distillation = DistillationLoss(**settings) if recipe.distills else None
    compiles = recipe.student.compile
    if student.mean.device.type == "cuda" if compiles is None else compiles:
        model = cast(nn.Module, torch.compile(model, **_COMPILED))
        if distillation:
            distillation.compile(**_COMPILED)
    if recipe.student.kind == "kpu":
        loss = AlignmentLoss(**settings, **recipe.distillation.model_dump(include=OF_KPU))
        return KPUObjective(model, student, targets, loss, recipe.distillation.weight)
    return Objective(
        model,
        student,
        targets,
        distillation,
        recipe.distillation.weight,
        MultiTaskLoss(tasks.channels, recipe.multitask.weights) if tasks and recipe.multitask else None,
    )


def _held(recipe: TrainRecipe, cache: FeatureCache, teachers: list[str]) -> list[str]:
    """The teachers whose features the cache must hold."""
    if recipe.features != "hybrid":
        return teachers
    held = complete_teachers(cache, teachers)
    if teachers and not held:
        raise RecipeError(
            "A hybrid run reads at least one teacher.",
            got=f"no complete one of {', '.join(teachers)} in {cache.storage.url}",
            expected="a teacher with every shard committed",
            do="finish the build of one of them",
        )
    return held


def _require_fit(
    recipe: TrainRecipe, cache: FeatureCache, teachers: list[str], images_per_step: int, num_samples: int
) -> None:
    """Raises `RecipeError` for what the recipe asks and this cache cannot give."""
    if images_per_step > num_samples:
        raise RecipeError(
            "A step takes more images than the cache holds.",
            got=f"{images_per_step} images a step, over processes and accumulation",
            expected=f"at most {num_samples}, the valid samples of the cache",
            do="lower batch_size_per_process or gradient_accumulation_steps",
        )
    if recipe.student.kind == "amalgam":
        require_experts(cache, teachers)
    if recipe.student.kind == "kpu":
        require_maps(cache, teachers)
    for name in teachers if recipe.student.kind != "kpu" else ():  # a KPU learns from the last level alone
        if (levels := cache.spec.teachers[name].num_levels) > NUM_LEVELS:
            raise RecipeError(
                f"Teacher {name} cannot be distilled with its levels.",
                got=f"{levels} levels in the cache",
                expected=f"at most {NUM_LEVELS}, as the student has; fewer go to its last ones",
                do=f"build the cache with {NUM_LEVELS} block_indices for it, or leave it out of `teachers`",
            )
    for name in recipe.distillation.teacher_weights:
        if name not in teachers:
            near = difflib.get_close_matches(name, teachers, 1)
            raise RecipeError(
                "A weight is given for a teacher that is not distilled.",
                got=f"distillation.teacher_weights.{name}",
                expected=f"one of {', '.join(teachers)}",
                do=f"did you mean {near[0]}?" if near else "remove it",
            )


def _require_grids(recipe: TrainRecipe, cache: FeatureCache, held: list[str], student: Student) -> None:
    """Raises `RecipeError` for windows that move by other steps than the student's tokens, and for an adjoint
    grid that is not the student's."""
    views, stem = cache.spec.views, getattr(student, "stem", None)
    own = views.size[0] // views.patch, views.size[1] // views.patch
    if views.margin and stem is not None and stem.grid != own:
        raise RecipeError(
            "The windows of this cache's views move by other steps than the student's tokens.",
            got=f"{stem.grid} tokens of the stem {recipe.student.stem}",
            expected=f"{own}, of {views.patch} pixels each (views.patch of the cache)",
            do="choose a stem with patches of this size, or a cache whose views.patch is the stem's",
        )
    if not isinstance(student, SAK) or not recipe.distills or not recipe.reads_cache:
        return
    for name in held:
        spec = cache.spec.teachers[name]
        if spec.grid.kind == "adjoint" and views.seen_grid(spec.stored_grid) != student.stem.grid:
            raise RecipeError(
                f"The adjoint grid of teacher {name} holds for one student grid alone.",
                got=f"{student.stem.grid} tokens of the stem {recipe.student.stem}",
                expected=f"{spec.stored_grid}, as in the cache",
                do="choose a stem with patches of another size, or a cache with grid: native",
            )


def _resume(
    recipe: TrainRecipe,
    accelerator: Accelerator,
    student: Student,
    optimizer: Any,
    run: dict[str, Any],
) -> int:
    """Load the newest checkpoint of the output folder, if there is one; returns the first step to take."""
    if recipe.checkpoint_folder.exists() and not recipe.checkpoint_folder.is_dir():
        raise CheckpointError(
            "There can be no checkpoints in this output folder.",
            got=f"{recipe.checkpoint_folder}, which is no folder",
            expected="a folder, or nothing",
            do="move it away, or choose another output",
        )
    newest = newest_checkpoint(recipe.checkpoint_folder)
    if newest is not None and not recipe.resume:
        raise CheckpointError(
            "The output folder holds a run already, and resume is false.",
            got=newest,
            expected="a folder without checkpoints",
            do="choose another output, delete that run, or set resume=true to continue it",
        )
    if newest is None and (finished := Path(recipe.output) / "student").exists():
        raise CheckpointError(
            "The output folder holds a finished student, and no checkpoint to continue from.",
            got=finished,
            expected="the checkpoints of its run, or a folder without a student",
            do="choose another output, or move that student away to train again",
        )
    first_step, damaged = load_newest(recipe.checkpoint_folder, student, optimizer, run)
    if not first_step and (taken := logged_steps(Path(recipe.output))) > recipe.checkpoint_every_steps:
        raise CheckpointError(
            "The run has logged steps beyond its first checkpoint, and there is none to continue from.",
            got=f"{taken} steps in {recipe.output}/{METRICS_FILE}, nothing in {recipe.checkpoint_folder}",
            expected="the checkpoints of the run, or a folder without a run",
            do="put them back, or choose another output to begin again",
        )
    steps = accelerator.gather(torch.tensor([first_step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(
            "The processes of this run do not see the same checkpoints.",
            got=f"newest steps {steps}, by process",
            expected="one output folder that all machines share",
            do="put `output` on a shared file system",
        )
    if accelerator.is_main_process:
        for path, error in damaged.items():
            aside = set_aside(path).name
            print(f"{error}\n{path.name} is set aside as {aside}: going on from {first_step} steps.")
        if others := [name for name in misnamed(recipe.checkpoint_folder) if DAMAGED_SUFFIX not in name]:
            print(f"Left out of {recipe.checkpoint_folder}: {', '.join(others)}, no names of checkpoints.")
    return first_step
