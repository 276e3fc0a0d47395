"""The interface that every codec keeps. Shapes: R rows, S levels, H×W grid, C channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.records.array_layout import ArrayLayout

Standing = Literal["advised", "special", "experiment"]


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """What holds an array of this dtype."""
    return getattr(torch, dtype.name)


class Codec(ABC):
    """Encodes (R, S, H, W, C) features. `calibrate` is a no-op for codecs without tables.

    `standing`: a plan tries those that are advised; a special one serves one purpose, and an experiment is
    there for comparison. A report tries those that are `reported`. A choice needs a sample of `least_rows`; a
    look at what is lost learns from `trial_rows`, the fewest and the most. `token_dtype` is that of class
    tokens and global features, which are few bytes and matter much; `dtype` holds decoded features without
    a loss beside the codec's own, and is what a GPU trains on.
    """

    name: str
    needs_tables: ClassVar[bool] = False
    needs_compressor: ClassVar[bool] = False
    standing: Standing = "experiment"
    reported: bool = False
    least_rows: ClassVar[int] = 1
    trial_rows: ClassVar[tuple[int, int]] = (1, 2)
    token_dtype: ClassVar[np.dtype] = np.dtype("float16")
    dtype: ClassVar[torch.dtype] = torch.bfloat16
    holds: str = "finite values, class tokens within float16"

    def fits(self, width: int) -> bool:
        """Whether it can encode tokens of `width` channels."""
        return True

    def calibrate(self, features_RSHWC: Tensor) -> Self:
        """Learn what the codec needs (means, scales, rotations) from a sample of rows."""
        return self

    def state(self) -> dict[str, Tensor]:
        """The calibrated tables, as they are kept in `stats/<teacher>.safetensors`."""
        return {}

    def load_state(self, tables: dict[str, Tensor]) -> Self:
        return self

    @abstractmethod
    def layout(self, levels: int, grid: tuple[int, int], width: int) -> dict[str, ArrayLayout]:
        """The arrays that `encode` fills for one row."""

    def encode(self, features_RSHWC: Tensor) -> Encoded:
        """Encode on whatever device the features are. Raises `CodecError` for values it cannot hold."""
        encoded = self.encode_unchecked(features_RSHWC)
        if not encoded.finite:
            raise self.not_finite()
        return encoded

    @abstractmethod
    def encode_unchecked(self, features_RSHWC: Tensor) -> Encoded:
        """`encode` that leaves `Encoded.finite` for later: a GPU would wait for the answer."""

    def not_finite(self, what: str = "features") -> CodecError:
        return CodecError(
            f"Codec {self.name} cannot hold these {what}.",
            got="values that are not finite, or too large",
            expected=self.holds,
            do="choose f32 if the values are finite; look at the teacher if they are not",
        )

    @abstractmethod
    def decode_tensors(
        self, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype
    ) -> Tensor: ...


def may_arrive_late(device: torch.device | str) -> bool:
    """Whether a copy to `device` need not block. One to the CPU may be read before it is there."""
    return torch.device(device).type != "cpu"


@dataclass
class Encoded:
    """Encoded rows: the codec and its tensors, each with the row axis first.

    `finite`: whether the codec can hold what it encoded, a flag on the device; rows that were read can be.
    """

    codec: Codec
    arrays: dict[str, Tensor]
    finite: Tensor | bool = True

    def tensors(self) -> dict[str, Tensor]:
        return self.arrays

    def decode(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """Features (R, S, H, W, C). The codes travel to `device` packed and are decoded there."""
        return self.codec.decode_tensors(self.arrays, device, dtype)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.arrays.values())
