"""`cache` and `cache[key]`, one sample, as a notebook shows them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from html import escape
from typing import TYPE_CHECKING

from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.errors import TeacherCacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import jpeg_uri, png_uri
from teachercache.pipeline.exploring.map_reader import MapReader, level_name
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.stores.shard_format import disk_nbytes
from teachercache.pipeline.units import human_bytes

if TYPE_CHECKING:
    from teachercache import FeatureCache

_STYLE = "width:110px;height:110px;image-rendering:pixelated;display:block"


@lru_cache(2)
def _reader(cache: FeatureCache) -> MapReader:
    """Learns colours once for all samples of a cache that are shown."""
    return MapReader(cache)


class SampleView:
    """A sample of a cache: its rows, pixels and features.

    sample = cache["n01440764/n01440764_10026"]
    sample.features("dinov2", view=0)                  (levels, H, W, C) float32
    """

    def __init__(self, cache: FeatureCache, sample_index: int) -> None:
        self.cache = cache
        self.sample_index = sample_index

    @property
    def key(self) -> str:
        return self.cache.key(self.sample_index)

    def row(self, view: int = 0) -> int:
        """Raises `IndexError` for a view that the cache does not hold."""
        return int(self.cache.index.rows(self.sample_index, view))

    def pixels(self, view: int = 0) -> NDArray:
        """The rendered view, uint8 (H, W, 3)."""
        return _reader(self.cache).view(self.row(view))

    def features(self, teacher: str, view: int = 0) -> Tensor:
        """(levels, H, W, C) float32. Raises as `FeatureCache.read` does."""
        return _reader(self.cache).maps(teacher, self.row(view))

    def __repr__(self) -> str:
        return f"SampleView({self.key!r}, number {self.sample_index} of {self.cache.storage.url})"

    def _repr_html_(self) -> str:
        """The first view, and the principal components of every teacher's levels."""
        lines = [_line("view", [_cell(lambda: jpeg_uri(self.pixels()), f"row {self.row()}")])]
        for name in self.cache.teachers:
            spec = self.cache.spec.teachers[name]
            cells = [
                _cell(partial(self._picture, name, level), level_name(spec, level))
                for level in range(spec.num_levels)
            ]
            lines.append(_line(_titled(name, spec), cells))
        caption = f"{escape(self.key)}: first three principal components, in the same colours for every image"
        return f"<table><caption style='text-align:left'>{caption}</caption>{''.join(lines)}</table>"

    def _picture(self, teacher: str, level: int) -> str:
        reader = _reader(self.cache)
        return png_uri(reader.basis(teacher, level).picture(reader.maps(teacher, self.row())[level]))


def cache_table(cache: FeatureCache) -> str:
    """HTML: a line for each teacher, with the bytes of a view and of all, and its committed shards."""
    columns = ("teacher", "levels", "grid", "channels", "codec", "a view", "all views", "committed")
    lines = [columns]
    for name, spec in cache.spec.teachers.items():
        nbytes = disk_nbytes(cache.layouts(name).values())
        shape = str(spec.num_levels), "×".join(map(str, spec.stored_grid)), f"{spec.width:,}"
        stored = spec.codec, human_bytes(nbytes), human_bytes(nbytes * cache.num_rows)
        done = f"{cache.committed(name).sum():,} of {cache.spec.num_shards:,} shards"
        lines.append((_titled(name, spec), *shape, *stored, done))
    counts = f"{len(cache):,} samples, {cache.num_views} views, {cache.num_rows:,} rows"
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><caption>{escape(cache.storage.url)}: {counts}</caption>{cells}</table>"


def _titled(name: str, spec: TeacherSpec) -> str:
    return name if spec.pretrained else f"{name} (random weights)"


def _line(title: str, cells: list[str]) -> str:
    return f"<tr><th style='text-align:left'>{escape(title)}</th>{''.join(cells)}</tr>"


def _cell(uri: Callable[[], str], title: str) -> str:
    try:
        shown = f"<img style='{_STYLE}' alt='{escape(title)}' src='{uri()}'>"
    except (TeacherCacheError, OSError) as error:
        shown = escape(in_a_line(error))
    return f"<td style='text-align:left;vertical-align:top'>{shown}{escape(title)}</td>"
