"""The plain codecs: float32, float16 (rounded to fewer bits, too) and bfloat16."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.codecs.codec import Codec, Encoded, Standing, may_arrive_late, torch_dtype
from teachercache.pipeline.records.array_layout import ArrayLayout

CODE_AXES = ("level", "height", "width", "channel")


class _FloatCodec(Codec):
    dtype: ClassVar[torch.dtype]
    stored_dtype: ClassVar[np.dtype]
    attributes: ClassVar[dict[str, Any]] = {}

    def layout(self, levels: int, grid: tuple[int, int], width: int) -> dict[str, ArrayLayout]:
        return {"codes": ArrayLayout((levels, *grid, width), self.stored_dtype, CODE_AXES, self.attributes)}

    @property
    def holds(self) -> str:  # type: ignore[override]
        return f"finite values of at most {torch.finfo(self.dtype).max:g}"

    def encode_unchecked(self, features_RSHWC: Tensor) -> Encoded:
        codes = features_RSHWC.to(self.dtype).contiguous()
        return Encoded(
            self, {"codes": codes.view(torch_dtype(self.stored_dtype))}, torch.isfinite(codes).all()
        )

    def decode_tensors(
        self, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        codes = tensors["codes"].to(device, non_blocking=may_arrive_late(device))
        return codes.view(self.dtype).to(dtype)


class Float32Codec(_FloatCodec):
    name = "f32"
    standing = "special"
    dtype = torch.float32
    stored_dtype = token_dtype = np.dtype("float32")


class Float16Codec(_FloatCodec):
    name = "f16"
    standing: Standing = "advised"
    reported = True
    dtype = torch.float16
    stored_dtype = np.dtype("float16")


class BitRoundCodec(Float16Codec):
    """Keeps `bits` of the mantissa, as `numcodecs.BitRound`, which takes no tensors of a GPU. Readers see
    plain float16; it is the store's compressor that saves the bits."""

    standing = "special"
    reported = False
    needs_compressor = True

    def __init__(self, bits: int) -> None:
        self.name, self._dropped = f"bitround-{bits}", 10 - bits

    def encode_unchecked(self, features_RSHWC: Tensor) -> Encoded:
        halves = features_RSHWC.half().contiguous()
        bits = halves.view(torch.int16)
        nearest = (1 << self._dropped - 1) - 1 + (bits >> self._dropped & 1)
        codes = ((bits + nearest) & -(1 << self._dropped)).view(torch.float16)
        finite = torch.isfinite(halves) & torch.isfinite(codes)  # a NaN's bits may round to a number's
        return Encoded(self, {"codes": codes}, finite.all())


class BFloat16Codec(_FloatCodec):
    """Zarr v3 has no agreed bfloat16, so the bits are stored as uint16 and an attribute says so."""

    name = "bf16"
    standing = "special"
    dtype = torch.bfloat16
    stored_dtype = np.dtype("uint16")
    attributes: ClassVar[dict[str, Any]] = {"bits_of": "bfloat16"}
