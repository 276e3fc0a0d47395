"""What of the data that a loss was computed from is not finite. Looked for only where the loss is not."""

from collections.abc import Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.loading.loader import Labels
from teachercache.pipeline.stores.feature_store import CLS_TOKEN


def not_finite(
    cache: FeatureCache, teachers: Sequence[str], labels: Labels | None, rows: NDArray
) -> list[str]:
    """One line for each part of a row: its teacher and shard, or its task. They are read again."""
    found = []
    for row in rows.tolist():
        key = cache.key(int(cache.index.locate(row)[0]))
        for teacher in teachers:
            values = [encoded.decode() for encoded in cache.read([row], [teacher]).values()]
            if cache.spec.teachers[teacher].cls_token:
                values.append(cache.read_tokens([row], teacher, CLS_TOKEN))
            if not _all_finite(values):
                shard = row // cache.spec.rows_per_shard
                found.append(f"features of {teacher} in shard {shard}, row {row} (sample {key})")
        for task, value in labels.read(key, cache.view(row)).items() if labels else ():
            if not _all_finite([value]):
                found.append(f"{task} of sample {key}")
    return found


def _all_finite(values: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in values)
