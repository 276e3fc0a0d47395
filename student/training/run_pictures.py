"""What student and teachers see of the same few images while a run goes on, as pictures for TensorBoard."""

import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
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


@dataclass
class _Kind:
    """One kind of map of one level of a teacher: how it is drawn, its title, and the teacher's own pictures.

    `words`: what there is to say of several maps (B, H, W, C) below their title.
    """

    title: str
    draw: Callable[[Tensor], Picture]
    words: Callable[[Tensor], str]
    maps_BHWC: InitVar[Tensor]

    def __post_init__(self, maps_BHWC: Tensor) -> None:
        self.teacher = self.column("teacher", maps_BHWC)

    def column(self, whose: str, maps_BHWC: Tensor) -> tuple[str, list[Picture]]:
        title = "\n".join(filter(None, (whose, self.title, self.words(maps_BHWC))))
        return title, [self.draw(map_HWC) for map_HWC in maps_BHWC]


class RunPictures:
    """Principal components and token norms of up to `NUM_ROWS` rows of the cache, which stay the same.

    Colours are learnt from the teachers once, so that the student's maps can be compared with theirs and
    with its own of earlier steps. The cache is read when pictures are drawn for the first time.
    """

    def __init__(self, cache: FeatureCache, teachers: Sequence[str], student: Student) -> None:
        self._cache, self._teachers, self._student = cache, teachers, student
        self._views: list[Picture] = []
        self._kinds: dict[str, list[tuple[_Kind, _Kind]]] = {}

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
            self._kinds = {name: _kinds(reader, name) for name in self._teachers}
            self._views = [reader.view(row) for row in reader.rows]
        images_B3HW = torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in self._views])
        with self._student.evaluating():
            pixels_B3HW = self._student.normalize(images_B3HW.to(self._student.mean.device))
            maps = self._student(pixels_B3HW, full=True).feature_maps
        boards = {}
        for name, kinds in self._kinds.items():
            count = min(len(kinds), len(maps[name]))  # whose levels are fewer stands beside the other's last
            maps_SBHWC = [level_BCHW.permute(0, 2, 3, 1).float().cpu() for level_BCHW in maps[name][-count:]]
            features, norms = zip(*kinds[-count:], strict=True)
            weights = "" if self._cache.spec.teachers[name].pretrained else " (random weights)"
            boards[f"maps/{name}"] = Board(
                f"{name}{weights}: first three principal components of the teacher's features, and the "
                "student's in the same colours",
                self._columns(features, maps_SBHWC),
            )
            boards[f"norms/{name}"] = Board(
                f"{name}{weights}: norms of tokens, dark to bright from the teacher's least to its greatest; "
                "above each column its own least and greatest",
                self._columns(norms, maps_SBHWC),
            )
        return boards

    def _columns(
        self, kinds: Sequence[_Kind], maps_SBHWC: Sequence[Tensor]
    ) -> list[tuple[str, list[Picture]]]:
        columns = [("view", self._views)]
        for kind, maps_BHWC in zip(kinds, maps_SBHWC, strict=True):
            columns += [kind.teacher, kind.column("student", maps_BHWC)]
        return columns


def _kinds(reader: MapReader, teacher: str) -> list[tuple[_Kind, _Kind]]:
    """(features, norms) of each level."""
    found = []
    spec = reader.cache.spec.teachers[teacher]
    for level in range(spec.num_levels):
        maps_BHWC = torch.stack([reader.maps(teacher, row)[level] for row in reader.rows])
        low, high = _norm_range(maps_BHWC)

        def norm_picture(map_HWC: Tensor, low: float = low, high: float = high) -> Picture:
            return heat(token_norms(map_HWC), low, high)

        def norm_words(maps_BHWC: Tensor) -> str:
            return range_words(*_norm_range(maps_BHWC))

        title = level_name(spec, level)
        features = _Kind(title, reader.basis(teacher, level).picture, lambda _: "", maps_BHWC)
        found.append((features, _Kind(title, norm_picture, norm_words, maps_BHWC)))
    return found


def _norm_range(maps_BHWC: Tensor) -> tuple[float, float]:
    """Of the tokens whose norms are finite."""
    norms_BHW = token_norms(maps_BHWC)
    norms_N = norms_BHW[norms_BHW.isfinite()]
    return (norms_N.min().item(), norms_N.max().item()) if norms_N.numel() else (math.nan, math.nan)
