"""Views: one deterministic crop, flip and jitter of a sample, drawn once and replayed everywhere.

A `View` is drawn from a counter-based generator keyed by (seed, sample_key, view_index), so any
machine can draw any view in any order. What was drawn is stored in `views.parquet`; the stored
parameters, not the seed, are the truth, and `render_view` is the one function that turns them into
pixels, for the teacher (at its input size) and for the student (at the view's own size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2 import functional as F

from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.records.limits import MAX_SIDE
from teachercache.pipeline.records.spec import Photometric, Segment, Size, ViewPolicy
from teachercache.pipeline.records.tables import VIEW_SCHEMA

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, before it falls back to a centre crop
_DRAWS_PER_VIEW = 2 * _CROP_ATTEMPTS + 3
_BLOCK_SAMPLES = 1 << 16
_MAX_PIXEL, _MIN_PIXELS, _MAX_FACTOR = 1e7, 1e-3, 1e3  # what a view table may ask for
_PIXEL_TOLERANCE = 1e-3  # of a rendered pixel: boxes are stored as float32

PADDING = (124, 116, 104)
"""The colour outside the image: ImageNet's mean, which normalisation takes to about zero."""

# (low, high, what changes nothing) of brightness, contrast, saturation and hue, after the multi-task
# community's PhotoMetricDistortion: ±32 is a quarter of mid-grey, ±18 of OpenCV's 180 hues is ±0.1.
_JITTER = ((0.75, 1.25, 1.0), (0.5, 1.5, 1.0), (0.5, 1.5, 1.0), (-0.1, 0.1, 0.0))

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """One view of one sample.

    `box` is (left, top, right, bottom) in pixels of the decoded source image, EXIF orientation
    applied; what it holds outside the image is padding. `size` is (height, width) of the student's input.
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
    def magnification(self) -> float:
        """Pixels of the student's input per source pixel, the geometric mean of both axes."""
        left, top, right, bottom = self.box
        return float(np.sqrt(self.size[0] / (bottom - top) * self.size[1] / (right - left)))


