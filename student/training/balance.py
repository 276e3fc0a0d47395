"""Teachers on equal terms: their maps as a loss compares them, scaled by the cache's own statistics.

Student and teacher are both brought to these terms, so that a student's maps stay what its teachers' are.
B, S, H, W, C: images, levels, grid and channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.codecs.normalisation import Normalisation, PhiS
from teachercache.pipeline.records.feature_stats import FeatureMoments

if TYPE_CHECKING:
    from teachercache.pipeline.cache import FeatureCache

TargetKind = Literal["raw", "standardised", "phi_s"]
_KINDS: dict[str, type[Normalisation]] = {"standardised": Normalisation, "phi_s": PhiS}
_ROWS, _ROWS_AT_ONCE = 256, 8


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
