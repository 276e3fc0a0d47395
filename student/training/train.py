"""Train a student from a cache: stage 1, distillation alone, and stage 2, with tasks (SAK, 3.4).

`train(recipe)` is what every process runs, under `accelerate launch`, `torchrun` or alone. It reads the
cache, never a teacher, unless the recipe says `features: online`.

    <output>/checkpoints/   to continue from; running the same command again does
    <output>/metrics.jsonl  one line for each step
    <output>/tensorboard/   the same, as means, which other `trackers` get too
    <output>/student/       the finished student with its model card, for `teachercache.load_student`
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import nn

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs.kernels import compiles
from teachercache.pipeline.codecs.normalisation import Normalisation
from teachercache.pipeline.errors import extra

with extra("train"):
    import matplotlib  # noqa: F401 (a run draws and logs much later)
    import tensorboard  # noqa: F401
    from accelerate import Accelerator

from teachercache.pipeline.loading.loader import FeatureLoader, LabelSource
from teachercache.pipeline.stores.feature_store import CLS_TOKEN
from teachercache.student.hub import teacher_licences
from teachercache.student.losses.weighting import Famo, TeacherDrop, Weighting
from teachercache.student.models.student import Student
from teachercache.student.training.cutmix import CutMix
from teachercache.student.training.environment import accelerator_for, overruled
from teachercache.student.training.loop import Objective
from teachercache.student.training.model_card import write_model_card
from teachercache.student.training.preflight import Preflight, joined, preflight
from teachercache.student.training.run import Run, RunResult, require_folder
from teachercache.student.training.run_lock import only_trainer
from teachercache.student.training.run_pictures import RunPictures
from teachercache.student.training.student_recipe import first_student
from teachercache.student.training.targets import COMPILED, TARGET_SOURCES, TargetSource, normalisations
from teachercache.student.training.train_recipe import TrainRecipe, run_identity


def train(recipe: TrainRecipe) -> RunResult:
    """Train, or continue, the run that `recipe` states; returns when it is finished or SIGTERM came.

    Raises `CacheError` where the cache is missing, incomplete or without one of the teachers,
    `RecipeError` for what cannot work with this cache or under this launcher, or for several such things,
    `CheckpointError` when the output folder holds another run, one that lives, or no sound checkpoint of this
    one.
    """
    accelerator = accelerator_for(recipe)
    recipe = recipe.on(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = recipe.gradient_accumulation_steps
    processes, rank = accelerator.num_processes, accelerator.process_index
    inputs = list[tuple[FeatureCache, Preflight]]()
    for one in recipe.each:
        cache = FeatureCache.open(one.cache, images=one.images)
        inputs.append((cache, preflight(one, cache.spec, cache, processes=processes, rank=rank)))
    checked = joined(recipe, [part for _, part in inputs])
    checked.notices[:0] = overruled(recipe)
    checked.require(accelerator.print)
    require_folder(Path(recipe.output))
    with only_trainer(accelerator, Path(recipe.output)) as require_held:
        return _Run(recipe, inputs, checked, accelerator).go(require_held)


@dataclass
class _Run:
    """A run of which nothing stands in the way, on one process; `checked` is of all `inputs`."""

    recipe: TrainRecipe
    inputs: list[tuple[FeatureCache, Preflight]]
    checked: Preflight
    accelerator: Accelerator

    def go(self, require_held: Callable[[], None]) -> RunResult:
        """`require_held` raises where another run has taken the output folder."""
        recipe, accelerator, checked = self.recipe, self.accelerator, self.checked
        torch.manual_seed(recipe.seed)  # of weights that are not loaded
        size, distills = checked.views.size, recipe.distills
        student = first_student(recipe.student, checked.facts, size, checked.tasks, distills=distills)
        inherited = teacher_licences(begun) if (begun := recipe.student.init_from) else {}
        source, learns = TARGET_SOURCES[recipe.features], recipe.distills or student.reads_features
        targets = [
            source(cache, list(part.teachers) if learns else [], accelerator.device)
            for cache, part in self.inputs
        ]
        weighting = self._weighting()
        famo = weighting if isinstance(weighting, Famo) else None
        assert checked.num_samples is not None
        steps_per_epoch = checked.num_samples / recipe.each[0].images_per_step(accelerator.num_processes)
        run = Run(recipe, accelerator, student, self._identity(), steps_per_epoch, require_held, famo)

        def loaders(stack: ExitStack) -> list[FeatureLoader]:
            made = zip(self.inputs, targets, strict=True)
            return [stack.enter_context(self._loader(*one, run.first_batch)) for one in made]

        def save(result: RunResult) -> None:
            student.save_pretrained(recipe.saved)
            write_model_card(recipe.saved, student, recipe, caches, result, inherited)

        first, first_part = self.inputs[0]
        caches = [cache for cache, _ in self.inputs]
        read = zip(caches, targets, strict=True)
        return run.go(
            self._objective(run.model, student, targets, weighting),
            loaders,
            f"from teachercache import load_student; student = load_student({str(recipe.saved)!r})",
            save,
            [partial(not_finite, cache, one.reads, checked.labels) for cache, one in read],
            RunPictures(first, first_part.held if recipe.distills else [], student).draw,
            checked.validation and partial(checked.validation, student, gather=accelerator.gather),
            first,
        )

    def _identity(self) -> dict[str, Any]:
        processes, recipe = self.accelerator.num_processes, self.recipe
        facts: dict[str, Any] = {
            "images_per_step": recipe.images_per_step(processes),
            "samples": self.checked.num_samples,
            "teachers": {
                name: cache.spec.content_id(name) for cache, part in self.inputs for name in part.teachers
            },
        }
        if recipe.streams:
            facts["processes"] = processes
        if len(self.inputs) > 1:
            each = zip(recipe.each, self.inputs, strict=True)
            facts["inputs"] = [[one.images_per_step(processes), part.num_samples] for one, (_, part) in each]
        return run_identity(recipe, facts)

    def _objective(
        self, model: nn.Module, student: Student, targets: Sequence[TargetSource], weighting: Weighting
    ) -> Objective:
        kind: Any = type(self.recipe.student)
        wanted, device = self.recipe.distillation, self.accelerator.device
        settings = wanted.model_dump(include=set(signature(kind.loss).parameters), exclude_none=True)
        loss = kind.loss(**settings) if self.recipe.distills else None
        wanted_compile = self.recipe.student.compile
        if compiles(student.mean.device) if wanted_compile is None else wanted_compile:
            model = cast(nn.Module, torch.compile(model, **COMPILED))
            for source in targets:
                source.compile(**COMPILED)
            if isinstance(loss, nn.Module):
                loss.compile(**COMPILED)
        balance: dict[str, Normalisation] = {}
        for cache, part in self.inputs:
            balance |= normalisations(wanted.targets, cache, part.teachers, student.num_levels, device)
        stem: Any = getattr(student, "stem", None)
        cutmix = CutMix(stem.grid, self.recipe.seed) if self.recipe.cutmix else None
        made = kind.objective(
            model, student, targets, loss, wanted.weight, self.checked.task_loss, weighting, balance, cutmix
        )
        return cast(Objective, made)

    def _weighting(self) -> Weighting:
        wanted, mean = self.recipe.distillation, partial(self.accelerator.reduce, reduction="mean")
        match wanted.weighting:
            case "famo":
                return Famo(list(self.checked.teachers), wanted.famo_lr, wanted.famo_decay, mean)
            case "teacher_drop":
                return TeacherDrop(wanted.drop_probability, self.recipe.seed, mean)
        return Weighting()

    def _loader(
        self, read: tuple[FeatureCache, Preflight], targets: TargetSource, first_batch: int
    ) -> FeatureLoader:
        """Of an input."""
        cache, part = read
        assert part.sampler is not None
        return FeatureLoader(
            cache,
            part.sampler,
            targets.reads,
            labels=part.labels,
            extra_sizes=targets.extra_sizes,
            start_step=first_batch,
            fresh=self.recipe.features == "fresh",
            jitter=self.recipe.student_jitter,
            seed=self.recipe.seed,
            **self.recipe.loader.model_dump(include={"threads", "prefetch"}),
            pin_memory=self.accelerator.device.type == "cuda",
        )


def not_finite(
    cache: FeatureCache, teachers: Sequence[str], labels: LabelSource | None, rows: NDArray
) -> list[str]:
    """What of the data of these rows is not finite, read again where a loss is not: one line for each part of
    a row, its teacher and shard, or its task."""
    damaged = []
    for row in rows.tolist():
        key = cache.key(int(cache.index.locate(row)[0]))
        for teacher in teachers:
            values = [encoded.decode() for encoded in cache.read([row], [teacher]).values()]
            if cache.spec.teachers[teacher].cls_token:
                values.append(cache.read_tokens([row], teacher, CLS_TOKEN))
            if not all(bool(tensor.isfinite().all()) for tensor in values):
                shard = row // cache.spec.rows_per_shard
                damaged.append(f"features of {teacher} in shard {shard}, row {row} (sample {key})")
        for task, value in labels.read(key, cache.view(row)).items() if labels else ():
            if not value.isfinite().all():
                damaged.append(f"{task} of sample {key}")
    return damaged
