"""Views: one deterministic crop, flip and jitter of a sample, drawn once and replayed everywhere.

A `View` is drawn from a counter-based generator keyed by (seed, sample_key, view_index), so any
machine can draw any view in any order. What was drawn is stored in `views.parquet`; the stored
parameters, not the seed, are the truth, and `render_view` is the one function that turns them into
pixels, for the teacher (at its input size) and for the student (at the view's own size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional as F

from teachercache.pipeline.crops import PIXEL_TOLERANCE, draw_crops
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.records.limits import MAX_SIDE
from teachercache.pipeline.records.spec import Segment
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.tables import VIEW_SCHEMA
from teachercache.pipeline.records.view_policy import Photometric, ViewPolicy

_BLOCK_SAMPLES = 1 << 16
_MAX_PIXEL, _MIN_PIXELS, _MAX_FACTOR = 1e7, 1e-3, 1e3  # what a view table may ask for

PADDING = (124, 116, 104)
"""The colour outside the image: ImageNet's mean, which normalisation takes to about zero."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """One view of one sample.

    `box` is (left, top, right, bottom) in pixels of the decoded source image, EXIF orientation
    applied; what it holds outside the image is padding. `size` is (height, width) in pixels of the student.
    1 keeps brightness, contrast and saturation, 0 keeps the hue. As "color_jitter" they are torchvision's
    factors, whose contrast keeps the image's mean. As "distortion" they are those of the multi-task
    community's PhotoMetricDistortion: brightness adds 128 · (brightness - 1), contrast multiplies pixels, so
    that the mean moves too, and saturation multiplies that of HSV.
    """

    box: tuple[float, float, float, float]
    flip: bool
    size: Size
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    photometric: Photometric = "color_jitter"

    @property
    def crop(self) -> tuple[float, ...]:
        """left, top, right, bottom in source pixels, and 1 where the view is mirrored."""
        return (*self.box, float(self.flip))

    @property
    def magnification(self) -> float:
        """Pixels of the student's input per source pixel, the geometric mean of both axes."""
        left, top, right, bottom = self.box
        return float(np.sqrt(self.size[0] / (bottom - top) * self.size[1] / (right - left)))

    def window(self, place: Sequence[int], size: Size) -> View:
        """The part of this view, `size` pixels large, that begins at `place` (row, column) of its pixels."""
        if size == self.size:
            return self
        (top, first), (height, width) = place, size
        first = self.size[1] - first - width if self.flip else first
        left, upper, right, lower = self.box
        across, down = (right - left) / self.size[1], (lower - upper) / self.size[0]
        x, y = left + first * across, upper + top * down
        return replace(self, box=(x, y, x + width * across, y + height * down), size=size)

    def jittered(self, brightness: float, contrast: float, saturation: float, hue: float) -> View:
        """This view with more jitter than its own: factors multiply, hues add up."""
        return replace(
            self,
            brightness=self.brightness * brightness,
            contrast=self.contrast * contrast,
            saturation=self.saturation * saturation,
            hue=(self.hue + hue + 0.5) % 1 - 0.5,
        )


