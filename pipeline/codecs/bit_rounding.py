"""float16 rounded to fewer bits: float16 features to any reader, which a compressor shrinks.

Only the store's compressor saves the bits (`compressor` of a build). The rounding is that of
`numcodecs.BitRound`, which rounds numpy arrays alone: here features are rounded on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teachercache.pipeline.codecs.codec import Encoded
from teachercache.pipeline.codecs.scalar import Float16Codec

_MANTISSA_BITS = 10


class BitRoundCodec(Float16Codec):
    """`bits` of float16's mantissa are kept, to nearest, ties to even."""

    standing = "special"
    reported = False

    def __init__(self, bits: int) -> None:
        self.name, self._dropped = f"bitround-{bits}", _MANTISSA_BITS - bits

    def encode_unchecked(self, features_RSHWC: Tensor) -> Encoded:
        halves = features_RSHWC.half().contiguous()
        bits = halves.view(torch.int16)
        nearest = (1 << self._dropped - 1) - 1 + (bits >> self._dropped & 1)
        codes = ((bits + nearest) & -(1 << self._dropped)).view(torch.float16)
        finite = torch.isfinite(halves) & torch.isfinite(codes)  # a NaN's bits may round to a number's
        return Encoded(self, {"codes": codes}, finite.all())
