"""Train decoders on the features of a student, or of teachers from a cache (KPU, "Implementation Details").

`train_decoders(recipe)` is what every process runs. Running it again goes on from the newest checkpoint.

    <output>/checkpoints/, metrics.jsonl, tensorboard/    as of other runs
    <output>/decoders/       the finished decoders, for `teachercache.student.decoders.model.load_decoders`
    <output>/student/        the student, where it learns along

As everywhere, a batch is a function of its number: global batch g holds the places [g·B, (g+1)·B) of the
epochs' permutations, one behind the other, and each process takes its part.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import Problems, RecipeError, extra

with extra("train"):
    import accelerate  # noqa: F401 (what runs are made of imports it)

from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.labels import render_labels
from teachercache.student.decoders import decoder_class
from teachercache.student.decoders.decoder import Widths
from teachercache.student.decoders.model import Decoders, Inputs, load_student_at, represent, require_divided
from teachercache.student.models.student import NUM_LEVELS, WEIGHTS_FILE, TeacherFacts, find_saved
from teachercache.student.timing import StageTimer
from teachercache.student.training.checkpoint import require_output
from teachercache.student.training.decoder_recipe import DecoderInput, DecoderRecipe, decoder_run_identity
from teachercache.student.training.environment import accelerator_for, overruled
from teachercache.student.training.loop import Objective
from teachercache.student.training.run import Run, RunResult, require_folder
from teachercache.student.training.run_lock import only_trainer
from teachercache.student.training.run_log import missing_trackers
from teachercache.student.training.student_recipe import unfit_experts
from teachercache.student.training.targets import CachedTargets
from teachercache.student.training.train_recipe import MultiTaskRecipe
from teachercache.student.training.view_labels import ViewLabels


def train_decoders(recipe: DecoderRecipe) -> RunResult:
    """Train, or continue, the decoders that `recipe` states.

    Raises `RecipeError`, `SourceError` and `CacheError` for what stands in the way, `CheckpointError` when
    the output folder holds another run, one that lives, or no sound checkpoint of this one.
    """
    accelerator = accelerator_for(recipe)
    for line in overruled(recipe):
        accelerator.print(line)
    torch.manual_seed(recipe.seed)
    sources = sources_of(recipe, accelerator.process_index, accelerator.num_processes, accelerator.device)
    decoders = decoders_of(recipe, sources)
    require_folder(Path(recipe.output))
    with only_trainer(accelerator, Path(recipe.output)) as require_held:
        facts: dict[str, Any] = {f"inputs.{name}": source.facts for name, source in sources.items()}
        if recipe.student is not None:
            facts["student_weights"] = LocalStorage(find_saved(recipe.student)).checksum(WEIGHTS_FILE)
        identity = decoder_run_identity(recipe, facts)
        run = Run(recipe, accelerator, decoders, identity, steps_per_epoch(sources), require_held)

        def streams(stack: ExitStack) -> list[Iterator[Batch]]:
            return [source.batches(run.first_batch, stack) for source in sources.values()]

        use = f"measure them: teachercache evaluate {recipe.saved} DATASET ROOT --paper kpu"
        objective = DecoderObjective(recipe, run.model, sources, accelerator.device)
        return run.go(objective, streams, use, partial(_save, recipe, decoders))


@dataclass
class DecoderObjective(Objective):
    """The weighted sum of all decoders' losses, in one forward pass, which is what DDP expects."""

    recipe: DecoderRecipe
    model: nn.Module
    sources: Mapping[str, DecoderSource]
    device: torch.device

    def __call__(self, batches: Sequence[Batch], timer: StageTimer) -> tuple[Tensor, dict[str, Tensor]]:
        with timer.stage("targets"):
            inputs = {}
            for (name, source), batch in zip(self.sources.items(), batches, strict=True):
                there = batch.map(partial(Tensor.to, device=self.device, non_blocking=True))
                inputs[name] = source.inputs(there), there.labels[source.task]
        with timer.stage("forward"):
            losses = self.model(inputs)
            decoders = self.recipe.decoders
            weighted = [decoders[name.partition("/")[0]].weight * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum(), {f"loss/{name}": loss.detach() for name, loss in losses.items()}


def _save(recipe: DecoderRecipe, decoders: Decoders, result: RunResult) -> None:
    student = recipe.student and str(find_saved(recipe.student).resolve())
    if recipe.learns:
        assert decoders.student is not None
        decoders.student.save_pretrained(result.output / "student")
        student = "../student"
    decoders.save_pretrained(recipe.saved, student)


class DecoderSource(ABC):
    """Where the batches of one decoder come from. `facts`: what decides their numbers beside the recipe;
    `blank`: inputs of one image of `image_size`; `teachers`: whose features they are, None of a student.

    Raises `RecipeError` where its data set has no such labels, `SourceError` for what cannot be read of the
    first image.
    """

    facts: dict[str, Any]
    image_size: Size
    teachers: list[str] | None = None
    blank: Inputs

    def __init__(self, recipe: DecoderInput) -> None:
        self.task = decoder_class(recipe.kind).task
        self.dataset = open_dataset(recipe.dataset.kind, recipe.dataset.root, recipe.dataset.split)
        self.classes = {**self.dataset.tasks, **self.dataset.decoder_tasks}
        if self.task not in self.classes or not self.dataset.keys:
            raise RecipeError(
                f"{self.dataset.name} cannot be what the decoder {recipe.kind} learns from.",
                got=f"{len(self.dataset.keys)} images with {', '.join(self.classes)}",
                expected=f"images with {self.task}",
                do="choose another data set, or another decoder",
            )
        self.dataset.labels(0, [self.task])

    @abstractmethod
    def batches(self, first: int, stack: ExitStack) -> Iterator[Batch]:
        """From batch `first` on, without end; `stack` closes what makes them."""

    @abstractmethod
    def inputs(self, batch: Batch) -> Inputs:
        """What `Decoders.represent` takes of a batch that is on the device."""


class ImageInput(DecoderSource):
    """A data set's own images, in another order and through other views at each epoch: `multitask_train` of
    pixels' labels, `imagenet_train` of a class."""

    def __init__(self, recipe: DecoderInput, run: DecoderRecipe, rank: int, processes: int) -> None:
        super().__init__(recipe)
        self._batch_size, self._threads = recipe.batch_size_per_process, run.loader.threads
        self._ahead = run.loader.prefetch * self._batch_size
        self._rank, self._processes, self._seed = rank, processes, run.seed
        policy = "imagenet_train" if self.task == "class" else "multitask_train"
        self._views = ViewPolicy.model_validate({"policy": policy, "size": run.image_size, "seed": run.seed})
        self._order = lru_cache(maxsize=2)(self._shuffled)
        self.image_size = run.image_size
        self.blank = torch.zeros(1, 3, *run.image_size, dtype=torch.uint8)
        self.facts = {
            "samples": len(self.dataset.keys),
            "images_per_step": self._batch_size * processes * run.gradient_accumulation_steps,
        }

    def batches(self, first: int, stack: ExitStack) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decoder")
        stack.callback(pool.shutdown, cancel_futures=True)
        made = ordered_map(pool, self._make, self._places(first), self._ahead)
        for step in count(first):
            asked = time.perf_counter()
            numbers, images, labels = zip(*islice(made, self._batch_size), strict=True)
            rows, keys = np.array(numbers), [self.dataset.keys[number] for number in numbers]
            windows, seen = np.zeros((len(rows), 2), np.int64), torch.stack(images)
            labels_B = {self.task: torch.stack(labels)}
            seconds = {"wait": time.perf_counter() - asked}
            yield Batch(step, rows, keys, windows, seen, {}, {}, {}, labels_B, seconds)

    def inputs(self, batch: Batch) -> Inputs:
        return batch.images

    def _places(self, first: int) -> Iterator[int]:
        size = self._batch_size
        for step in count(first):
            start = (step * self._processes + self._rank) * size
            yield from range(start, start + size)

    def _make(self, place: int) -> tuple[int, Tensor, Tensor]:
        epoch, position = divmod(place, len(self.dataset.keys))
        number = int(self._order(epoch)[position])
        image, key = self.dataset.image(number), self.dataset.keys[number]
        view = draw_view(self._views, key, image.width, image.height, epoch)
        labels = render_labels(self.dataset.labels(number, [self.task]), view)
        return number, render_view(image, view), labels[self.task]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, epoch))))
        return generator.permutation(len(self.dataset.keys))