def render_view(
    image: Image.Image, view: View, size: Size | None = None, out: Tensor | None = None
) -> Tensor:
    """The pixels of a view: uint8 (3, height, width), at `size` or else at the view's own size; in `out`,
    contiguous and on the CPU, where one is given.

    Pillow's bicubic filter with antialiasing, straight from the source pixels; its 8-bit arithmetic
    is integer, so the same Pillow version gives the same bits on every machine. Pixels that do not lie
    in the image as a whole are `PADDING`, whatever the jitter.

    Raises `CacheError` for a view that nobody drew.
    """
    height, width = size or view.size
    factors = view.brightness, view.contrast, view.saturation
    sound = all(1 <= side <= MAX_SIDE for side in (height, width))
    if not (sound and all(0 <= factor <= _MAX_FACTOR for factor in factors) and abs(view.hue) <= 0.5):
        raise _impossible(view)
    left, top, right, bottom = view.box
    columns, rows = _seen(left, right, image.width, width), _seen(top, bottom, image.height, height)
    pixels = torch.empty(3, height, width, dtype=torch.uint8) if out is None else out
    # Decoding threads call no operation of PyTorch's, which would start threads of its own.
    planes = pixels.numpy()
    if columns.pixels < 1 or rows.pixels < 1:
        planes[:] = np.array(PADDING)[:, None, None]
        return pixels
    box = columns.start, rows.start, columns.end, rows.end
    crop = image.resize((columns.pixels, rows.pixels), Image.Resampling.BICUBIC, box=box)
    crop = (_distorted if view.photometric == "distortion" else _jittered)(crop, view)
    if crop.size != (width, height):
        canvas = Image.new("RGB", (width, height), PADDING)
        canvas.paste(crop, (columns.first, rows.first))
        crop = canvas
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for plane, band in zip(planes, crop.split(), strict=True):
        plane[:] = np.asarray(band)
    return pixels


def enlarge_and_pad(pixels_B3HW: Tensor, size: Size) -> Tensor:
    """Normalised pixels, bicubically enlarged until they touch `size`, zeros on the right or below: how SAK's
    authors feed SAM (the paper, B.1, says "pad and resize")."""
    height, width = size
    scale = min(height / pixels_B3HW.shape[2], width / pixels_B3HW.shape[3])
    fitted = (int(pixels_B3HW.shape[2] * scale + 0.5), int(pixels_B3HW.shape[3] * scale + 0.5))
    pixels_B3HW = interpolate(pixels_B3HW, size=fitted, mode="bicubic", align_corners=False)
    return pad(pixels_B3HW, (0, width - fitted[1], 0, height - fitted[0]))


def _jittered(image: Image.Image, view: View) -> Image.Image:
    steps = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation
    for adjust, factor in zip(steps, (view.brightness, view.contrast, view.saturation), strict=True):
        image = adjust(image, factor) if factor != 1 else image
    return F.adjust_hue(image, view.hue) if view.hue != 0 else image


def _distorted(image: Image.Image, view: View) -> Image.Image:
    if view.brightness != 1:
        image = _mapped(image, 1, 128 * (view.brightness - 1))
    if view.contrast != 1:
        image = _mapped(image, view.contrast)
    if view.saturation != 1:
        hue, saturation, value = image.convert("HSV").split()
        image = Image.merge("HSV", (hue, _mapped(saturation, view.saturation), value)).convert("RGB")
    if view.hue != 0:
        image = F.adjust_hue(image, view.hue)
    return image


def _mapped(image: Image.Image, factor: float, offset: float = 0) -> Image.Image:
    """factor · value + offset in every channel, clipped and cut to whole numbers."""
    levels = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    return image.point(levels.tolist() * len(image.getbands()))


def source_pixels(view: View, image_size: Size, size: Size | None = None) -> tuple[Indices, Indices]:
    """The source row of every rendered row, and the source column of every column; -1 where it is padding.

    The pixel in which the rendered pixel's centre lies, so `labels[rows][:, columns]` are labels of
    `render_view`'s pixels by nearest neighbour. `image_size` is (height, width) of the source.
    """
    height, width = size or view.size
    left, top, right, bottom = view.box
    rows = _nearest(top, bottom, image_size[0], height)
    columns = _nearest(left, right, image_size[1], width)
    return rows, columns[::-1] if view.flip else columns


def _impossible(got: object) -> CacheError:
    """Views come from files we read."""
    return CacheError(
        "A view cannot be rendered.",
        got=got,
        expected="a box with an area, a size in pixels and factors, all finite, as the build drew them",
        do="run `teachercache repair` on the cache; it draws the view table again",
    )


class _Seen(NamedTuple):
    """`pixels` rendered pixels from `first` on show the source from `start` to `end`."""

    first: int
    pixels: int
    start: float
    end: float


