"""Where views lie in their images: the box, flip and jitter of each, drawn by (seed, sample_key, view_index).

Arrays are (samples, views); sizes of images and boxes are in pixels of the source.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from teachercache.pipeline.records.strict import Strict
from teachercache.pipeline.records.view_policy import ViewPolicy

_CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop, before it falls back to a centre crop
_DRAWS_PER_VIEW = 2 * _CROP_ATTEMPTS + 3
PIXEL_TOLERANCE = 1e-3  # of a rendered pixel: boxes are stored as float32

# (low, high, what changes nothing) of brightness, contrast, saturation and hue, after the multi-task
# community's PhotoMetricDistortion: ±32 is a quarter of mid-grey, ±18 of OpenCV's 180 hues is ±0.1.
_JITTER = ((0.75, 1.25, 1.0), (0.5, 1.5, 1.0), (0.5, 1.5, 1.0), (-0.1, 0.1, 0.0))

Floats = NDArray[np.float64]
Box = tuple[Floats, Floats, Floats, Floats]  # left, top, right, bottom


def draw_crops(
    policy: ViewPolicy,
    sample_keys: Sequence[str],
    widths: Floats,
    heights: Floats,
    views: NDArray[np.int64],
) -> tuple[list[Floats], NDArray[np.bool_], list[Floats]]:
    """([left, top, right, bottom], flip, [brightness, contrast, saturation, hue]) of views of each sample.

    In pairs of flips two views, 2k and 2k + 1, are the k-th crop, as it is and mirrored.
    """
    shape = (len(sample_keys), len(views))
    width, height = (np.broadcast_to(side[:, None], shape) for side in (widths, heights))
    pairs = policy.flip == "pairs"
    drawn = uniforms(policy.seed, sample_keys, views // 2 if pairs else views)
    flip = drawn[..., -1] < policy.flip_probability
    jitter = [np.full(shape, neutral) for _, _, neutral in _JITTER]
    if pairs:
        flip ^= views % 2 == 1
    if policy.policy == "imagenet_eval":
        box = _centre_crop(policy, width, height)
    elif policy.policy == "multitask_eval":
        box = _whole_image(policy, width, height)
    elif policy.policy == "multitask_train":
        box = _magnified_crop(policy, width, height, drawn)
        jitter = _draw_jitter(policy, drawn)
    else:
        box = _random_resized_crop(policy, width, height, drawn)
    if policy.is_fixed:
        flip = np.zeros(shape, bool)
    return list(box), flip, jitter


class StudentJitter(Strict):
    """How far a student's colours are from those that its teachers see, changed as a `View`'s are."""

    brightness: float = Field(0.0, ge=0, le=1, description="Factors of 1 - x to 1 + x.")
    contrast: float = Field(0.0, ge=0, le=1, description="As brightness.")
    saturation: float = Field(0.0, ge=0, le=1, description="As brightness.")
    hue: float = Field(0.0, ge=0, le=0.5, description="Shifts of -x to x, in turns.")


def draw_jitter(jitter: StudentJitter, seed: int, sample_key: str, epoch: int) -> list[float]:
    """Brightness, contrast, saturation and hue of what the student sees at an epoch."""
    drawn = uniforms(seed, [f"jitter/{sample_key}"], np.array([epoch]), draws=4)[0, 0]
    strengths = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    return (np.array([1, 1, 1, 0]) + (2 * drawn - 1) * strengths).tolist()


def draw_window(policy: ViewPolicy, seed: int, sample_key: str, epoch: int) -> tuple[int, int]:
    """Where the student's window of a view begins at an epoch: (row, column), in pixels of the view."""
    if not policy.margin:
        return 0, 0
    drawn = uniforms(seed, [f"window/{sample_key}"], np.array([epoch]), draws=2)[0, 0]
    row, column = (drawn * policy.windows_per_axis).astype(int) * policy.patch
    return int(row), int(column)


