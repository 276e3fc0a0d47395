"""Representation similarity: how close a student comes to its teachers (SAK, Tables 3 and 17)."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
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
    student and cache have in common), as `mean_similarity` takes it.

    For an adjoint grid it is the cosine to the part of the teacher's map that a map on that grid can reach;
    the paper's needs a native grid. Each sample is seen once, in one of its views; `seed` draws `max_samples`
    of them. With `stem`, the bare stem, which is aligned with no teacher, is compared too, under "stem,
    NAME", with the teachers of its width: row 1 of Table 17.

    Raises `CacheError` if the cache does not allow this, `RecipeError` if the student does not.
    """
    names = cache.check_teachers(teachers or [name for name in student.teachers if name in cache.teachers])
    _require_fit(student, cache, names)
    of_stem = _of_stem_width(student, cache, names) if stem else []
    sampler = ShardShuffleSampler(cache, names, batch_size_per_process=batch_size, seed=seed)
    count = min(max_samples or sampler.num_samples, sampler.num_samples)
    return mean_similarity(student, sampler, names, count, of_stem=of_stem, threads=threads, seed=seed)


def mean_similarity(
    student: Student,
    sampler: ShardShuffleSampler,
    teachers: Sequence[str],
    num_samples: int,
    *,
    of_stem: Collection[str] = (),
    threads: int = 2,
    seed: int = 0,
    gather: Callable[[Tensor], Tensor] = lambda local: local,
) -> dict[str, Similarity]:
    """The similarity to each of `teachers`, over the first `num_samples` of the sampler, each seen once.

    The student's map is upsampled to the teacher's grid; one cosine per token is averaged over tokens and
    samples. (The paper does not say what its cosine is taken over.) `of_stem`: teachers that the bare stem is
    compared with too, under "stem, NAME". `gather` gives every process what all have, in the order of ranks.
    Runs on the student's device, draws no random number, and leaves the student as it was.
    """
    cache, device, views = sampler.cache, student.mean.device, sampler.cache.spec.views
    cosines_BS: defaultdict[str, list[Tensor]] = defaultdict(list)
    steps = range(-(-num_samples // sampler.global_batch_size))
    with FeatureLoader(cache, sampler, teachers, seed=seed, threads=threads) as loader, student.evaluating():
        for _, batch in zip(steps, loader, strict=False):  # which has no end
            pixels_B3HW = student.normalize(batch.images.to(device))
            maps = student(pixels_B3HW, full=True).feature_maps
            stem_maps = _stem_maps(student, pixels_B3HW) if of_stem else []
            for name in teachers:
                targets_BSHWC = cut(batch.features[name].decode(device), batch.windows, views)
                grid = grid_in(cache.spec.teachers[name].stored_grid, batch.windows, views, device)
                compared = {name: maps[name]} | ({f"stem, {name}": stem_maps} if name in of_stem else {})
                for title, levels in compared.items():
                    count = min(len(levels), targets_BSHWC.shape[1])  # the last ones that both have
                    cosines_BS[title].append(token_cosines(levels[-count:], targets_BSHWC[:, -count:], grid))
    found = {}
    for title, parts in cosines_BS.items():
        by_rank = gather(torch.stack(parts)).unflatten(0, (-1, len(parts)))  # (ranks, steps, batch, levels)
        cosines = by_rank.transpose(0, 1).flatten(0, 2)[:num_samples]
        found[title] = Similarity(tuple(cosines.double().mean(0).tolist()))
    return found


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
    levels = student.representations(pixels_B3HW)[0]
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
    if not names or not set(names) <= set(student.teachers):
        raise RecipeError(
            "The student was not distilled from these teachers, or has none in common with the cache.",
            got=", ".join(names) or f"a cache of {', '.join(cache.teachers)}",
            expected=f"some of {', '.join(student.teachers)}",
            do="name teachers that student and cache have in common, or choose another cache",
        )
    others = student.config.get("image_sizes", {})  # of a KPU, by teacher
    if {tuple(others.get(name, student.image_size)) for name in names} != {cache.spec.views.size}:
        raise RecipeError(
            "The student's images and the views of this cache differ in size.",
            got=f"views of {cache.spec.views.size}",
            expected=student.image_size,
            do="measure on a cache whose views have the student's size",
        )