def _seen(low: float, high: float, source: int, rendered: int) -> _Seen:
    """Along one axis: which rendered pixels lie in an image `source` pixels long, and what they show."""
    if not (abs(low) <= _MAX_PIXEL and abs(high) <= _MAX_PIXEL and high - low >= _MIN_PIXELS):
        raise _impossible((low, high))
    step = (high - low) / rendered
    first = max(0, math.ceil(-low / step - PIXEL_TOLERANCE))
    last = min(rendered, math.floor((source - low) / step + PIXEL_TOLERANCE))
    start = low + first * step if first else low
    end = low + last * step if last < rendered else high
    return _Seen(first, last - first, max(0.0, start), min(float(source), end))


def _nearest(low: float, high: float, source: int, rendered: int) -> Indices:
    seen = _seen(low, high, source, rendered)
    centres = low + (np.arange(rendered) + 0.5) * (high - low) / rendered
    indices = np.clip(np.floor(centres), 0, source - 1).astype(np.int64)
    indices[: seen.first] = -1
    indices[max(seen.first + seen.pixels, 0) :] = -1
    return indices


def draw_view(policy: ViewPolicy, sample_key: str, width: int, height: int, view_index: int) -> View:
    """The view that `draw_views` gives for this sample: for looking at a policy, not for reading a cache."""
    sides, views = (np.array([width]), np.array([height])), (view_index, view_index + 1)
    return ViewTable(draw_views(policy, [sample_key], *sides, views), policy.photometric).view(0)


def draw_views(
    policy: ViewPolicy,
    sample_keys: Sequence[str],
    widths: NDArray[np.integer],
    heights: NDArray[np.integer],
    views: tuple[int, int],
    first_sample: int = 0,
) -> pa.Table:
    """Views [views[0], views[1]) of every sample, samples-major, as a table of `VIEW_SCHEMA`.

    A sample of unknown size (0 × 0: its header could not be read) gets an empty box.
    """
    blocks, numbers = [], np.arange(*views)
    for start in range(0, len(sample_keys), _BLOCK_SAMPLES):
        keys = sample_keys[start : start + _BLOCK_SAMPLES]
        w, h = (np.asarray(side[start : start + len(keys)], np.float64) for side in (widths, heights))
        box, flip, jitter = draw_crops(policy, keys, w, h, numbers)
        first, count = first_sample + start, flip.size
        columns = [
            np.repeat(np.arange(first, first + len(keys)), len(numbers)),
            np.tile(numbers.astype(np.int32), len(keys)),
            *(side.astype(np.float32).ravel() for side in box),
            flip.ravel(),
            *(factor.astype(np.float32).ravel() for factor in jitter),
            *(np.full(count, side, np.int32) for side in policy.stored_size),
        ]
        arrays = [pa.array(column) for column in columns]
        blocks.append(pa.RecordBatch.from_arrays(arrays, schema=VIEW_SCHEMA))
    return pa.Table.from_batches(blocks, schema=VIEW_SCHEMA)


def draw_segment(policy: ViewPolicy, segment: Segment, samples: pa.Table) -> pa.Table:
    """The lines of a segment's rows in the view table; `samples` are those of the cache."""
    first, end = segment.samples
    key, width, height = (samples[name][first:end] for name in ("key", "width", "height"))
    sizes = width.to_numpy(), height.to_numpy()
    return draw_views(policy, key.to_pylist(), *sizes, segment.views, first)


class ViewTable:
    """Views by row, on top of an Arrow table of `VIEW_SCHEMA`; `photometric` is that of the policy."""

    def __init__(self, table: pa.Table, photometric: Photometric = "color_jitter") -> None:
        self._photometric: Photometric = photometric
        self._columns = {name: table[name].to_numpy() for name in VIEW_SCHEMA.names}

    def view(self, index: int) -> View:
        """The view in line `index` of the table."""
        value = {name: column[index].item() for name, column in self._columns.items()}
        box = value["left"], value["top"], value["right"], value["bottom"]
        jitter = {name: value[name] for name in ("brightness", "contrast", "saturation", "hue")}
        size = value["height"], value["width"]
        return View(box, value["flip"], size, **jitter, photometric=self._photometric)
