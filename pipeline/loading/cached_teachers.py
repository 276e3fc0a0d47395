"""A cache in somebody else's training loop: a map-style torch data set, and targets for other data sets.

data = CachedTeachers("/data/cache", ["dinov2"])
for batch in DataLoader(data, sampler=ShardBatches(data, 64), batch_size=None, num_workers=4):
    images = batch["pixels"].to(device)                uint8 (B, 3, H, W): what the teachers saw
    targets = data.decode(batch, device)               {teacher: (B, levels, h, w, C)}
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Dataset

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import Encoded
from teachercache.pipeline.errors import CacheMismatchError
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.stores.feature_store import CLS_TOKEN

_BOX_TOLERANCE = 0.01  # source pixels


class CachedTeachers(Dataset[dict[str, Any]]):
    """The rows that all of `teachers` hold. An index gives one row, a list of indices B rows in one read:

    pixels   uint8 (B, 3, H, W), the stored view          key, view   the sample and which of its views
    crop     float64 (B, 5): left, top, right, bottom in source pixels, and 1 where it is mirrored
    codes    by teacher and array, encoded; see `decode`  cls         (B, levels, C) by teacher, if stored

    `DataLoader(data, batch_size=64, shuffle=True)` gives the same, read row by row. Workers may be forked for
    a local cache, and must be spawned for one on an object store. Raises as `FeatureCache.valid_samples`.
    """

    def __init__(
        self, cache: FeatureCache | str | os.PathLike[str], teachers: Sequence[str] | None = None
    ) -> None:
        self.cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
        self.teachers = self.cache.check_teachers(teachers)
        samples = self.cache.valid_samples(self.teachers)
        self.rows = np.sort(self.cache.index.rows(samples[:, None], np.arange(self.cache.num_views)).ravel())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: SupportsIndex | Sequence[int]) -> dict[str, Any]:
        if isinstance(index, SupportsIndex):
            return _first(self[[index.__index__()]])
        rows, cache = self.rows[list(index)], self.cache
        samples, views, _ = cache.index.locate(rows)
        with_cls = [name for name in self.teachers if cache.spec.teachers[name].cls_token]
        return {
            "pixels": cache.pixels(rows),
            "key": [cache.key(sample) for sample in samples.tolist()],
            "view": torch.from_numpy(views),
            "crop": torch.tensor([cache.view(row).crop for row in rows.tolist()], dtype=torch.float64),
            "codes": {name: one.tensors() for name, one in cache.read(rows, self.teachers).items()},
            "cls": {name: cache.read_tokens(rows, name, CLS_TOKEN) for name in with_cls},
        }

    def decode(self, batch: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Features (B, levels, H, W, C) float32 by teacher. Codes travel packed, and are decoded there."""
        codes = batch["codes"].items()
        return {name: Encoded(self.cache.codec(name), arrays).decode(device) for name, arrays in codes}

    def targets(
        self, keys: Sequence[str], views: ArrayLike, crops: Tensor, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """What `decode` gives, for a batch of another data set.

        `crops` (B, 5) say how its pixels were cut, in the form of `View.crop`. They must be the
        views that the teachers saw, `cache.view(cache[key].row(number))`: features of the mirrored image
        resemble the right ones (cosine .87), so that no loss would tell. Raises `CacheError` for unknown keys
        and for pixels of another crop or flip, `IndexError` for views that are not there.
        """
        rows = self.cache.index.rows([self._sample(key) for key in keys], views)
        for key, row, crop in zip(keys, rows.tolist(), crops.tolist(), strict=True):
            expected = self.cache.view(row).crop
            if not np.allclose(crop, expected, rtol=0, atol=_BOX_TOLERANCE):
                raise CacheMismatchError(
                    f"The pixels of {key} are not those that the teachers saw in row {row}.",
                    got=f"left, top, right, bottom, mirrored: {crop}",
                    expected=list(expected),
                    do="cut the pixels with `render_view(image, cache.view(row))`, and mirror them once",
                )
        read = self.cache.read(rows, self.teachers).items()
        return {name: encoded.decode(device) for name, encoded in read}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.cache.samples["key"].to_pylist())}

    def _sample(self, key: str) -> int:
        return self._numbers[key] if key in self._numbers else self.cache.find(key, whole=True)


class ShardBatches(ShardShuffleSampler):
    """Shard by shard, the lists of indices for `DataLoader(data, sampler=…, batch_size=None)`.

    An epoch shows every sample once, in one of its views. As `DistributedSampler` does: the processes of
    torch's group, or `world_size` of them, take as many batches each, the last filled from the next epoch.
    """

    def __init__(
        self,
        data: CachedTeachers,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int = 1,
    ) -> None:
        if rank is None and dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(
            data.cache,
            data.teachers,
            batch_size_per_process=batch_size,
            seed=seed,
            rank=rank or 0,
            world_size=world_size,
        )
        self._rows, self._epoch = data.rows, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        start = self._epoch * self.num_samples
        for step in range(len(self)):
            yield np.searchsorted(self._rows, self.rows_at(start + self.positions(step))).tolist()


def _first(batch: Any) -> Any:
    return {name: _first(value) for name, value in batch.items()} if isinstance(batch, dict) else batch[0]
