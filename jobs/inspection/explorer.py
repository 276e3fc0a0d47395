"""What the page of `teachercache view` shows, as HTML. Knows nothing of the server."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

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
_KEPT_DRAWINGS = 256
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


class _Column(NamedTuple):
    """One kind of map, drawn of a teacher, row, level and the `rest`. `of_other`: it shows the other image,
    where a click chooses no patch."""

    title: str
    words: str
    draw: Callable[..., Drawing]
    rest: tuple[Any, ...] = ()
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
        self._view = lru_cache(_KEPT_VIEWS)(lambda row: Drawing(jpeg_uri(self._maps.reader.view(row))))
        self._drawn = lru_cache(_KEPT_DRAWINGS)(lambda draw, *what: draw(*what))

    def first(self) -> Selection:
        """Two samples that can be shown, where there are, and the middle token of the first teacher."""
        rows = self._maps.reader.rows
        samples = self.cache.index.locate(rows)[0].tolist() if rows else [0]
        height, width = next((spec.stored_grid for spec in self.cache.spec.teachers.values()), (1, 1))
        patch = (width // 2 + 0.5) / width, (height // 2 + 0.5) / height
        chosen = samples[0], samples[-1], tuple(self.cache.teachers)
        return Selection(*chosen, patch, level=self.num_levels - 1)

    def search(self, text: str, page: int) -> tuple[list[int], int, str]:
        """A page of the samples whose key holds `text`, in the cache's order; which page it is, from 0, and
        of how many, in words. Beyond the last page is the last page."""
        keys = self.cache.samples["key"]
        found = np.arange(len(keys))
        if text:
            found = np.flatnonzero(pc.match_substring(keys, text, ignore_case=True))
        pages = max(1, -(-len(found) // PAGE_SIZE))
        page = min(page, pages - 1)
        samples = found[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tolist()
        return samples, page, f"{page + 1:,} / {pages:,} · {len(found):,} found"

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
        columns = self._columns(other, selection)
        lines = []
        for name in selection.teachers:
            maps = [self._map(column, name, row, selection) for column in columns]
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

    def _columns(self, other: int, selection: Selection) -> list[_Column]:
        maps, codec, others = self._maps, selection.codec, (selection.patch, other)
        columns = [
            _Column("Features", "principal components", maps.features),
            _Column("In this image", "cosine to the patch", maps.similarity, (*others, False)),
            _Column("In the other image", "cosine to that patch", maps.similarity, (*others, True), True),
        ]
        if self._has_student:
            columns += [
                _Column("Student", "in the teacher's colours", maps.student_features),
                _Column("Student's error", "1 − cosine to the teacher", maps.student_error),
            ]
        if codec is not None:
            columns.append(_Column(codec, "its error, 1 − cosine", maps.codec_error, (codec,)))
        return columns

    def _map(self, column: _Column, teacher: str, row: int, selection: Selection) -> str:
        patch = None if column.of_other else selection.patch
        what = column.draw, teacher, row, selection.level, *column.rest
        return _cell(column.title, column.words, lambda: self._drawn(*what), patch, "map")

    def _photo(self, row: int, title: str, patch: Patch | None = None) -> str:
        key = self.cache.key(int(self.cache.index.locate(row)[0]))
        return _cell(title, key, lambda: self._view(row), patch)

    def _make_thumbnail(self, sample: int) -> str | None:
        try:
            image = self.cache.image(sample)
        except (TeacherCacheError, OSError):
            return None
        image.thumbnail(_THUMBNAIL, Image.Resampling.BILINEAR)
        return jpeg_uri(np.asarray(image), 75)


def _cell(title: str, words: str, draw: Callable[[], Drawing], patch: Patch | None, kind: str = "") -> str:
    """A picture; where it cannot be had, the cell holds the reason."""
    try:
        return html.cell(title, words, draw(), patch, kind)
    except (TeacherCacheError, OSError) as error:
        return html.cell(title, words, missing=in_a_line(error))
