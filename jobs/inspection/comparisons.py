"""One map compared with another: a patch with all others, a student or a codec with its teacher.

What was read, predicted and encoded last is kept, so that a click on a patch only multiplies.
Shapes: S levels, H×W grid, C channels.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from teachercache.jobs.inspection.feature_facts import cosine_error, try_codec
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs.fidelity import Fidelity
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.exploring.feature_pictures import heat, png_uri
from teachercache.pipeline.exploring.map_reader import MapReader
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.units import human_bytes
from teachercache.student.models.student import Student

_KEPT_ROWS = 4


class Drawing(NamedTuple):
    """A picture of a map, as a data URI. `low` and `high` are what its darkest and brightest colours mean."""

    uri: str
    low: str = ""
    high: str = ""
    note: str = ""


class Comparisons:
    """All methods raise `CacheError` where a teacher cannot give what is asked, or `CodecError` if a codec
    cannot."""

    def __init__(self, cache: FeatureCache, student: Student | None = None) -> None:
        self.cache = cache
        self.reader = MapReader(cache, window=student is not None)
        self._student = student
        per_teacher = _KEPT_ROWS * len(cache.teachers)
        self._predictions = lru_cache(_KEPT_ROWS)(self._predict)
        self._trial = lru_cache(per_teacher)(self._try_codec)
        self._unit = lru_cache(per_teacher)(lambda *where: F.normalize(self._map(*where), dim=-1))

    def similarity(
        self, teacher: str, row: int, level: int, patch: tuple[float, float], other: int, of_other: bool
    ) -> Drawing:
        """Cosine of the patch of `row` at (x, y) to those of `row`, or to those of the other row.

        Both have one range of colours.
        """
        unit_HWC = self._unit(teacher, row, level)
        height, width = unit_HWC.shape[:2]
        token_C = unit_HWC[int(patch[1] * height), int(patch[0] * width)]
        cosines = [unit_HWC @ token_C, self._unit(teacher, other, level) @ token_C]
        low = min(cosines_HW.min().item() for cosines_HW in cosines)
        return Drawing(png_uri(heat(cosines[of_other], low, 1)), f"{low:.2f}".replace("-", "−"), "1")

    def features(self, teacher: str, row: int, level: int) -> Drawing:
        """Principal components, in colours that are the same for all images."""
        map_HWC = self._map(teacher, row, level)
        return Drawing(png_uri(self.reader.basis(teacher, level).picture(map_HWC)))

    def student_features(self, teacher: str, row: int, level: int) -> Drawing:
        prediction_HWC = self._prediction(teacher, row, level)
        return Drawing(png_uri(self.reader.basis(teacher, level).picture(prediction_HWC)))

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
        level -= len(self.reader.maps(teacher, row))  # whose levels are fewer stands beside the other's last
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


def _error(error_HW: Tensor, note: str) -> Drawing:
    high = max(error_HW.max().item(), 1e-12)
    return Drawing(png_uri(heat(error_HW, 0, high)), "0", f"{high:.2g}", note)
