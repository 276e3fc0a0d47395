"""Fixed-rate codecs: normalise, scale each token, quantise every value to one of 2^bits levels.

    int4            standardised; levels evenly spaced up to the token's largest magnitude
    int4-hadamard   standardised and rotated, so nearly Gaussian: Lloyd-Max levels of a unit Gaussian
    int4-phi-s      the same after PHI-S instead
    int4-rings      as int4-hadamard, but with a trellis over even levels and an entropy code of fixed length

Shapes: R rows, S levels, H×W grid, C channels. docs/codecs.md states the bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachercache.pipeline.codecs.calibrated import OUTLIER_ARRAYS, CalibratedCodec, Coder, join, row_blocks
from teachercache.pipeline.codecs.kernels import has_kernel
from teachercache.pipeline.codecs.normalisation import Hadamard, Normalisation, PhiS
from teachercache.pipeline.codecs.quantizer import (
    ScalarQuantizer,
    TokenQuantizer,
    gaussian_levels,
    largest_magnitude,
    packed_width,
)
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
        Normalisation, _even_levels, partial(ScalarQuantizer, base_scale=largest_magnitude, steps=(1.0,))
    ),
    "-hadamard": Scheme(
        Hadamard, gaussian_levels, ScalarQuantizer, advised=(8, 6, 5, 4, 3), reported=(8, 4, 3)
    ),
    "-phi-s": Scheme(PhiS, gaussian_levels, ScalarQuantizer),
    # No report tries these: two rows of SAM-L alone would take a third of the minute that a report may take.
    "-rings": Scheme(Hadamard, ring_levels, RingQuantizer, rates=(4, 3), advised=(4,), whole_bytes=True),
}


class _Coder(Coder):
    def __init__(self, normalisation: Normalisation, quantizer: TokenQuantizer) -> None:
        super().__init__(normalisation)
        self.quantizer = quantizer

    def encode(self, features_RSHWC: Tensor) -> dict[str, Tensor]:
        split = [self.normalisation.split(features_RSHWC[rows]) for rows in row_blocks(features_RSHWC)]
        tokens, *outliers = map(join, zip(*split, strict=True))
        arrays = *self.quantizer.quantise(tokens), *outliers
        return dict(zip(("codes", "scales", *OUTLIER_ARRAYS), arrays, strict=True))

    def decode(self, *arrays: Tensor, out: Tensor) -> None:
        codes, scales_RSHW = arrays
        for level in range(self.normalisation.levels):
            tokens = self.quantizer.dequantise(codes[:, level], self.normalisation.width)
            scales = scales_RSHW[:, level, ..., None].float()
            out[:, level] = self.normalisation.inverse(tokens, scales, level)

    def decode_at_once(self, *arrays: Tensor, dtype: torch.dtype) -> Tensor | None:
        one, other = self.normalisation, self.quantizer
        if not (isinstance(one, Hadamard) and isinstance(other, ScalarQuantizer)):
            return None
        if not has_kernel(arrays[0].device):
            return None
        mean, std, left, right = (one.tables[name] for name in ("mean", "std", "left", "right"))
        arrays = *(array.contiguous() for array in arrays), other.levels, mean, std, one.signed_std_SC
        return torch.ops.teachercache.decode_hadamard(*arrays, left, right, dtype)


class QuantizedCodec(CalibratedCodec):
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
        levels = torch.tensor(self.scheme.levels(self.bits), dtype=torch.float32)
        return self.scheme.normalisation.calibrate(features_RSHWC).tables | {"levels": levels}

    def _coder(self, tables: dict[str, Tensor]) -> Coder:
        return _Coder(self.scheme.normalisation(tables), self.scheme.quantizer(tables["levels"]))
