"""What decoders are fed: for each a stream of images (or of teachers' features) with labels, and a batch of
all.

As everywhere, a batch is a function of its number: global batch g holds the places [g·B, (g+1)·B) of the
epochs' permutations, one behind the other, and each process takes its part.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import Problems, RecipeError
from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import draw_view, render_view
from teachercache.student.datasets import LabelledDataset, open_dataset
from teachercache.student.datasets.labels import render_labels
from teachercache.student.decoders import decoder_class
from teachercache.student.decoders.decoder import Widths
from teachercache.student.decoders.model import Inputs
from teachercache.student.training.decoder_recipe import DecoderInput, DecoderRecipe
from teachercache.student.training.student_recipe import unfit_experts
from teachercache.student.training.targets import CachedTargets
from teachercache.student.training.train_recipe import MultiTaskRecipe
from teachercache.student.training.view_labels import ViewLabels


class DecoderSource(Protocol):
    """Where the batches of one decoder come from. `facts`: what decides their numbers beside the recipe."""

    task: str
    dataset: LabelledDataset
    facts: dict[str, Any]

    def batches(self, first: int, stack: ExitStack) -> Iterator[Batch]:
        """From batch `first` on, without end; `stack` closes what makes them."""

    def inputs(self, batch: Batch) -> Inputs:
        """What `Decoders.represent` takes of a batch that is on the device."""


class ImageInput:
    """A data set's own images, in another order and through other views at each epoch: `multitask_train` of
    pixels' labels, `imagenet_train` of a class."""

    def __init__(self, recipe: DecoderInput, run: DecoderRecipe, rank: int, processes: int) -> None:
        self.task = decoder_class(recipe.kind).task
        self.dataset = open_for(recipe, self.task)
        self._batch_size, self._threads = recipe.batch_size_per_process, run.loader.threads
        self._ahead = run.loader.prefetch * self._batch_size
        self._rank, self._processes, self._seed = rank, processes, run.seed
        policy = "imagenet_train" if self.task == "class" else "multitask_train"
        self._views = ViewPolicy.model_validate({"policy": policy, "size": run.image_size, "seed": run.seed})
        self._order = lru_cache(maxsize=2)(self._shuffled)
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


class CacheInput:
    """Teachers' features of the data set's images, from a cache of these, through its views."""

    def __init__(
        self, recipe: DecoderInput, run: DecoderRecipe, rank: int, processes: int, device: torch.device
    ) -> None:
        self.task = decoder_class(recipe.kind).task
        self.dataset = open_for(recipe, self.task)
        self.cache, self.teachers = open_cache(recipe.cache or "", recipe.teachers)
        self._run, self._device = run, device
        self._labels = ViewLabels(MultiTaskRecipe(dataset=recipe.dataset), self.cache, (self.task,))
        self._sampler = ShardShuffleSampler(
            self.cache,
            self.teachers,
            batch_size_per_process=recipe.batch_size_per_process,
            rank=rank,
            world_size=processes,
            seed=run.seed,
        )
        self._targets = CachedTargets(self.cache, self.teachers, device)
        self.facts = {
            "samples": self._sampler.num_samples,
            "images_per_step": self._sampler.global_batch_size * run.gradient_accumulation_steps,
            "features": {name: self.cache.spec.content_id(name) for name in self.teachers},
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


def open_cache(path: str, teachers: Sequence[str] | None) -> tuple[FeatureCache, list[str]]:
    """A cache, and those of its teachers that decoders read. Raises `CacheError`, `RecipeError`."""
    cache = FeatureCache.open(path)
    names = cache.check_teachers(teachers)
    Problems(unfit_experts({name: cache.spec.teachers[name] for name in names})).require_none()
    return cache, names


def widths_of_teachers(cache: FeatureCache, teachers: Sequence[str]) -> Widths:
    specs = [cache.spec.teachers[name] for name in teachers]
    width = sum(spec.width for spec in specs)
    return Widths(width, (width,) * specs[0].num_levels)


def open_for(recipe: DecoderInput, task: str, split: str | None = None) -> LabelledDataset:
    """The data set of a decoder, of which the first image and its labels were read.

    Raises `RecipeError` where it has no such labels, `SourceError` for what cannot be read.
    """
    dataset = open_dataset(recipe.dataset.kind, recipe.dataset.root, split or recipe.dataset.split)
    known = {**dataset.tasks, **dataset.decoder_tasks}
    if task not in known or not dataset.keys:
        raise RecipeError(
            f"{dataset.name} cannot be what the decoder {recipe.kind} learns from.",
            got=f"{len(dataset.keys)} images with {', '.join(known)}",
            expected=f"images with {task}",
            do="choose another data set, or another decoder",
        )
    dataset.labels(0, [task])
    return dataset
