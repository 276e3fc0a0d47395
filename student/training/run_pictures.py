"""What student and teachers see of the same few images while a run goes on, as pictures for TensorBoard."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.exploring.feature_pictures import (
    Picture,
    figure_pixels,
    heat,
    picture_grid,
    range_words,
    token_norms,
)
from teachercache.pipeline.exploring.map_reader import MapReader, level_name
from teachercache.student.models.student import Student

NUM_ROWS = 4


class Board(NamedTuple):
    """Columns of pictures, each with a title, one line a row of the cache."""

    title: str
    columns: list[tuple[str, list[Picture]]]


_TITLES = {
    "maps": "first three principal components of the teacher's features, the student's in the same colours",
    "norms": "norms of tokens, dark to bright from the teacher's least to its greatest; above each column "
    "its own least and greatest",
}
_Column = tuple[str, list[Picture]]
_Draw = Callable[[str, Tensor], _Column]  # whose maps (B, H, W, C) of a level they are → a column of pictures


class RunPictures:
    """Principal components and token norms of up to `NUM_ROWS` rows of the cache, which stay the same.

    Colours are learnt from the teachers once, so that the student's maps can be compared with theirs and
    with its own of earlier steps. The cache is read when pictures are drawn for the first time.
    """

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], student: Student) -> None:
        self._cache, self._teachers, self._student = cache, teachers, student
        self._views: list[Picture] = []
        self._levels: dict[str, dict[str, list[tuple[_Column, _Draw]]]] = {}  # by teacher and kind of picture

    def draw(self) -> dict[str, NDArray]:
        """Pictures (1, H, W, 3) uint8 by tag; see `boards`."""
        return {
            tag: figure_pixels(picture_grid(board.columns, board.title))[None]
            for tag, board in self.boards().items()
        }

    def boards(self) -> dict[str, Board]:
        """Draws no random number, and leaves the student as it was.

        Raises as `FeatureCache.read` does where the rows cannot be read.
        """
        if not self._teachers:
            return {}
        if not self._views:
            reader = MapReader(self._cache, self._teachers, num_rows=NUM_ROWS, window=True)
            self._levels = {name: _levels(reader, name) for name in self._teachers}
            self._views = [reader.view(row) for row in reader.rows]
        images_B3HW = torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in self._views])
        with self._student.evaluating():
            pixels_B3HW = self._student.normalize(images_B3HW.to(self._student.mean.device))
            maps = self._student(pixels_B3HW, full=True).feature_maps
        boards = {}
        for name, kinds in self._levels.items():
            weights = "" if self._cache.spec.teachers[name].pretrained else " (random weights)"
            for kind, levels in kinds.items():
                columns: list[_Column] = [("view", self._views)]
                count = min(
                    len(levels), len(maps[name])
                )  # whose levels are fewer stands beside the last ones
                for (teacher, draw), level_BCHW in zip(levels[-count:], maps[name][-count:], strict=True):
                    columns += [teacher, draw("student", level_BCHW.permute(0, 2, 3, 1).float().cpu())]
                boards[f"{kind}/{name}"] = Board(f"{name}{weights}: {_TITLES[kind]}", columns)
        return boards


def _levels(reader: MapReader, teacher: str) -> dict[str, list[tuple[_Column, _Draw]]]:
    """By kind of picture, for each level the teacher's own column, and how others are drawn beside it."""
    found: dict[str, list[tuple[_Column, _Draw]]] = {kind: [] for kind in _TITLES}
    spec = reader.cache.spec.teachers[teacher]
    for level in range(spec.num_levels):
        maps_BHWC = torch.stack([reader.maps(teacher, row)[level] for row in reader.rows])
        title = level_name(spec, level)
        draws = {
            "maps": partial(_column, title, reader.basis(teacher, level).picture),
            "norms": partial(_norm_column, title, *_norm_range(maps_BHWC)),
        }
        for kind, draw in draws.items():
            found[kind].append((draw("teacher", maps_BHWC), draw))
    return found


def _column(title: str, draw: Callable[[Tensor], Picture], whose: str, maps_BHWC: Tensor) -> _Column:
    return f"{whose}\n{title}", [draw(map_HWC) for map_HWC in maps_BHWC]


def _norm_column(title: str, low: float, high: float, whose: str, maps_BHWC: Tensor) -> _Column:
    title = f"{title}\n{range_words(*_norm_range(maps_BHWC))}"
    return _column(title, lambda map_HWC: heat(token_norms(map_HWC), low, high), whose, maps_BHWC)


def _norm_range(maps_BHWC: Tensor) -> tuple[float, float]:
    """Of the tokens whose norms are finite."""
    norms_BHW = token_norms(maps_BHWC)
    norms_N = norms_BHW[norms_BHW.isfinite()]
    return (norms_N.min().item(), norms_N.max().item()) if norms_N.numel() else (math.nan, math.nan)