class CacheInput(DecoderSource):
    """Teachers' features of the data set's images, from a cache of these, through its views."""

    def __init__(
        self, recipe: DecoderInput, run: DecoderRecipe, rank: int, processes: int, device: torch.device
    ) -> None:
        super().__init__(recipe)
        self.cache = FeatureCache.open(recipe.cache or "")
        self.teachers = names = self.cache.check_teachers(recipe.teachers)
        specs = {name: self.cache.spec.teachers[name] for name in names}
        Problems(unfit_experts(specs, (1, NUM_LEVELS))).require_none()
        self.image_size = self.cache.spec.views.size
        facts = {name: TeacherFacts.of(spec, self.cache.spec.views) for name, spec in specs.items()}
        self.blank = {
            name: (
                torch.zeros(1, one.num_levels, *one.grid, one.width),
                torch.zeros(1, one.width) if one.cls_token else None,
            )
            for name, one in facts.items()
        }
        self._run, self._device = run, device
        self._labels = ViewLabels(MultiTaskRecipe(dataset=recipe.dataset), self.cache, (self.task,))
        self._sampler = ShardShuffleSampler(
            self.cache,
            names,
            batch_size_per_process=recipe.batch_size_per_process,
            rank=rank,
            world_size=processes,
            seed=run.seed,
        )
        self._targets = CachedTargets(self.cache, names, device)
        self.facts = {
            "samples": self._sampler.num_samples,
            "images_per_step": self._sampler.global_batch_size * run.gradient_accumulation_steps,
            "features": {name: self.cache.spec.content_id(name) for name in names},
        }

    def batches(self, first: int, stack: ExitStack) -> Iterator[Batch]:
        loader = FeatureLoader(
            self.cache,
            self._sampler,
            self._targets.reads,
            labels=self._labels,
            start_step=first,
            seed=self._run.seed,
            **self._run.loader.model_dump(include={"threads", "prefetch"}),
            pin_memory=self._device.type == "cuda",
        )
        return iter(stack.enter_context(loader))

    def inputs(self, batch: Batch) -> Inputs:
        return {
            name: (one.feature_maps_BSHWC, one.cls_token_BC) for name, one in self._targets(batch).items()
        }


