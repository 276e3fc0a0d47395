"""Fixed-rate codecs: normalise, scale each token, quantise every value to one of 2^bits levels.

    int4            standardised; levels evenly spaced up to the token's largest magnitude
    int4-hadamard   standardised and rotated, so nearly Gaussian: Lloyd-Max levels of a unit Gaussian
    int4-phi-s      the same after PHI-S instead
    int4-rings      as int4-hadamard, but with a trellis over even levels and an entropy code of fixed length

Shapes: R rows, S levels, H×W grid, C channels. docs/codecs.md states the bytes, and
`teachercache.pipeline.codecs.reference` decodes them with numpy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.codecs.calibrated import (
    OUTLIER_ARRAYS,
    QUANTISED_VALUES,
    CalibratedCodec,
    join,
    row_blocks,
)
from teachercache.pipeline.codecs.codec import Encoded
from teachercache.pipeline.codecs.lloyd_max import gaussian_levels
from teachercache.pipeline.codecs.normalisation import Hadamard, Normalisation, PhiS, Standardise
from teachercache.pipeline.codecs.packing import packed_width
from teachercache.pipeline.codecs.quantizer import ScalarQuantizer, TokenQuantizer, largest_magnitude
from teachercache.pipeline.codecs.rings import RingQuantizer, ring_levels
from teachercache.pipeline.records.array_layout import ArrayLayout


@dataclass(frozen=True)
class Scheme:
    """A normalisation, and the levels and the quantiser that suit what it gives; rates are in bits."""

    normalisation: type[Normalisation]
    levels: Callable[[int], NDArray[np.floating]]
    quantizer: Callable[[Tensor], TokenQuantizer]
    rates: tuple[int, ...] = (8, 6, 5, 4, 3)
    advised: tuple[int, ...] = ()
    reported: tuple[int, ...] = ()
    whole_bytes: bool = False


def _even_levels(bits: int) -> NDArray[np.float64]:
    return np.linspace(-1, 1, 2**bits)


SCHEMES = {  # by the suffix of the name
    "": Scheme(
        Standardise, _even_levels, partial(ScalarQuantizer, base_scale=largest_magnitude, steps=(1.0,))
    ),
    "-hadamard": Scheme(
        Hadamard, gaussian_levels, ScalarQuantizer, advised=(8, 6, 5, 4, 3), reported=(8, 4, 3)
    ),
    "-phi-s": Scheme(PhiS, gaussian_levels, ScalarQuantizer),
    # No report tries these: two rows of SAM-L alone would take a third of the minute that a report may take.
    "-rings": Scheme(Hadamard, ring_levels, RingQuantizer, rates=(4, 3), advised=(4,), whole_bytes=True),
}


class QuantizedCodec(CalibratedCodec[tuple[Normalisation, TokenQuantizer]]):
    def __init__(self, name: str, bits: int, scheme: Scheme) -> None:
        super().__init__(name, bits, scheme.advised, scheme.reported)
        self.scheme = scheme
        self.whole_bytes = scheme.whole_bytes
        self.table_names = (*scheme.normalisation.table_names, "levels")

    def layout(self, levels: int, grid: tuple[int, int], width: int) -> dict[str, ArrayLayout]:
        self._require_fit(width)
        attributes = {"codec": self.name, "bits": self.bits, "channels": width}
        axes = ("level", "height", "width")
        code_shape = (levels, *grid, packed_width(width, self.bits))
        return {
            "codes": ArrayLayout(code_shape, np.dtype("uint8"), (*axes, "byte"), attributes),
            "scales": ArrayLayout((levels, *grid), np.dtype("float16"), axes, {}),
            **self._outlier_layout(levels, grid),
        }

    def _learn(self, features_RSHWC: Tensor) -> dict[str, Tensor]:
        self._require_fit(features_RSHWC.shape[-1])
        levels = torch.tensor(self.scheme.levels(self.bits), dtype=torch.float32)
        return self.scheme.normalisation.calibrate(features_RSHWC).tables | {"levels": levels}

    def _coder(self, tables: dict[str, Tensor]) -> tuple[Normalisation, TokenQuantizer]:
        return self.scheme.normalisation(tables), self.scheme.quantizer(tables["levels"])

    @torch.no_grad()
    def encode(self, features_RSHWC: Tensor) -> Encoded:
        normalisation, quantizer = self._on(features_RSHWC.device)
        normalisation.require_shape(features_RSHWC)
        parts = []
        with torch.autocast(features_RSHWC.device.type, enabled=False):
            for block in row_blocks(features_RSHWC, QUANTISED_VALUES):
                split = [
                    normalisation.split(features_RSHWC[block][rows])
                    for rows in row_blocks(features_RSHWC[block])
                ]
                tokens, *outliers = map(join, zip(*split, strict=True))
                parts.append((*quantizer.quantise(tokens), *outliers))
            arrays = [join(part) for part in zip(*parts, strict=True)]
        return Encoded(self, dict(zip(("codes", "scales", *OUTLIER_ARRAYS), arrays, strict=True)))

    @torch.no_grad()
    def decode_tensors(
        self, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        device = torch.device(device)
        normalisation, quantizer = self._on(device)
        num_levels, width = normalisation.levels, normalisation.width
        codes, scales, *outliers = self._arrays_on(device, tensors, num_levels, width)
        features_RSHWC = torch.empty(*scales.shape, width, dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for rows, level in itertools.product(row_blocks(features_RSHWC), range(num_levels)):
                tokens = quantizer.dequantise(codes[rows, level], width)
                scale = scales[rows, level, ..., None].float()
                features_RSHWC[rows, level] = normalisation.inverse(tokens, scale, level)
            normalisation.restore(features_RSHWC, *outliers)
        return features_RSHWC
