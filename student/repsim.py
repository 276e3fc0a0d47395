"""Representation similarity: how near a student comes to its teachers (SAK, Tables 3 and 17)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.cache import FeatureCache
from pipeline.errors import RecipeError
from pipeline.grids import upsample
from pipeline.loader import FeatureLoader
from pipeline.sampler import ShardShuffleSampler
from student.base import Student


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity to one teacher, by level (the last ones, as many as both have) and over them."""

    levels: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.levels) / len(self.levels)


@torch.no_grad()
def representation_similarity(
    student: Student,
    cache: FeatureCache,
    teachers: Sequence[str] | None = None,
    *,
    max_samples: int | None = None,
    batch_size: int = 16,
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Similarity]:
    """Mean cosine similarity of student and cached features, for each teacher (all of the student's).

    One cosine for each token of the teacher's grid, to which the student's map is upsampled; averaged
    over tokens and samples. (The paper does not say over what it takes its cosine.) Of an adjoint grid it is
    the cosine to what a map on that grid can reach of the teacher's; the paper's needs a native one. Each
    sample is seen once, in one of its views; `max_samples` of them are drawn by `seed`. Runs where the
    student is.

    Raises `CacheError` where the cache cannot give this, `RecipeError` where the student cannot.
    """
    names = cache.check_teachers(teachers or student.teachers)
    _require_fit(student, cache, names)
    sampler = ShardShuffleSampler(cache, names, batch_size_per_process=batch_size, seed=seed)
    left = min(max_samples or sampler.num_samples, sampler.num_samples)
    device, was_training = student.mean.device, student.training
    cosines_BS: dict[str, list[Tensor]] = {name: [] for name in names}
    student.eval()
    with FeatureLoader(cache, sampler, names, threads=threads) as loader:
        for batch in loader:
            images_B3HW = batch.renders[student.image_size][:left].to(device)
            maps = student(student.normalize(images_B3HW), full=True).feature_maps
            for name in names:
                targets_BSHWC = batch.features[name].decode(device)[:left]
                count = min(len(maps[name]), targets_BSHWC.shape[1])  # whose are fewer stands beside the last
                cosines_BS[name].append(token_cosines(maps[name][-count:], targets_BSHWC[:, -count:]))
            left -= len(images_B3HW)
            if not left:
                break
    student.train(was_training)
    return {
        name: Similarity(tuple(torch.cat(parts).double().mean(0).tolist()))
        for name, parts in cosines_BS.items()
    }


def token_cosines(student_SBChw: Sequence[Tensor], targets_BSHWC: Tensor) -> Tensor:
    """(B, S): for each sample and level, the mean cosine over the tokens of the teacher's grid."""
    height, width = targets_BSHWC.shape[2:4]
    levels = []
    for student_BChw, target_BHWC in zip(student_SBChw, targets_BSHWC.unbind(1), strict=True):
        student_BHWC = upsample(student_BChw, (height, width)).permute(0, 2, 3, 1)
        levels.append(F.cosine_similarity(student_BHWC, target_BHWC, dim=-1).mean((1, 2)))
    return torch.stack(levels, dim=1)


def _require_fit(student: Student, cache: FeatureCache, names: Sequence[str]) -> None:
    if missing := sorted(set(names) - set(student.teachers)):
        raise RecipeError(
            "The student was not distilled from these teachers.",
            got=", ".join(missing),
            expected=f"some of {', '.join(student.teachers)}",
            do="name only teachers that student and cache have in common",
        )
    if student.image_size != cache.spec.views.size:
        raise RecipeError(
            "The student takes images of another size than the views of this cache.",
            got=f"views of {cache.spec.views.size}",
            expected=student.image_size,
            do="measure on a cache whose views have the student's size",
        )
