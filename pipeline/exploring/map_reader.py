"""Decoded feature maps to look at: a few rows at a time, in colours that are comparable across images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.errors import CacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import PcaBasis, Picture
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.views import render_view
from teachercache.pipeline.windows import cut

if TYPE_CHECKING:
    from teachercache import FeatureCache

MAX_TOKENS = 8192  # of one teacher, to learn colours from
_TRIED_RECORDS = 8
_KEPT_ROWS = 3  # a decoded row of SAM-L is 67 MB


def level_name(teacher: TeacherSpec, level: int) -> str:
    """A level's name in pictures: its number, from 1, and its block, from 0 as in `block_indices`."""
    return f"level {level + 1} (block {teacher.block_indices[level]})"


class MapReader:
    """Maps of the teachers that can be read; `absent` says why others cannot.

    `rows` are up to `num_rows` first views, drawn by the seed, that every one of these teachers holds.
    Colours are learnt over them. `window`: of views with a margin their middle, as large as a student sees.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teachers: Sequence[str] | None = None,
        *,
        num_rows: int = 6,
        seed: int = 0,
        window: bool = False,
    ) -> None:
        self.cache = cache
        self._window = cache.spec.views.middle if window else None
        names = cache.check_teachers(teachers)
        self.absent = {name: reason for name in names if (reason := _why_absent(cache, name))}
        self.teachers = [name for name in names if name not in self.absent]
        self._choice = num_rows, seed
        self.maps: Callable[[str, int], Tensor] = lru_cache(_KEPT_ROWS * len(cache.teachers))(self._maps)
        self.tokens: Callable[[str], Tensor] = lru_cache(None)(self._tokens)
        self.basis: Callable[[str, int], PcaBasis] = lru_cache(None)(self._basis)

    @cached_property
    def rows(self) -> list[int]:
        num_rows, seed = self._choice
        order = np.random.default_rng(seed).permutation(self.cache.num_samples)
        rows = self.cache.index.rows(order, 0)
        for name in self.teachers:
            rows = rows[self.cache.committed(name)[rows // self.cache.spec.rows_per_shard]]
        chosen: list[int] = []
        while len(chosen) < num_rows and rows.size and self.teachers:  # a few records, not all of them
            tried, rows = rows[: 2 * num_rows], rows[2 * num_rows :]
            readable = np.logical_and.reduce(
                [self.cache.shards[name].readable_rows(tried) for name in self.teachers]
            )
            chosen += tried[readable].tolist()
        return sorted(chosen[:num_rows])

    def _maps(self, teacher: str, row: int) -> Tensor:
        """Features (levels, H, W, C) of one row; the last few are kept."""
        maps_1SHWC = self.cache.feature_maps(teacher, np.array([row]))
        if self._window:
            maps_1SHWC = cut(maps_1SHWC, np.array([self._window]), self.cache.spec.views)
        return maps_1SHWC[0]

    def _tokens(self, teacher: str) -> Tensor:
        """(levels, N, C): at most `MAX_TOKENS` tokens, spread evenly over the chosen rows.

        Rows that turn out to be damaged are left out. Raises `CacheError` when no row is left.
        """
        height, width = self.cache.spec.teachers[teacher].stored_grid
        step = -(-len(self.rows) * height * width // MAX_TOKENS)
        parts = []
        damage = CacheError(f"Teacher {teacher} and the others have no readable row in common.")
        for row in self.rows:
            try:
                parts.append(self.maps(teacher, row).flatten(1, 2)[:, ::step])
            except CacheError as error:
                damage = error
        if not parts:
            raise damage
        return torch.cat(parts, 1)

    def _basis(self, teacher: str, level: int) -> PcaBasis:
        """The colours of one level of a teacher; their signs follow the level before."""
        tokens_SNC = self.tokens(teacher)
        before = level - 1
        like_N3 = self.basis(teacher, before).project(tokens_SNC[before]) if level else None
        return PcaBasis.fit(tokens_SNC[level], like_N3)

    def view(self, row: int, size: Size | None = None) -> Picture:
        """The pixels of a row's view, at its own size or another. Raises as `FeatureCache.image` does."""
        if size is None and self.cache.spec.images == "rendered":
            pixels_HW3 = self.cache.pixels(row)[0].permute(1, 2, 0).numpy()
            (top, left), (height, width) = self._window or (0, 0), self.cache.spec.views.size
            return pixels_HW3[top : top + height, left : left + width] if self._window else pixels_HW3
        sample, view = int(self.cache.index.locate(row)[0]), self.cache.view(row)
        if self._window:
            view = view.window(self._window, self.cache.spec.views.size)
        return render_view(self.cache.image(sample), view, size).permute(1, 2, 0).numpy()


def _why_absent(cache: FeatureCache, teacher: str) -> str | None:
    """Tries a few records: where none of them can be read, more than a shard is damaged."""
    reason = "no shard is committed yet"
    for shard in np.flatnonzero(cache.committed(teacher))[:_TRIED_RECORDS].tolist():
        try:
            cache.commits(teacher, [shard])
        except CacheError as error:
            reason = in_a_line(error)
        else:
            return None
    return reason
