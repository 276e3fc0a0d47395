"""Where the targets of a batch come from: the cache, or the teachers themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Encoded
from teachercache.pipeline.grids import pool
from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.records.spec import Size, TeacherSpec
from teachercache.pipeline.stores.feature_store import NORMS
from teachercache.student.losses.distillation import AdjointTarget, Target


class TargetSource(ABC):
    """Gives the targets of a batch. `reads` and `extra_sizes` tell the loader which teachers' features and
    which renders it needs."""

    reads: Sequence[str] = ()
    extra_sizes: frozenset[Size] = frozenset()

    @abstractmethod
    def __call__(self, batch: Batch) -> dict[str, Target]: ...


class CachedTargets(TargetSource):
    """The features as they are stored; codes travel to the device packed and are decoded there."""

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], device: torch.device) -> None:
        self.reads = list(teachers)
        self._specs = {name: cache.spec.teachers[name] for name in teachers}
        self._device = device

    def __call__(self, batch: Batch) -> dict[str, Target]:
        return {
            name: self._target(batch.features[name], batch.cls_tokens.get(name), spec)
            for name, spec in self._specs.items()
        }

    def _target(self, encoded: Encoded, cls_token_BSC: Tensor | None, spec: TeacherSpec) -> Target:
        features_BShwC, cls_token_BC = encoded.decode(self._device), None
        if cls_token_BSC is not None:
            cls_token_BC = cls_token_BSC[:, -1].to(self._device, features_BShwC.dtype, non_blocking=True)
        if spec.grid.kind != "adjoint":
            return Target(features_BShwC, cls_token_BC)
        norms_BS = encoded.arrays[NORMS].to(self._device, non_blocking=True)
        return AdjointTarget(features_BShwC, cls_token_BC, norms_BS=norms_BS, grid=spec.native_grid)


class OnlineTargets(TargetSource):
    """The teachers run on the very views that the cache was built from, on the grids that it stores
    (natively where it stores an adjoint).

    The reference that training from a cache must equal, up to what the codec loses. Raises
    `CacheMismatchError` when the teachers that can be built here are not those of the cache.
    """

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], device: torch.device) -> None:
        from teachercache.cache_builder import build_teacher  # only this reference needs the builder

        self._device = device
        self._specs = {name: cache.spec.teachers[name] for name in teachers}
        self._teachers = {name: build_teacher(spec, device=device) for name, spec in self._specs.items()}
        self.extra_sizes = frozenset(spec.render_size for spec in self._specs.values())

    def __call__(self, batch: Batch) -> dict[str, Target]:
        targets: dict[str, Target] = {}
        for name, teacher in self._teachers.items():
            spec = self._specs[name]
            features = teacher(batch.renders[spec.render_size].to(self._device, non_blocking=True))
            maps_BSHWC = features.feature_maps_BSHWC
            if spec.grid.kind != "adjoint":
                maps_BSHWC = pool(maps_BSHWC, spec.grid)
            cls_token_BSC = features.cls_token_BSC
            targets[name] = Target(
                maps_BSHWC, None if cls_token_BSC is None else cls_token_BSC[:, -1].to(maps_BSHWC.dtype)
            )
        return targets


class HybridTargets(TargetSource):
    """The features of the teachers that the cache holds whole; the others, which it only names, run live.

    A run can so begin before a late teacher is cached, or do without the bytes of one.
    """

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], device: torch.device) -> None:
        self.reads = complete_teachers(cache, teachers)
        online = OnlineTargets(cache, [name for name in teachers if name not in self.reads], device)
        self._parts = CachedTargets(cache, self.reads, device), online
        self.extra_sizes = online.extra_sizes

    def __call__(self, batch: Batch) -> dict[str, Target]:
        return {name: target for part in self._parts for name, target in part(batch).items()}


def complete_teachers(cache: FeatureCache, teachers: Sequence[str]) -> list[str]:
    """Those of `teachers` of which every shard is committed."""
    return [name for name in teachers if cache.committed(name).all()]


TARGET_SOURCES: dict[str, Callable[[FeatureCache, Sequence[str], torch.device], TargetSource]] = {
    "cached": CachedTargets,
    "online": OnlineTargets,
    "hybrid": HybridTargets,
}
"""By a recipe's `features`."""
