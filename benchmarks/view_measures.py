"""How good a student of `benchmarks.view_curve` is, on images that nobody was trained on.

B  images     S  levels     C  channels     N, F  vectors and their numbers
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache as once
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.view_arms import PATCH, TEACHER
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.sources.keys import OK
from teachercache.student.datasets.scenes import Scenes
from teachercache.student.measuring.image_features import StudentFeatures
from teachercache.student.measuring.linear_probe import fit, linear_probe
from teachercache.student.metrics import MeanIoU
from teachercache.student.models.student import Student
from teachercache.student.similarity import token_cosines

NEIGHBOURS, TEMPERATURE = 20, 0.07


@torch.no_grad()
def similarity(student: Student, cache: FeatureCache, batch_size: int, threads: int) -> list[float]:
    """The standardised cosine of each level, on the images of this cache."""
    moments, device = cache.statistics(TEACHER), student.mean.device
    mean_SC, std_SC = (part.float().to(device) for part in (moments.mean_SC, moments.std_SC()))
    sampler = ShardShuffleSampler(cache, [TEACHER], batch_size_per_process=batch_size, seed=0)
    cosines_BS, left = list[Tensor](), sampler.num_samples
    with FeatureLoader(cache, sampler, [TEACHER], threads=threads) as loader:
        for batch in loader:
            pixels_B3HW = student.normalize(batch.images.to(device))
            maps = student(pixels_B3HW, full=True).feature_maps[TEACHER]
            ours = [
                (map_BChw - mean_C[:, None, None]) / std_C[:, None, None]
                for map_BChw, mean_C, std_C in zip(maps[-len(mean_SC) :], mean_SC, std_SC, strict=True)
            ]
            targets_BSHWC = batch.features[TEACHER].decode(device).float()
            theirs_BSHWC = (targets_BSHWC - mean_SC[:, None, None]) / std_SC[:, None, None]
            cosines_BS.append(token_cosines(ours, theirs_BSHWC)[:left])
            left -= len(cosines_BS[-1])
            if not left:
                break
    return torch.cat(cosines_BS).mean(0).tolist()


@torch.no_grad()
def semseg(student: Student, folder: Path) -> float:
    """Mean IoU in percent of a linear classifier of patches, on the scenes in this folder."""
    features, classes, device = {}, {}, student.mean.device
    for split in ("train", "val"):
        scenes = Scenes(folder, split)
        tokens, labels = [], []
        for index in range(len(scenes.keys)):
            pixels = torch.from_numpy(np.array(scenes.image(index))).movedim(-1, 0)[None].to(device)
            maps = student(student.normalize(pixels), full=True).feature_maps[TEACHER]
            tokens.append(torch.cat([m[0].flatten(1).T for m in maps], 1))
            label = torch.from_numpy(scenes.labels(index, ["semseg"])["semseg"]).long()
            patches = label.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(0, 1).flatten(1)
            labels.append(patches.mode(1).values)
        features[split], classes[split] = torch.cat(tokens), torch.cat(labels).to(device)
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-6
    count = Scenes.tasks["semseg"]
    with torch.enable_grad():
        weights = fit((features["train"] - mean) / std, classes["train"], count, 1e-2, max_iterations=60)
    logits = F.linear((features["val"] - mean) / std, weights[:, :-1], weights[:, -1])
    metric = MeanIoU(count)
    metric.update(logits.argmax(1).cpu(), classes["val"].cpu())
    return 100 * float(metric.compute())


def classification(
    student: Student, labelled: tuple[str, str], count: int, batch_size: int, threads: int
) -> dict[str, float]:
    """Top-1 in percent of a linear classifier and of neighbours, on `count` images and a third as many."""
    train_images, test_images = (
        _Once(StudentFeatures(student, _first(path, number), None, batch_size, threads))
        for path, number in zip(labelled, (count, count // 3), strict=True)
    )
    probe = linear_probe(train_images, test_images, strengths=(1e-1, 1e-2, 1e-3))
    return {"top1": probe.top1, "knn": _neighbours(train_images, test_images)}


@once
def _first(path: str, count: int) -> Any:
    """A source of the first images that decode; a process looks for them once."""
    source = open_source(path)
    found = source.scan().filter(pc.field("status") == OK).slice(0, count)
    return SimpleNamespace(scan=lambda: found, read=source.read)


class _Once:
    """Features that are made once."""

    def __init__(self, images: StudentFeatures) -> None:
        self.width, self.labels = images.width, images.labels
        self._vectors_NF = images.read(range(len(self.labels)))

    def read(self, numbers: Sequence[int]) -> Tensor:
        return self._vectors_NF[list(numbers)]


def _neighbours(train_images: _Once, test_images: _Once) -> float:
    """Top-1 in percent of the 20 nearest by cosine, weighted by exp(cosine / 0.07) (Wu et al., 2018)."""
    names = sorted({str(label) for label in train_images.labels})
    classes = torch.tensor([names.index(str(label)) for label in train_images.labels])
    train_NF, test_NF = (
        F.normalize(images.read(range(len(images.labels))), dim=1) for images in (train_images, test_images)
    )
    near, index = (test_NF @ train_NF.T).topk(min(NEIGHBOURS, len(classes)), 1)
    votes = torch.zeros(len(test_NF), len(names)).scatter_add(1, classes[index], (near / TEMPERATURE).exp())
    right = [names[i] == str(label) for i, label in zip(votes.argmax(1), test_images.labels, strict=True)]
    return 100 * statistics.fmean(right)
