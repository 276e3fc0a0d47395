"""Are the stored features those of the teacher? Random rows are computed again, live, from their views.

R rows, C channels last. A codec's promise is measured on the same rows, as its own round trip of the live
features. The tolerance adds the noise of the teacher's arithmetic, which changes with the batch size and the
device.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from teachercache.cache_builder.build_recipe import with_checkpoints
from teachercache.cache_builder.teachers import Teacher, build_teacher
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Encoded
from teachercache.pipeline.grids import stored_form
from teachercache.pipeline.stores.feature_store import CLS_TOKEN, GLOBAL_FEATURE, NORMS
from teachercache.pipeline.views import render_view

RELATIVE_NOISE = {"float32": 1e-5, "bfloat16": 2**-7}
_ROWS_AT_ONCE = 4  # SAM's features of one row are 67 MB, and three copies are compared


@dataclass(frozen=True)
class Comparison:
    """Stored against live features: one level of one teacher (or its norms, its cls or global feature).

    `cosine` is the mean over tokens, `max_error` the largest absolute difference, `allowed_error` what
    codec and noise explain. `kept`: the error is allowed, and no row's cosine is below the round trip's.
    """

    teacher: str
    what: str
    cosine: float
    max_error: float
    allowed_error: float
    kept: bool


def compare_with_teachers(
    cache: FeatureCache,
    num_rows: int,
    *,
    device: str = "cpu",
    seed: int | None = None,
    checkpoints: Mapping[str, str] | None = None,
) -> list[Comparison]:
    """Recompute `num_rows` random rows of every teacher (or all it has, if fewer).

    `checkpoints`: the new files of weights that moved since the build, by teacher.
    Raises what building a teacher raises, including for weights that are not those of the cache.
    """
    generator = np.random.default_rng(seed)
    samples, views = np.arange(cache.num_samples)[:, None], np.arange(cache.num_views)
    all_rows = np.sort(cache.index.rows(samples, views), axis=None)
    comparisons = []
    for name, spec in with_checkpoints(cache.spec, checkpoints or {}).teachers.items():
        rows = generator.permutation(all_rows[cache.shards[name].readable(all_rows)])[:num_rows]
        teacher = build_teacher(spec, device=device)
        measures: dict[str, list[Tensor]] = defaultdict(list)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            for what, *features in _features(cache, name, teacher, rows[start : start + _ROWS_AT_ONCE]):
                measures[what].append(_measure(*features))
        noise = RELATIVE_NOISE[spec.precision]
        comparisons += [_judge(name, what, torch.cat(parts), noise) for what, parts in measures.items()]
    return comparisons


@torch.inference_mode()
def _features(
    cache: FeatureCache, name: str, teacher: Teacher, rows: NDArray[np.int64]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(what, stored, live, round trip of live), each (R, …, C) on the CPU."""
    samples = cache.index.locate(rows)[0].tolist()
    size = cache.spec.teachers[name].render_size
    views = [
        render_view(cache.image(sample), cache.view(row), size)
        for sample, row in zip(samples, rows.tolist(), strict=True)
    ]
    device = next(teacher.parameters()).device
    features = teacher(torch.stack(views).to(device))
    live_RSHWC, norms_RS = stored_form(features.feature_maps_BSHWC, cache.spec.teachers[name].grid)
    codec, encoded = cache.codec(name), cache.read(rows, [name])[name]
    round_trip = Encoded(codec, dict(codec.encode(live_RSHWC).tensors())).decode()
    stored, live = encoded.decode(), live_RSHWC.float().cpu()
    for level in range(live.shape[1]):
        yield f"level {level + 1}", stored[:, level], live[:, level], round_trip[:, level]
    if norms_RS is not None:
        norms = norms_RS.float().cpu()
        yield NORMS, encoded.arrays[NORMS], norms, norms
    for kind, token in ((CLS_TOKEN, features.cls_token_BSC), (GLOBAL_FEATURE, features.global_feature_BD)):
        if kind in cache.layouts(name) and token is not None:
            stored, live = cache.read_tokens(rows, name, kind), token.float().cpu()
            yield kind, stored.float(), live, live.to(stored.dtype).float()


def _measure(stored: Tensor, live: Tensor, round_trip: Tensor) -> Tensor:
    """(R, 5): cosine and largest error of the stored features, those of the round trip, largest value."""

    def errors(other: Tensor) -> list[Tensor]:
        cosine = F.cosine_similarity(other.double(), live.double(), dim=-1)
        return [cosine.reshape(len(live), -1).mean(1), (other - live).abs().double().flatten(1).amax(1)]

    return torch.stack([*errors(stored), *errors(round_trip), live.abs().double().flatten(1).amax(1)], 1)


def _judge(teacher: str, what: str, measures_R5: Tensor, noise: float) -> Comparison:
    cosine_R, error_R, own_cosine_R, own_error_R, value_R = measures_R5.unbind(1)
    allowed = own_error_R.max() + noise * value_R.max()
    kept = (error_R.max() <= allowed) & (cosine_R >= own_cosine_R - noise).all()
    return Comparison(teacher, what, cosine_R.mean().item(), error_R.max().item(), allowed.item(), bool(kept))
