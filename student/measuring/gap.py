"""The gap between teachers: how far their features spread, in their own spaces and in the one that a KPU
makes of them ("Effects of Unified Knowledge Transfer")."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.student.kpu.model import KPU
from teachercache.student.models.student import Student
from teachercache.student.training.objectives import last_level
from teachercache.student.training.targets import CachedTargets


class Spread(NamedTuple):
    """The standard deviation of a teacher's maps in both spaces."""

    own: float
    shared: float


def teacher_gap(
    student: Student,
    cache: FeatureCache,
    *,
    max_samples: int | None = None,
    batch_size: int = 16,
    threads: int = 2,
) -> dict[str, Spread]:
    """Of each teacher that student and cache have in common, over a view of each sample: of V^t and of
    h_t2s(V^t), the root of the mean over channels of their variance, by which PHI-S scales.

    Raises `RecipeError` for a student without such a space or without such a teacher.
    """
    names = [name for name in student.teachers if name in cache.teachers]
    if not isinstance(student, KPU) or "t2s" not in student.latent_space or not names:
        raise RecipeError(
            "This student has no space that teachers of this cache share.",
            got=f"a {student.kind} of {', '.join(student.teachers)}, a cache of {', '.join(cache.teachers)}",
            expected="a kpu that was trained with unification, and a cache with some of its teachers",
            do="choose another cache, or train one with student.unification=true",
        )
    sampler = ShardShuffleSampler(cache, names, batch_size_per_process=batch_size)
    count = min(max_samples or sampler.num_samples, sampler.num_samples)
    targets = CachedTargets(cache, names, student.mean.device)
    moments: dict[str, list[FeatureMoments]] = {}
    with FeatureLoader(cache, sampler, names, images=False, threads=threads) as loader, student.evaluating():
        for start, batch in zip(range(0, count, batch_size), loader, strict=False):  # which has no end
            own = {name: last_level(target) for name, target in targets(batch).items()}
            for name, shared in student.unify(own).items():
                both = [_moments(one.map[: count - start]) for one in (own[name], shared)]
                if name in moments:
                    both = [before.merge(more) for before, more in zip(moments[name], both, strict=True)]
                moments[name] = both
    return {
        name: Spread(*(one.std_SC().square().mean().sqrt().item() for one in both))
        for name, both in moments.items()
    }


def largest_ratio(spreads: Mapping[str, Spread]) -> Spread:
    """The largest standard deviation / the smallest, in both spaces."""
    own, shared = zip(*spreads.values(), strict=True)
    return Spread(max(own) / min(own), max(shared) / min(shared))


def _moments(map_BCHW: Tensor) -> FeatureMoments:
    return FeatureMoments.of(map_BCHW.permute(0, 2, 3, 1)[:, None])
