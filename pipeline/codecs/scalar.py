"""The three plain codecs: float32, float16 and bfloat16."""

from __future__ import annotations

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


class BFloat16Codec(_FloatCodec):
    """Zarr v3 has no agreed bfloat16, so the bits are stored as uint16 and an attribute says so."""

    name = "bf16"
    standing = "special"
    dtype = torch.bfloat16
    stored_dtype = np.dtype("uint16")
    attributes: ClassVar[dict[str, Any]] = {"bits_of": "bfloat16"}
