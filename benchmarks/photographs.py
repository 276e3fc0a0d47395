"""Photographs for benchmarks, on any machine that has scikit-image."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

import skimage
from PIL import Image

SIZE = (500, 375)  # of most images of ImageNet
COUNT = 16
_NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg")


def write_photographs(folder: Path, count: int = COUNT) -> Path:
    """`count` JPEGs of 500×375 pixels in `folder`: different parts of the photographs in scikit-image."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [Image.open(Path(skimage.__file__).parent / "data" / name) for name in _NAMES]
    for number, photograph in enumerate(islice(cycle(photographs), count)):
        share = 1 - number / (2 * count)  # of each side
        left, top = ((1 - share) * side / 2 for side in photograph.size)
        box = (left, top, photograph.width - left, photograph.height - top)
        part = photograph.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC, box)
        part.save(folder / f"{number:03d}.jpg", quality=92)
    return folder
