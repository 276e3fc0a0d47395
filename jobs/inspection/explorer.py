"""What the page of `teachercache view` shows, as HTML. Knows nothing of the server."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from teachercache.jobs.inspection.comparisons import Comparisons, Drawing
from teachercache.jobs.inspection.page import html
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, TeacherCacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import jpeg_uri
from teachercache.pipeline.exploring.map_reader import level_name
from teachercache.student.models.student import Student

PAGE_SIZE = 12
_THUMBNAIL = (96, 96)
_THUMBNAIL_THREADS = 4
_KEPT_THUMBNAILS = 1024
_KEPT_VIEWS = 32
Patch = tuple[float, float]


@dataclass(frozen=True)
class Selection:
    """What is looked at, of which teachers. `patch` is a place (x, y) in the view, both in [0, 1)."""

    sample: int
    other: int
    teachers: tuple[str, ...]
    patch: Patch
    view: int = 0
    level: int = 0
    codec: str | None = None


class Hits(NamedTuple):
    """One page of the samples that a search found; `total` of all pages. Pages count from 0."""

    samples: list[int]
    page: int
    total: int

    @property
    def num_pages(self) -> int:
        return max(1, -(-self.total // PAGE_SIZE))


class _Column(NamedTuple):
    """One kind of map. `of_other`: it shows the other image, where a click chooses no patch."""

    title: str
    words: str
    draw: Callable[[str], Drawing]
    of_other: bool = False


class Explorer:
    """Raises `CacheError` for a cache whose samples or views cannot be read."""

    def __init__(self, cache: FeatureCache, student: Student | None = None) -> None:
        self.cache = cache
        self.samples, self.views = cache.samples, cache.views
        self.num_levels = max((teacher.num_levels for teacher in cache.spec.teachers.values()), default=1)
        self._maps = Comparisons(cache, student)
        self._has_student = student is not None
        self._threads = ThreadPoolExecutor(_THUMBNAIL_THREADS, thread_name_prefix="thumbnail")
        self._thumbnail = lru_cache(_KEPT_THUMBNAILS)(self._make_thumbnail)
        self._view = lru_cache(_KEPT_VIEWS)(lambda row: jpeg_uri(self._maps.reader.view(row)))

    def first(self) -> Selection:
        """Two samples that can be shown, where there are, and the middle token of the first teacher."""
        rows = self._maps.reader.rows
        samples = self.cache.index.locate(rows)[0].tolist() if rows else [0]
        height, width = next((spec.stored_grid for spec in self.cache.spec.teachers.values()), (1, 1))
        patch = (width // 2 + 0.5) / width, (height // 2 + 0.5) / height
        chosen = samples[0], samples[-1], tuple(self.cache.teachers)
        return Selection(*chosen, patch, level=self.num_levels - 1)

    def search(self, text: str, page: int) -> Hits:
        """Samples whose key holds `text`, in the cache's order. Beyond the last page is the last page."""
        keys = self.cache.samples["key"]
        found = np.arange(len(keys))
        if text:
            found = np.flatnonzero(pc.match_substring(keys, text, ignore_case=True))
        page = min(page, max(0, (len(found) - 1) // PAGE_SIZE))
        return Hits(found[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tolist(), page, len(found))

    def strip(self, samples: Sequence[int], selection: Selection) -> str:
        """Thumbnails to choose from."""
        role = {selection.other: "other", selection.sample: "this"}
        thumbnails = self._threads.map(self._thumbnail, samples)
        tiles = (
            (sample, self.cache.key(sample), role.get(sample, ""), uri)
            for sample, uri in zip(samples, thumbnails, strict=True)
        )
        return str(html.strip(list(tiles)))

    def board(self, selection: Selection) -> str:
        """Both images, and a line of maps for each chosen teacher. `CacheError`: the view is not held."""
        try:
            row, other = self.cache.index.rows([selection.sample, selection.other], selection.view).tolist()
        except IndexError:
            raise CacheError("The cache does not hold this view of both images.") from None
        columns = self._columns(row, other, selection)
        lines = []
        for name in selection.teachers:
            maps = [_map(column, name, None if column.of_other else selection.patch) for column in columns]
            lines.append((name, self._words(name, selection.level), maps))
        photos = [
            self._photo(row, "The image (click a patch)", selection.patch),
            self._photo(other, "The other image"),
        ]
        return str(html.board(photos, lines, len(columns)))

    def _words(self, teacher: str, level: int) -> str:
        spec = self.cache.spec.teachers[teacher]
        words = [level_name(spec, level)] if level < spec.num_levels else []
        return ", ".join(words if spec.pretrained else [*words, "random weights"])

    @cached_property
    def state(self) -> list[str]:
        """What is missing, quarantined or broken. Reads every commit record, once."""
        try:
            summary = summarize(self.cache.storage)
        except (TeacherCacheError, OSError) as error:
            return [in_a_line(error)]
        shards, committed = summary["shards"], summary["committed"]
        short = [
            f"{name} {committed[name]:,} of {shards:,} shards"
            for name in self.cache.teachers
            if committed[name] < shards
        ]
        found = [f"not complete: {', '.join(short)}"] if short else []
        if count := len(summary["quarantined"]):
            found.append(f"{count:,} quarantined")
        if problems := summary["problems"]:
            found.append(f"{len(problems):,} broken: {problems[0]}{', …' if problems[1:] else ''}")
        return found

    def _columns(self, row: int, other: int, selection: Selection) -> list[_Column]:
        maps, level, patch, codec = self._maps, selection.level, selection.patch, selection.codec
        similarity = cache(lambda name: maps.similarity(name, row, level, patch, other))
        columns = [
            _Column("Features", "principal components", lambda name: maps.features(name, row, level)),
            _Column("In this image", "cosine to the patch", lambda name: similarity(name)[0]),
            _Column("In the other image", "cosine to that patch", lambda name: similarity(name)[1], True),
        ]
        if self._has_student:
            features, error = maps.student_features, maps.student_error
            columns += [
                _Column("Student", "in the teacher's colours", lambda name: features(name, row, level)),
                _Column("Student's error", "1 − cosine to the teacher", lambda name: error(name, row, level)),
            ]
        if codec is not None:
            of_codec = maps.codec_error
            columns.append(
                _Column(codec, "its error, 1 − cosine", lambda name: of_codec(name, row, level, codec))
            )
        return columns

    def _photo(self, row: int, title: str, patch: Patch | None = None) -> str:
        key = self.cache.key(int(self.cache.index.locate(row)[0]))
        try:
            return html.cell(title, key, Drawing(self._view(row)), patch)
        except (TeacherCacheError, OSError) as error:
            return html.cell(title, key, missing=in_a_line(error))

    def _make_thumbnail(self, sample: int) -> str | None:
        try:
            image = self.cache.image(sample)
        except (TeacherCacheError, OSError):
            return None
        image.thumbnail(_THUMBNAIL, Image.Resampling.BILINEAR)
        return jpeg_uri(np.asarray(image), 75)


def _map(column: _Column, teacher: str, patch: Patch | None) -> str:
    """A cell; where the map cannot be had, it holds the reason."""
    try:
        return html.cell(column.title, column.words, column.draw(teacher), patch, "map")
    except (TeacherCacheError, OSError) as error:
        return html.cell(column.title, column.words, missing=in_a_line(error))