def sources_of(
    recipe: DecoderRecipe, rank: int, processes: int, device: torch.device
) -> dict[str, DecoderSource]:
    """All is asked of the recipe here, before weights are loaded."""
    problems, sources = Problems(missing_trackers(recipe.trackers)), dict[str, DecoderSource]()
    with problems.noted():
        require_output(recipe.checkpoint_folder, recipe.resume)
    if recipe.student is not None:
        with problems.noted():
            require_divided(recipe.image_size)
    for name, one in recipe.decoders.items():
        with problems.noted():
            if recipe.student is not None:
                sources[name] = ImageInput(one, recipe, rank, processes)
            else:
                sources[name] = CacheInput(one, recipe, rank, processes, device)
    problems.require_none()
    return sources


def steps_per_epoch(sources: Mapping[str, DecoderSource]) -> float:
    """Of the decoder whose data set ends first."""
    return min(one.facts["samples"] / one.facts["images_per_step"] for one in sources.values())


@torch.no_grad()
def decoders_of(recipe: DecoderRecipe, sources: Mapping[str, DecoderSource]) -> Decoders:
    """With the weights of the student, and new ones of the decoders."""
    student = load_student_at(recipe.student, recipe.image_size) if recipe.student is not None else None
    made_of, size = dict[str, Any](), recipe.image_size
    for name, one in recipe.decoders.items():
        source = sources[name]
        require_divided(size := source.image_size)
        widths = Widths.of(represent(student, source.blank))
        made_of[name] = {
            "kind": one.kind,
            "options": one.options,
            "dataset": one.dataset.kind,
            **({"teachers": source.teachers} if source.teachers else {}),
            "classes": source.classes[source.task],
            "widths": [widths.image, list(widths.maps)],
        }
    with torch.enable_grad():
        return Decoders(made_of, size, student, recipe.learns)
