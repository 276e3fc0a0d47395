"""Where the targets of a batch come from, the cache or the teachers, and the terms they are compared in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Codec, Encoded
from teachercache.pipeline.codecs.normalisation import Normalisation, PhiS
from teachercache.pipeline.grids import stored_form, upsampled_norms
from teachercache.pipeline.loading.loader import Batch
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.spec import GridSpec, TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.stores.feature_store import NORMS
from teachercache.pipeline.windows import cut, cut_nearest, grid_in
from teachercache.student.losses.distillation import AdjointTarget, Target

TargetKind = Literal["raw", "standardised", "phi_s"]
_KINDS: dict[str, type[Normalisation]] = {"standardised": Normalisation, "phi_s": PhiS}
_ROWS, _ROWS_AT_ONCE = 256, 8
COMPILED: dict[str, Any] = {"dynamic": False, "options": {"combo_kernels": True}}  # small ones, side by side


class TargetSource(ABC):
    """Gives the targets of a batch. `reads` and `extra_sizes` tell the loader which teachers' features and
    which renders it needs."""

    reads: Sequence[str] = ()
    extra_sizes: frozenset[Size] = frozenset()

    _parts: Sequence[TargetSource] = ()

    def compile(self, **options: Any) -> None:
        """Compile how features are decoded, with these options of torch.compile."""
        for part in self._parts:
            part.compile(**options)

    @abstractmethod
    def __call__(self, batch: Batch) -> dict[str, Target]: ...


class CachedTargets(TargetSource):
    """The features as they are stored; codes travel to the device packed and are decoded there."""

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], device: torch.device) -> None:
        self.reads = list(teachers)
        self._specs = {name: cache.spec.teachers[name] for name in teachers}
        self._views, self._device = cache.spec.views, device
        self._decode = Encoded.decode

    def compile(self, **options: Any) -> None:
        self._decode = torch.compile(Encoded.decode, **options)

    def __call__(self, batch: Batch) -> dict[str, Target]:
        targets = {}
        for name, spec in self._specs.items():
            encoded = batch.features[name]
            norms_BS = encoded.arrays.get(NORMS) if spec.grid.kind == "adjoint" else None
            stored = self._decode(encoded, self._device, self._dtype(encoded.codec, spec)), norms_BS
            targets[name] = target_of(stored, batch.cls_tokens.get(name), spec, batch.windows, self._views)
        return targets

    def _dtype(self, codec: Codec, spec: TeacherSpec) -> torch.dtype:
        """Of a CPU, and of what is still computed of windows, float32; in that losses compute anyway."""
        if self._device.type == "cpu" or (self._views.margin and spec.grid.kind == "adjoint"):
            return torch.float32
        return codec.dtype


def target_of(
    stored: tuple[Tensor, Tensor | None],
    cls_token_BSC: Tensor | None,
    spec: TeacherSpec,
    windows_B2: NDArray[np.int64],
    views: ViewPolicy,
) -> Target:
    """What a teacher says of the windows of views, from what is stored of the views (`stored_form`).

    On the adjoint grid ‖t‖ is divided as the maps that upsampling reaches divide. The class token stays that
    of the whole view: nothing stored says what it would be of a window.
    """
    maps_BSHWC, norms_BS = stored
    there: dict[str, Any] = {"device": maps_BSHWC.device, "dtype": torch.float32, "non_blocking": True}
    cls_token_BC = None if cls_token_BSC is None else cls_token_BSC[:, -1].to(**there)
    if norms_BS is None:
        height, width = maps_BSHWC.shape[2:4]
        grid = grid_in((height, width), windows_B2, views, maps_BSHWC.device)
        return Target(cut(maps_BSHWC, windows_B2, views), cls_token_BC, grid)
    norms_BS = norms_BS.to(maps_BSHWC.device, non_blocking=True)
    grid = grid_in(spec.native_grid, windows_B2, views, maps_BSHWC.device)
    seen_BShwC = cut_nearest(maps_BSHWC, spec.native_grid, windows_B2, views)
    if views.margin:
        reached_BS = upsampled_norms(maps_BSHWC, spec.native_grid).clamp(min=1e-30)
        norms_BS = norms_BS * upsampled_norms(seen_BShwC, grid) / reached_BS
    return AdjointTarget(seen_BShwC, cls_token_BC, norms_BS=norms_BS, grid=grid)


class OnlineTargets(TargetSource):
    """The teachers run on the views of a batch, those of the cache or fresh ones, on the grids that it stores
    (natively where it stores an adjoint, unless the student sees windows of the views).

    The reference that training from a cache must equal, up to what the codec loses. Raises
    `CacheMismatchError` when the teachers that can be built here are not those of the cache.
    """

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], device: torch.device) -> None:
        from teachercache.cache_builder.teachers import build_teacher  # only this reference needs the builder

        self._views, self._device = cache.spec.views, device
        self._specs = {name: cache.spec.teachers[name] for name in teachers}
        self._teachers = {name: build_teacher(spec, device=device) for name, spec in self._specs.items()}
        self.extra_sizes = frozenset(spec.render_size for spec in self._specs.values())

    def __call__(self, batch: Batch) -> dict[str, Target]:
        targets: dict[str, Target] = {}
        for name, teacher in self._teachers.items():
            spec = self._specs[name]
            features = teacher(batch.renders[spec.render_size].to(self._device, non_blocking=True))
            natively = spec.grid.kind == "adjoint" and not self._views.margin
            stored = stored_form(features.feature_maps_BSHWC, GridSpec() if natively else spec.grid)
            targets[name] = target_of(stored, features.cls_token_BSC, spec, batch.windows, self._views)
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


FeaturesFrom = Literal["cached", "online", "hybrid", "fresh"]
TARGET_SOURCES: dict[str, Callable[[FeatureCache, Sequence[str], torch.device], TargetSource]] = {
    "cached": CachedTargets,
    "online": OnlineTargets,
    "hybrid": HybridTargets,
    "fresh": OnlineTargets,
}
"""By a recipe's `features`."""


