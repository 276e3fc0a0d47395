"""Representation similarity: how close a student comes to its teachers (SAK, Tables 3 and 17)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.grids import Grid, upsample
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.windows import cut, grid_in
from teachercache.student.models.student import Student
from teachercache.student.sak.model import SAK


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity to one teacher, by level (the last ones, as many as both have) and on average."""

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
    stem: bool = False,
    max_samples: int | None = None,
    batch_size: int = 16,
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Similarity]:
    """Mean cosine similarity of student and cached features, for each of `teachers` (null: those that
    student and cache have in common).

    The student's map is upsampled to the teacher's grid; one cosine per token is averaged over tokens and
    samples. (The paper does not say what its cosine is taken over.) For an adjoint grid it is the cosine to
    the part of the teacher's map that a map on that grid can reach; the paper's needs a native grid. Each
    sample is seen once, in one of its views; `seed` draws `max_samples` of them. Runs on the student's
    device. With `stem`, the bare stem, which is aligned with no teacher, is compared too, under "stem, NAME",
    with the teachers of its width: row 1 of Table 17.

    Raises `CacheError` if the cache does not allow this, `RecipeError` if the student does not.
    """
    names = cache.check_teachers(teachers or [name for name in student.teachers if name in cache.teachers])
    _require_fit(student, cache, names)
    of_stem = _of_stem_width(student, cache, names) if stem else []
    sampler = ShardShuffleSampler(cache, names, batch_size_per_process=batch_size, seed=seed)
    left = min(max_samples or sampler.num_samples, sampler.num_samples)
    device, was_training = student.mean.device, student.training
    cosines_BS: defaultdict[str, list[Tensor]] = defaultdict(list)
    student.eval()
    with FeatureLoader(cache, sampler, names, seed=seed, threads=threads) as loader:
        for batch in loader:
            images_B3HW = batch.images[:left].to(device)
            pixels_B3HW = student.normalize(images_B3HW)
            maps = student(pixels_B3HW, full=True).feature_maps
            stem_maps = _stem_maps(student, pixels_B3HW) if of_stem else []
            for name in names:
                windows, views = batch.windows[:left], cache.spec.views
                targets_BSHWC = cut(batch.features[name].decode(device)[:left], windows, views)
                grid = grid_in(cache.spec.teachers[name].stored_grid, windows, views, device)
                compared = {name: maps[name]} | ({f"stem, {name}": stem_maps} if name in of_stem else {})
                for title, levels in compared.items():
                    count = min(len(levels), targets_BSHWC.shape[1])  # the last ones that both have
                    cosines_BS[title].append(token_cosines(levels[-count:], targets_BSHWC[:, -count:], grid))
            left -= len(images_B3HW)
            if not left:
                break
    student.train(was_training)
    return {
        name: Similarity(tuple(torch.cat(parts).double().mean(0).tolist()))
        for name, parts in cosines_BS.items()
    }


def token_cosines(student_SBChw: Sequence[Tensor], targets_BSHWC: Tensor, grid: Grid | None = None) -> Tensor:
    """(B, S): for each sample and level, the mean cosine over the tokens of the teacher's grid,
    by default that of the targets."""
    height, width = targets_BSHWC.shape[2:4]
    levels = []
    for student_BChw, target_BHWC in zip(student_SBChw, targets_BSHWC.unbind(1), strict=True):
        student_BHWC = upsample(student_BChw, grid or (height, width)).permute(0, 2, 3, 1)
        levels.append(F.cosine_similarity(student_BHWC, target_BHWC, dim=-1).mean((1, 2)))
    return torch.stack(levels, dim=1)


def _stem_maps(student: Student, pixels_B3HW: Tensor) -> list[Tensor]:
    assert isinstance(student, SAK)
    levels = student.representations(pixels_B3HW).stem
    return [tokens_BnD.unflatten(1, student.stem.grid).permute(0, 3, 1, 2) for tokens_BnD in levels]


def _of_stem_width(student: Student, cache: FeatureCache, names: Sequence[str]) -> list[str]:
    widths = {name: cache.spec.teachers[name].width for name in names}
    own = student.stem.width if isinstance(student, SAK) else None
    matching = [name for name, width in widths.items() if width == own]
    if not matching:
        raise RecipeError(
            "The bare stem cannot be compared with any teacher.",
            got=f"a {student.kind} student" if own is None else f"a stem of {own} channels",
            expected=f"the width of a teacher: {', '.join(f'{n} {w}' for n, w in widths.items())}",
            do="leave out --stem",
        )
    return matching


def _require_fit(student: Student, cache: FeatureCache, names: Sequence[str]) -> None:
    if not names:
        raise RecipeError(
            "Student and cache have no teacher in common.",
            got=f"a student of {', '.join(student.teachers)}",
            expected=f"one of {', '.join(cache.teachers)}",
            do="measure on a cache of a teacher that this student was distilled from",
        )
    if missing := sorted(set(names) - set(student.teachers)):
        raise RecipeError(
            "The student was not distilled from these teachers.",
            got=", ".join(missing),
            expected=f"some of {', '.join(student.teachers)}",
            do="name only teachers that student and cache have in common",
        )
    if student.image_size != cache.spec.views.size:
        raise RecipeError(
            "The student's images and the views of this cache differ in size.",
            got=f"views of {cache.spec.views.size}",
            expected=student.image_size,
            do="measure on a cache whose views have the student's size",
        )
