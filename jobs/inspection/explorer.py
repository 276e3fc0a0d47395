"""What the page of `teachercache view` shows, as HTML. Knows nothing of the server.

Shapes: S levels, H×W grid, C channels.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from teachercache.jobs.inspection.feature_facts import cosine_error, try_codec
from teachercache.jobs.inspection.page import html
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs.fidelity import Fidelity
from teachercache.pipeline.errors import CacheError, TeacherCacheError, in_a_line
from teachercache.pipeline.exploring.feature_pictures import heat, jpeg_uri, png_uri
from teachercache.pipeline.exploring.map_reader import MapReader, level_name
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.units import human_bytes
from teachercache.student.models.student import Student

PAGE_SIZE = 12
_THUMBNAIL = (96, 96)
_THUMBNAIL_THREADS = 4
_KEPT_THUMBNAILS = 1024
_KEPT_ROWS = 4
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


class Drawing(NamedTuple):
    """A picture of a map, as a data URI. `low` and `high` are what its darkest and brightest colours mean."""

    uri: str
    low: str = ""
    high: str = ""
    note: str = ""


class Comparisons:
    """One map compared with another: a patch with all others, a student or a codec with its teacher. What was
    read, predicted and encoded last is kept, so that a click on a patch only multiplies.

    All methods raise `CacheError` where a teacher cannot give what is asked, `CodecError` if a codec cannot.
    """

    def __init__(self, cache: FeatureCache, student: Student | None = None) -> None:
        self.cache = cache
        self.reader = MapReader(cache, window=student is not None)
        self._student = student
        per_teacher = _KEPT_ROWS * len(cache.teachers)
        self._predictions = lru_cache(_KEPT_ROWS)(self._predict)
        self._trial = lru_cache(per_teacher)(self._try_codec)
        self._unit = lru_cache(per_teacher)(lambda *where: F.normalize(self._map(*where), dim=-1))

    def similarity(
        self, teacher: str, row: int, level: int, patch: Patch, other: int, of_other: bool
    ) -> Drawing:
        """Cosine of the patch of `row` at (x, y) to those of `row` or the other, in one range of colours."""
        unit_HWC = self._unit(teacher, row, level)
        height, width = unit_HWC.shape[:2]
        token_C = unit_HWC[int(patch[1] * height), int(patch[0] * width)]
        cosines = [unit_HWC @ token_C, self._unit(teacher, other, level) @ token_C]
        low = min(cosines_HW.min().item() for cosines_HW in cosines)
        return Drawing(png_uri(heat(cosines[of_other], low, 1)), f"{low:.2f}".replace("-", "−"), "1")

    def features(self, teacher: str, row: int, level: int, of_student: bool = False) -> Drawing:
        """Principal components of the teacher's map or the student's; one colour means one feature in all."""
        map_HWC = (self._prediction if of_student else self._map)(teacher, row, level)
        return Drawing(png_uri(self.reader.basis(teacher, level).picture(map_HWC)))

    def student_error(self, teacher: str, row: int, level: int) -> Drawing:
        """1 − cosine of the student's tokens to the teacher's."""
        error_HW = cosine_error(self._prediction(teacher, row, level), self._map(teacher, row, level))
        return _error(error_HW, f"mean {error_HW.mean():.2g}")

    def codec_error(self, teacher: str, row: int, level: int, codec: str) -> Drawing:
        """1 − cosine of what the codec gives back to what is stored."""
        self._map(teacher, row, level)
        fidelity, error_RSHW = self._trial(codec, teacher, row)
        return _error(error_RSHW[0, level], human_bytes(fidelity.row_bytes))

    def _map(self, teacher: str, row: int, level: int) -> Tensor:
        if reason := self.reader.absent.get(teacher):
            raise CacheError(reason)
        maps_SHWC = self.reader.maps(teacher, row)
        if level >= len(maps_SHWC):
            raise CacheError(f"this teacher has {len(maps_SHWC)} levels")
        return maps_SHWC[level]

    def _prediction(self, teacher: str, row: int, level: int) -> Tensor:
        """The student's map (H, W, C) on the grid of the teacher's."""
        height, width = self._map(teacher, row, level).shape[:2]
        level -= len(self.reader.maps(teacher, row))  # one with fewer levels is beside the other's last
        predictions = self._predictions(row)
        if teacher not in predictions:
            raise CacheError("the student was not distilled from this teacher")
        if -level > (count := len(predictions[teacher])):
            raise CacheError(f"the student has the last {count} of this teacher's levels alone")
        return upsample(predictions[teacher][level], (height, width))[0].permute(1, 2, 0)

    def _predict(self, row: int) -> dict[str, list[Tensor]]:
        assert self._student is not None
        pixels_HW3 = torch.from_numpy(self.reader.view(row, self._student.image_size))
        with torch.inference_mode():
            output = self._student(self._student.normalize(pixels_HW3.permute(2, 0, 1)[None]), full=True)
        return dict(output.feature_maps)

    def _try_codec(self, codec: str, teacher: str, row: int) -> tuple[Fidelity, Tensor]:
        others = [other for other in self.reader.rows if other != row]
        return try_codec(codec, self.reader, teacher, others or [row], [row])


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
        of how many, in words. Beyond the first or last page is that page."""
        keys = self.cache.samples["key"]
        matches = np.arange(len(keys))
        if text:
            matches = np.flatnonzero(pc.match_substring(keys, text, ignore_case=True))
        pages = max(1, -(-len(matches) // PAGE_SIZE))
        page = min(max(page, 0), pages - 1)
        samples = matches[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tolist()
        return samples, page, f"{page + 1:,} / {pages:,} · {len(matches):,} found"

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
        warnings = [f"not complete: {', '.join(short)}"] if short else []
        if count := len(summary["quarantined"]):
            warnings.append(f"{count:,} quarantined")
        if problems := summary["problems"]:
            warnings.append(f"{len(problems):,} broken: {problems[0]}{', …' if problems[1:] else ''}")
        return warnings

    def _columns(self, other: int, selection: Selection) -> list[_Column]:
        maps, codec, others = self._maps, selection.codec, (selection.patch, other)
        columns = [
            _Column("Features", "principal components", maps.features),
            _Column("In this image", "cosine to the patch", maps.similarity, (*others, False)),
            _Column("In the other image", "cosine to that patch", maps.similarity, (*others, True), True),
        ]
        if self._has_student:
            columns += [
                _Column("Student", "in the teacher's colours", maps.features, (True,)),
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


def _error(error_HW: Tensor, note: str) -> Drawing:
    high = max(error_HW.max().item(), 1e-12)
    return Drawing(png_uri(heat(error_HW, 0, high)), "0", f"{high:.2g}", note)