def normalisations(
    kind: TargetKind, cache: FeatureCache, teachers: Collection[str], num_levels: int, device: torch.device
) -> Mapping[str, Normalisation]:
    """Of each teacher's last `num_levels` levels; none for "raw".

    "standardised": channels of mean 0 and variance 1. "phi_s": PHI-S (Ranzinger et al. 2024). Both by the
    statistics that the cache keeps of all its rows, the covariance where it keeps none by some hundred of
    them, spread evenly. Raises `CacheError` where the cache has no statistics.
    """
    found: dict[str, Normalisation] = {}
    for name in teachers if kind != "raw" else ():
        moments = cache.statistics(name)
        if kind == "phi_s" and moments.products_SCC is None:
            moments = _covariance(cache, name)
        last = {key: one if key == "count" else one[-num_levels:] for key, one in moments.tensors().items()}
        tables = _KINDS[kind].of_moments(FeatureMoments.from_tensors(last)).tables
        found[name] = _KINDS[kind]({table: values.to(device) for table, values in tables.items()})
    return found


def _covariance(cache: FeatureCache, teacher: str) -> FeatureMoments:
    samples = cache.valid_samples([teacher])
    chosen = samples[np.linspace(0, len(samples) - 1, min(_ROWS, len(samples))).astype(int)]
    rows = cache.index.rows(chosen, np.arange(len(chosen)) % cache.num_views)
    spec = cache.spec.teachers[teacher]
    moments = FeatureMoments.empty(spec.num_levels, spec.width, covariance=True)
    for some in np.array_split(rows, -(-len(rows) // _ROWS_AT_ONCE)):
        moments = moments.merge(FeatureMoments.of(cache.feature_maps(teacher, some), covariance=True))
    return moments


def balanced(normalisation: Normalisation, maps_SBCHW: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, H, W), one of each level of the normalisation, in its terms."""
    maps_BSHWC = torch.stack([map_BCHW.permute(0, 2, 3, 1) for map_BCHW in maps_SBCHW], dim=1)
    return [map_BHWC.permute(0, 3, 1, 2) for map_BHWC in normalisation.forward(maps_BSHWC).unbind(1)]