def uniforms(
    seed: int, sample_keys: Sequence[str], counters: NDArray[np.int64], draws: int = _DRAWS_PER_VIEW
) -> Floats:
    """(samples, counters, draws) numbers in [0, 1): SplitMix64 at (counter, draw), keyed by the sample.

    Steele et al., "Fast splittable pseudorandom number generators", 2014: the k-th output is a mix
    of state + k·γ, so any element is computed on its own, and numpy computes all of them at once.
    """
    keys = np.array([xxhash.xxh3_64_intdigest(key.encode(), seed) for key in sample_keys], np.uint64)
    numbers = np.arange(1, draws + 1, dtype=np.uint64)
    places = counters.astype(np.uint64)[:, None] * np.uint64(draws) + numbers
    z = keys[:, None, None] + places * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _random_resized_crop(policy: ViewPolicy, width: Floats, height: Floats, uniforms: Floats) -> Box:
    """torchvision's RandomResizedCrop for many samples at once: first of ten attempts that fits."""
    attempts = uniforms[..., : 2 * _CROP_ATTEMPTS].reshape(*width.shape, _CROP_ATTEMPTS, 2)
    area = (width * height)[..., None] * _between(attempts[..., 0], *policy.scale)
    ratio = np.exp(_between(attempts[..., 1], np.log(policy.ratio[0]), np.log(policy.ratio[1])))
    crop_width, crop_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits_across = (crop_width >= 1) & (crop_width <= width[..., None])
    fits = fits_across & (crop_height >= 1) & (crop_height <= height[..., None])
    first = np.argmax(fits, axis=-1)[..., None]
    w, h = (np.take_along_axis(side, first, -1)[..., 0] for side in (crop_width, crop_height))
    left = np.floor(uniforms[..., -3] * (width - w + 1))
    top = np.floor(uniforms[..., -2] * (height - h + 1))

    fallback = ~fits.any(-1)
    w = np.where(fallback, np.minimum(width, np.rint(height * policy.ratio[1])), w)
    h = np.where(fallback, np.minimum(height, np.rint(width / policy.ratio[0])), h)
    left = np.where(fallback, np.floor((width - w) / 2), left)
    top = np.where(fallback, np.floor((height - h) / 2), top)
    return left, top, left + w, top + h


def _centre_crop(policy: ViewPolicy, width: Floats, height: Floats) -> Box:
    """Resize so that the crop takes `crop_fraction` of the tighter side, then crop the centre."""
    out_height, out_width = policy.stored_size
    source_per_output = policy.crop_fraction * np.minimum(width / out_width, height / out_height)
    w, h = out_width * source_per_output, out_height * source_per_output
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _magnified_crop(policy: ViewPolicy, width: Floats, height: Floats, uniforms: Floats) -> Box:
    """A window of the view's size in the image magnified by `scale`, whose sides keep their ratio."""
    magnification = _between(uniforms[..., 0], *policy.scale)
    left, right = _window(width, policy.stored_size[1], magnification, uniforms[..., 1])
    top, bottom = _window(height, policy.stored_size[0], magnification, uniforms[..., 2])
    return left, top, right, bottom


def _whole_image(policy: ViewPolicy, width: Floats, height: Floats) -> Box:
    """All of the image amid padding, as it is or, where it would not fit, shrunk so that it does."""
    out_height, out_width = policy.stored_size
    known_width, known_height = np.maximum(width, 1), np.maximum(height, 1)
    shrink = np.minimum(np.minimum(out_width / known_width, out_height / known_height), 1)
    left, right = _window(width, out_width, shrink, np.zeros_like(width))
    top, bottom = _window(height, out_height, shrink, np.zeros_like(height))
    return left, top, right, bottom


def _window(side: Floats, out: int, magnification: Floats, uniform: Floats) -> tuple[Floats, Floats]:
    """Where `out` pixels of the magnified axis lie in source pixels; a shorter axis lies amid padding."""
    spare = np.floor(side * magnification + PIXEL_TOLERANCE) - out
    offset = np.where(spare >= 0, np.floor(uniform * (spare + 1)), -np.floor(-spare / 2))
    known = side > 0
    return known * offset / magnification, known * (offset + out) / magnification


def _draw_jitter(policy: ViewPolicy, uniforms: Floats) -> list[Floats]:
    """Brightness, contrast, saturation and hue of each view."""
    chances, strengths = uniforms[..., 3:11:2], uniforms[..., 4:12:2]
    return [
        np.where(chances[..., i] < policy.jitter_probability, _between(strengths[..., i], low, high), neutral)
        for i, (low, high, neutral) in enumerate(_JITTER)
    ]


def _between(uniform: Floats, low: float, high: float) -> Floats:
    return low + uniform * (high - low)