def render_view(image: Image.Image, view: View, size: Size | None = None) -> Tensor:
    """The pixels of a view: uint8 (3, height, width), at `size` or else at the view's own size.

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
    if columns.pixels < 1 or rows.pixels < 1:
        return torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()
    box = columns.start, rows.start, columns.end, rows.end
    crop = image.resize((columns.pixels, rows.pixels), Image.Resampling.BICUBIC, box=box)
    crop = (_distorted if view.photometric == "distortion" else _jittered)(crop, view)
    if crop.size != (width, height):
        canvas = Image.new("RGB", (width, height), PADDING)
        canvas.paste(crop, (columns.first, rows.first))
        crop = canvas
    if view.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def enlarge_and_pad(pixels_B3HW: Tensor, size: Size) -> Tensor:
    """Normalised pixels, bicubically enlarged until they touch `size`, zeros on the right or below: how SAK's
    authors feed SAM (the paper, B.1, says "pad and resize")."""
    height, width = size
    scale = min(height / pixels_B3HW.shape[2], width / pixels_B3HW.shape[3])
    fitted = (int(pixels_B3HW.shape[2] * scale + 0.5), int(pixels_B3HW.shape[3] * scale + 0.5))
    pixels_B3HW = interpolate(pixels_B3HW, size=fitted, mode="bicubic", align_corners=False)
    return pad(pixels_B3HW, (0, width - fitted[1], 0, height - fitted[0]))


def _jittered(image: Image.Image, view: View) -> Image.Image:
    if view.brightness != 1:
        image = F.adjust_brightness(image, view.brightness)
    if view.contrast != 1:
        image = F.adjust_contrast(image, view.contrast)
    if view.saturation != 1:
        image = F.adjust_saturation(image, view.saturation)
    if view.hue != 0:
        image = F.adjust_hue(image, view.hue)
    return image


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
    first = max(0, math.ceil(-low / step - _PIXEL_TOLERANCE))
    last = min(rendered, math.floor((source - low) / step + _PIXEL_TOLERANCE))
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
    table = draw_views(
        policy, [sample_key], np.array([width]), np.array([height]), (view_index, view_index + 1)
    )
    return ViewTable(table, policy.photometric).view(0)


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
    blocks = []
    for start in range(0, len(sample_keys), _BLOCK_SAMPLES):
        stop = min(start + _BLOCK_SAMPLES, len(sample_keys))
        blocks.append(
            _draw_block(
                policy,
                sample_keys[start:stop],
                np.asarray(widths[start:stop], np.float64),
                np.asarray(heights[start:stop], np.float64),
                np.arange(*views),
                first_sample + start,
            )
        )
    return pa.Table.from_batches(blocks, schema=VIEW_SCHEMA)


def _draw_block(
    policy: ViewPolicy,
    sample_keys: Sequence[str],
    widths: Floats,
    heights: Floats,
    views: NDArray[np.int64],
    first_sample: int,
) -> pa.RecordBatch:
    shape = (len(sample_keys), len(views))
    width, height = (np.broadcast_to(side[:, None], shape) for side in (widths, heights))
    uniforms = _uniforms(policy.seed, sample_keys, views)
    flip = uniforms[..., -1] < policy.flip_probability
    jitter = [np.full(shape, neutral) for _, _, neutral in _JITTER]
    if policy.policy == "imagenet_eval":
        left, top, right, bottom = _centre_crop(policy, width, height)
    elif policy.policy == "multitask_eval":
        left, top, right, bottom = _whole_image(policy, width, height)
    elif policy.policy == "multitask_train":
        left, top, right, bottom = _magnified_crop(policy, width, height, uniforms)
        jitter = _draw_jitter(policy, uniforms)
    else:
        left, top, right, bottom = _random_resized_crop(policy, width, height, uniforms)
    if policy.policy in ("imagenet_eval", "multitask_eval"):
        flip = np.zeros(shape, bool)
    count = left.size
    samples = np.arange(first_sample, first_sample + shape[0])
    columns = [
        np.repeat(samples, shape[1]),
        np.tile(views.astype(np.int32), shape[0]),
        *(side.astype(np.float32).ravel() for side in (left, top, right, bottom)),
        flip.ravel(),
        *(factor.astype(np.float32).ravel() for factor in jitter),
        np.full(count, policy.size[0], np.int32),
        np.full(count, policy.size[1], np.int32),
    ]
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=VIEW_SCHEMA)


def draw_segment(policy: ViewPolicy, segment: Segment, samples: pa.Table) -> pa.Table:
    """The lines of a segment's rows in the view table; `samples` are those of the cache."""
    first, end = segment.samples
    key, width, height = (samples[name][first:end] for name in ("key", "width", "height"))
    sizes = width.to_numpy(), height.to_numpy()
    return draw_views(policy, key.to_pylist(), *sizes, segment.views, first)


