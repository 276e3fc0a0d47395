"""Train a student from a cache: stage 1, distillation alone, and stage 2, with tasks (SAK, 3.4).

`train(recipe)` is what every process runs, under `accelerate launch`, `torchrun` or alone. It reads the
cache, never a teacher, unless the recipe says `features: online`.

    <output>/checkpoints/   to continue from; running the same command again does
    <output>/metrics.jsonl  one line for each step
    <output>/tensorboard/   the same, as means, which other `trackers` get too
    <output>/student/       the finished student with its model card, for `teachercache.load_student`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CheckpointError, RecipeError, extra

with extra("train"):
    import matplotlib  # noqa: F401 (a run draws and logs much later)
    import tensorboard  # noqa: F401
    from accelerate import Accelerator

from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.places.durable import make_folder
from teachercache.student.losses.weighting import Equal, Famo, TeacherDrop, Weighting
from teachercache.student.models.student import Student
from teachercache.student.saving import saving
from teachercache.student.similarity import Similarity
from teachercache.student.timing import bottleneck
from teachercache.student.training.balance import normalisations
from teachercache.student.training.checkpoint import (
    DAMAGED_SUFFIX,
    load_newest,
    misnamed,
    newest_checkpoint,
    set_aside,
)
from teachercache.student.training.cutmix import CutMix
from teachercache.student.training.decoder_recipe import AnyRecipe
from teachercache.student.training.environment import accelerator_for, overruled
from teachercache.student.training.first_student import first_student
from teachercache.student.training.loop import LoopResult, TrainingLoop
from teachercache.student.training.model_card import write_model_card
from teachercache.student.training.not_finite import not_finite
from teachercache.student.training.objectives import KPUObjective, Objective
from teachercache.student.training.preflight import Preflight, joined, preflight
from teachercache.student.training.run_lock import only_trainer
from teachercache.student.training.run_log import METRICS_FILE, RunLog, logged_steps
from teachercache.student.training.run_pictures import RunPictures
from teachercache.student.training.schedule import SCHEDULES
from teachercache.student.training.targets import TARGET_SOURCES, TargetSource
from teachercache.student.training.trackers import start_trackers
from teachercache.student.training.train_recipe import TrainRecipe, run_identity

_COMPILED: dict[str, Any] = {"dynamic": False, "options": {"combo_kernels": True}}  # small ones, side by side


@dataclass(frozen=True)
class TrainResult:
    """`student` is None when SIGTERM or Ctrl-C ended the run; the same command then continues it.

    `steps` counts those of the whole run, earlier processes' included; `last_loss` is None where there
    was no step left to take. `images_per_s` is over all processes. `similarity`: to each teacher, after the
    last of these steps, of a run with `validation`.
    """

    output: Path
    student: Path | None
    steps: int
    last_loss: float | None
    images_per_s: float
    bottleneck: str
    similarity: Mapping[str, Similarity]

    @property
    def interrupted(self) -> bool:
        return self.student is None

    def __str__(self) -> str:
        told = f"{self.bottleneck}\n{self.steps:,} steps, {self.images_per_s:.1f} img/s"
        if self.student is None:
            return f"{told}; interrupted: the same command goes on from there"
        use = f"from teachercache import load_student; student = load_student({str(self.student)!r})"
        return f"{told}; student: {self.student}\n{use}"


def train(recipe: TrainRecipe) -> TrainResult:
    """Train, or continue, the run that `recipe` states; returns when it is finished or SIGTERM came.

    Raises `CacheError` where the cache is missing, incomplete or without one of the teachers,
    `RecipeError` for what cannot work with this cache or under this launcher, or for several such things,
    `CheckpointError` when the output folder holds another run, one that lives, or no sound checkpoint of this
    one.
    """
    accelerator = accelerator_for(recipe)
    recipe = recipe.on(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = recipe.gradient_accumulation_steps
    caches = [FeatureCache.open(one.cache, images=one.images) for one in recipe.each]
    processes, rank = accelerator.num_processes, accelerator.process_index
    parts = [
        preflight(one, cache.spec, cache, processes=processes, rank=rank)
        for one, cache in zip(recipe.each, caches, strict=True)
    ]
    found = joined(recipe, parts)
    found.notices[:0] = overruled(recipe)
    found.require(accelerator.print)
    require_folder(Path(recipe.output))
    with only_trainer(accelerator, Path(recipe.output)) as require_held:
        return _Run(recipe, caches, parts, found, accelerator).go(require_held)


@dataclass
class _Run:
    """A run of which nothing stands in the way, on one process of `accelerator`: `caches` and `parts` are of
    its inputs, `found` of all of them."""

    recipe: TrainRecipe
    caches: list[FeatureCache]
    parts: list[Preflight]
    found: Preflight
    accelerator: Accelerator

    def go(self, require_held: Callable[[], None]) -> TrainResult:
        """`require_held` raises where another run has taken the output folder."""
        recipe, accelerator, found = self.recipe, self.accelerator, self.found
        student = self._student()
        inputs = list(zip(self.caches, self.parts, strict=True))
        targets = [
            TARGET_SOURCES[recipe.features](cache, list(part.teachers), accelerator.device)
            for cache, part in inputs
        ]
        reads = [one.reads if recipe.distills or student.reads_features else [] for one in targets]
        model, optimizer = self._prepared(student)
        run = self._identity()
        weighting = self._weighting()
        famo = weighting if isinstance(weighting, Famo) else None
        first_step = resume(recipe, accelerator, student, optimizer, run, famo)
        total_steps, learning_rate = self._schedule()
        loop = TrainingLoop(
            accelerator,
            recipe,
            model,
            optimizer,
            self._objective(model, student, targets, weighting),
            learning_rate,
            run,
            [
                partial(not_finite, cache, names, found.labels)
                for cache, names in zip(self.caches, reads, strict=True)
            ],
            famo,
        )
        first = self.caches[0]
        config = {**run, "cache_id": first.spec.cache_id}
        log = RunLog(
            recipe,
            accelerator.is_main_process,
            first_step,
            total_steps,
            self._steps_per_epoch,
            partial(start_trackers, recipe.trackers, Path(recipe.output), config, first),
            RunPictures(first, self.parts[0].held if recipe.distills else [], student).draw,
            found.validation and partial(found.validation, student, gather=accelerator.gather),
            before_writing=require_held,
        )
        with log, ExitStack() as stack:
            loaders = [
                stack.enter_context(self._loader(i, targets[i], reads[i], first_step))
                for i in range(len(inputs))
            ]
            done = loop.run(zip(*loaders, strict=True), first_step, total_steps, log)
        return self._finish(student, done, log.similarity)

    def _student(self) -> Student:
        """With its weights, drawn from the run's seed where they are not loaded."""
        found, distills = self.found, self.recipe.distills
        torch.manual_seed(self.recipe.seed)
        size = found.views.size
        student = first_student(self.recipe.student, found.facts, size, found.tasks, distills=distills)
        if self.accelerator.device.type == "cuda" and self.accelerator.num_processes > 1:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
        return student

    def _prepared(self, student: Student) -> tuple[nn.Module, Any]:
        """(the student as accelerate wraps it, its optimizer)."""
        settings = self.recipe.optimizer.model_dump()
        learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
        with warnings.catch_warnings():  # accelerate 1.15 passes what torch 2.15 calls deprecated
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model, optimizer = self.accelerator.prepare(student, AdamW(learning, **settings, fused=True))
        return model, optimizer

    def _identity(self) -> dict[str, Any]:
        inputs = list(zip(self.recipe.each, self.caches, self.parts, strict=True))
        processes = self.accelerator.num_processes
        facts: dict[str, Any] = {
            "images_per_step": self.recipe.images_per_step(processes),
            "samples": self.found.num_samples,
            "teachers": {
                name: cache.spec.content_id(name) for _, cache, part in inputs for name in part.teachers
            },
        }
        if self.recipe.streams:
            facts["processes"] = processes
        if len(inputs) > 1:
            sizes = [[one.images_per_step(processes), part.num_samples] for one, _, part in inputs]
            facts["inputs"] = sizes
        return run_identity(self.recipe, facts)

    @property
    def _steps_per_epoch(self) -> float:
        assert self.found.num_samples is not None
        first = self.recipe.each[0]  # whose epochs are counted
        return self.found.num_samples / first.images_per_step(self.accelerator.num_processes)

    def _schedule(self) -> tuple[int, Callable[[int], float]]:
        """(number of steps, the learning rate of each)."""
        schedule, peak = self.recipe.schedule, self.recipe.optimizer.lr
        total, warmup = schedule.steps(self._steps_per_epoch)
        steps = {"warmup_steps": warmup, "total_steps": total}
        return total, partial(SCHEDULES[schedule.kind], peak=peak, final=schedule.final_lr, **steps)

    def _objective(
        self, model: nn.Module, student: Student, targets: Sequence[TargetSource], weighting: Weighting
    ) -> Objective | KPUObjective:
        kind: Any = type(self.recipe.student)
        wanted, tasks = self.recipe.distillation, self.found.task_loss
        settings = wanted.model_dump(include=set(signature(kind.loss).parameters), exclude_none=True)
        loss = kind.loss(**settings) if self.recipe.distills else None
        compiles = self.recipe.student.compile
        if student.mean.device.type == "cuda" if compiles is None else compiles:
            model = cast(nn.Module, torch.compile(model, **_COMPILED))
            for source in targets:
                source.compile(**_COMPILED)
            if isinstance(loss, nn.Module):
                loss.compile(**_COMPILED)
        device, num_levels = self.accelerator.device, student.num_levels
        balance = {
            name: one
            for cache, part in zip(self.caches, self.parts, strict=True)
            for name, one in normalisations(wanted.targets, cache, part.teachers, num_levels, device).items()
        }
        objective = kind.objective(model, student, targets, loss, wanted.weight, tasks, weighting, balance)
        if self.recipe.cutmix:
            objective.cutmix = CutMix(self.found.views, self.recipe.seed)
        return cast(Objective | KPUObjective, objective)

    def _weighting(self) -> Weighting:
        wanted, mean = self.recipe.distillation, partial(self.accelerator.reduce, reduction="mean")
        if wanted.weighting == "famo":
            return Famo(list(self.found.teachers), wanted.famo_lr, wanted.famo_decay, mean)
        if wanted.weighting == "teacher_drop":
            return TeacherDrop(wanted.drop_probability, self.recipe.seed, mean)
        return Equal()

    def _loader(
        self, number: int, targets: TargetSource, reads: Sequence[str], first_step: int
    ) -> FeatureLoader:
        """Of an input."""
        part = self.parts[number]
        assert part.sampler is not None
        return FeatureLoader(
            self.caches[number],
            part.sampler,
            reads,
            labels=part.labels,
            extra_sizes=targets.extra_sizes,
            start_step=first_step * self.recipe.gradient_accumulation_steps,
            fresh=self.recipe.features == "fresh",
            jitter=self.recipe.student_jitter,
            seed=self.recipe.seed,
            **self.recipe.loader.model_dump(include={"threads", "prefetch"}),
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _finish(
        self, student: Student, done: LoopResult, similarity: Mapping[str, Similarity]
    ) -> TrainResult:
        """Say what held the run up, and write the student where it has taken all its steps, and say where."""
        output = Path(self.recipe.output)
        images = done.steps * self.recipe.images_per_step(self.accelerator.num_processes)
        result = TrainResult(
            output=output,
            student=None if done.interrupted else output / "student",
            steps=done.next_step,
            last_loss=done.last_loss,
            images_per_s=images / done.wall_s if done.steps else 0.0,
            bottleneck=bottleneck(done.seconds, done.steps),
            similarity=similarity,
        )
        if result.student is not None and self.accelerator.is_main_process:
            with saving("The finished student", result.student):
                student.save_pretrained(result.student)
                write_model_card(result.student, student, self.recipe, self.caches, result)
        self.accelerator.wait_for_everyone()
        self.accelerator.print(result)
        self.accelerator.end_training()
        return result


def require_folder(output: Path) -> None:
    try:
        make_folder(output)
    except OSError as error:
        raise RecipeError(
            "The output folder cannot be made.",
            got=f"{error.filename}: {error.strerror}",
            expected="a folder, or a place where this user can make one",
            do="choose another output",
        ) from error


def resume(
    recipe: AnyRecipe,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: Any,
    run: dict[str, Any],
    famo: Famo | None,
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
    first_step, damaged = load_newest(recipe.checkpoint_folder, student, optimizer, run, famo)
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