def _random_resized_crop(
    policy: ViewPolicy, width: Floats, height: Floats, uniforms: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """torchvision's RandomResizedCrop for many samples at once: first of ten attempts that fits."""
    attempts = uniforms[..., : 2 * _CROP_ATTEMPTS].reshape(*width.shape, _CROP_ATTEMPTS, 2)
    area = (width * height)[..., None] * _between(attempts[..., 0], *policy.scale)
    ratio = np.exp(_between(attempts[..., 1], np.log(policy.ratio[0]), np.log(policy.ratio[1])))
    crop_width, crop_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (
        (crop_width >= 1)
        & (crop_width <= width[..., None])
        & (crop_height >= 1)
        & (crop_height <= height[..., None])
    )
    first = np.argmax(fits, axis=-1)[..., None]
    w = np.take_along_axis(crop_width, first, -1)[..., 0]
    h = np.take_along_axis(crop_height, first, -1)[..., 0]
    left = np.floor(uniforms[..., -3] * (width - w + 1))
    top = np.floor(uniforms[..., -2] * (height - h + 1))

    fallback = ~fits.any(-1)
    w = np.where(fallback, np.minimum(width, np.rint(height * policy.ratio[1])), w)
    h = np.where(fallback, np.minimum(height, np.rint(width / policy.ratio[0])), h)
    left = np.where(fallback, np.floor((width - w) / 2), left)
    top = np.where(fallback, np.floor((height - h) / 2), top)
    return left, top, left + w, top + h


def _centre_crop(policy: ViewPolicy, width: Floats, height: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Resize so that the crop takes `crop_fraction` of the tighter side, then crop the centre."""
    out_height, out_width = policy.size
    source_per_output = policy.crop_fraction * np.minimum(width / out_width, height / out_height)
    w, h = out_width * source_per_output, out_height * source_per_output
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _magnified_crop(
    policy: ViewPolicy, width: Floats, height: Floats, uniforms: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """A window of the view's size in the image magnified by `scale`, whose sides keep their ratio."""
    magnification = _between(uniforms[..., 0], *policy.scale)
    left, right = _window(width, policy.size[1], magnification, uniforms[..., 1])
    top, bottom = _window(height, policy.size[0], magnification, uniforms[..., 2])
    return left, top, right, bottom


def _whole_image(policy: ViewPolicy, width: Floats, height: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """All of the image amid padding, as it is or, where it would not fit, shrunk so that it does."""
    out_height, out_width = policy.size
    known_width, known_height = np.maximum(width, 1), np.maximum(height, 1)
    shrink = np.minimum(np.minimum(out_width / known_width, out_height / known_height), 1)
    left, right = _window(width, out_width, shrink, np.zeros_like(width))
    top, bottom = _window(height, out_height, shrink, np.zeros_like(height))
    return left, top, right, bottom


def _window(side: Floats, out: int, magnification: Floats, uniform: Floats) -> tuple[Floats, Floats]:
    """Where `out` pixels of the magnified axis lie in source pixels; a shorter axis lies amid padding."""
    spare = np.floor(side * magnification + _PIXEL_TOLERANCE) - out
    offset = np.where(spare >= 0, np.floor(uniform * (spare + 1)), -np.floor(-spare / 2))
    known = side > 0
    return known * offset / magnification, known * (offset + out) / magnification


def _draw_jitter(policy: ViewPolicy, uniforms: Floats) -> list[Floats]:
    """Brightness, contrast, saturation and hue of each view."""
    used = uniforms[..., 3 : 3 + 2 * len(_JITTER)]
    return [
        np.where(
            used[..., 2 * i] < policy.jitter_probability, _between(used[..., 2 * i + 1], low, high), neutral
        )
        for i, (low, high, neutral) in enumerate(_JITTER)
    ]


def _between(uniform: Floats, low: float, high: float) -> Floats:
    return low + uniform * (high - low)


def _uniforms(seed: int, sample_keys: Sequence[str], views: NDArray[np.int64]) -> Floats:
    """(samples, views, draws) numbers in [0, 1): SplitMix64 at counter (view, draw), keyed by the sample.

    Steele et al., "Fast splittable pseudorandom number generators", 2014: the k-th output is a mix
    of state + k·γ, so any element is computed on its own, and numpy computes all of them at once.
    """
    keys = np.array([xxhash.xxh3_64_intdigest(key.encode(), seed) for key in sample_keys], np.uint64)
    draws = np.arange(1, _DRAWS_PER_VIEW + 1, dtype=np.uint64)
    counters = views.astype(np.uint64)[:, None] * np.uint64(_DRAWS_PER_VIEW) + draws
    z = keys[:, None, None] + counters * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniforms: Floats = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


class ViewTable:
    """Views by row, on top of an Arrow table of `VIEW_SCHEMA`; `photometric` is that of the policy."""

    def __init__(self, table: pa.Table, photometric: Photometric = "color_jitter") -> None:
        self._photometric: Photometric = photometric
        self._columns = {name: table[name].to_numpy() for name in VIEW_SCHEMA.names}

    def __len__(self) -> int:
        return len(self._columns["flip"])

    def view(self, index: int) -> View:
        """The view in line `index` of the table."""
        value = {name: column[index].item() for name, column in self._columns.items()}
        box = value["left"], value["top"], value["right"], value["bottom"]
        jitter = {name: value[name] for name in ("brightness", "contrast", "saturation", "hue")}
        size = value["height"], value["width"]
        return View(box, value["flip"], size, **jitter, photometric=self._photometric)
