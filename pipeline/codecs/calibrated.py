"""What codecs with calibrated tables have in common: learning, saving, loading, and the tables' device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from teachercache.pipeline.codecs.codec import Codec, Encoded, may_arrive_late, torch_dtype
from teachercache.pipeline.codecs.normalisation import Normalisation
from teachercache.pipeline.codecs.outliers import num_slots
from teachercache.pipeline.errors import CodecError
from teachercache.pipeline.records.array_layout import ArrayLayout

QUANTISED_VALUES = 2**20  # at a time: a trellis takes as many steps for one token as for many
OUTLIER_ARRAYS = ("outlier_places", "outlier_values")


class Coder(ABC):
    """Works with the tables of a codec on their device."""

    def __init__(self, normalisation: Normalisation, grid: tuple[int, ...] | None = None) -> None:
        """`grid`: (H, W) of the features, where the tables are of one alone."""
        self.normalisation, self._grid = normalisation, grid

    def require_shape(self, features_RSHWC: Tensor) -> None:
        """Raises `CodecError` for features of another shape than those that the tables are of."""
        shape, (levels, width) = tuple(features_RSHWC.shape), self.normalisation.tables["mean"].shape
        if len(shape) != 5 or shape[1:] != (levels, *(self._grid or shape[2:4]), width):
            grid = "H, W" if self._grid is None else ", ".join(map(str, self._grid))
            raise CodecError(
                "This codec was calibrated on features of another shape.",
                got=shape,
                expected=f"(rows, {levels}, {grid}, {width})",
                do="use the codec of this teacher, or calibrate one on these features",
            )

    @abstractmethod
    def encode(self, features_RSHWC: Tensor) -> dict[str, Tensor]:
        """The arrays of these rows, in the order of the layout."""

    @abstractmethod
    def decode(self, *arrays: Tensor, out: Tensor) -> None:
        """Fill `out` with the features of these rows, but for their outliers."""

    def decode_at_once(self, *arrays: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Features with their outliers by one kernel, or None where there is none for these arrays."""
        return None


class CalibratedCodec(Codec):
    """A codec that is its tables, kept on the CPU; a `Coder` works with them on one device."""

    needs_tables = True
    whole_bytes = False  # the channels of a token must be a multiple of 8
    holds = "finite features like those of the calibration sample, within 50,000 standard deviations"
    table_names: tuple[str, ...]

    def __init__(self, name: str, bits: int, advised: Collection[int], reported: Collection[int]) -> None:
        """`advised` and `reported`: the rates that are, in bits."""
        self.name = name
        self.bits = bits
        self.standing = "advised" if bits in advised else "experiment"
        self.reported = bits in reported
        self._tables: dict[str, Tensor] = {}
        self._coders: dict[torch.device, Coder] = {}

    def fits(self, width: int) -> bool:
        return not self.whole_bytes or width % 8 == 0

    def _require_fit(self, width: int) -> None:
        if not self.fits(width):
            raise CodecError(
                f"Codec {self.name} needs whole bytes for the channels of a token.",
                got=f"{width} channels",
                expected="a multiple of 8",
                do=f"use int{self.bits}-hadamard",
            )

    @abstractmethod
    def _learn(self, features_RSHWC: Tensor) -> dict[str, Tensor]:
        """The tables for features like these."""

    @abstractmethod
    def _coder(self, tables: dict[str, Tensor]) -> Coder:
        """What encodes and decodes with these tables, on their device."""

    @torch.no_grad()
    def calibrate(self, features_RSHWC: Tensor) -> Self:
        """Raises `CodecError` for features that are not finite, and for a sample without a token."""
        shape, finite = tuple(features_RSHWC.shape), bool(torch.isfinite(features_RSHWC).all())
        if len(shape) != 5 or 0 in shape or not finite:
            raise CodecError(
                f"Codec {self.name} cannot be calibrated on these features.",
                got=f"shape {shape}, {'all' if finite else 'not all'} finite",
                expected="finite features (rows, levels, H, W, C) of at least one row",
                do="calibrate on some hundred rows of the teacher's own features",
            )
        self._require_fit(shape[-1])
        return self.load_state(self._learn(features_RSHWC))

    def state(self) -> dict[str, Tensor]:
        self._require_tables()
        return dict(self._tables)

    def load_state(self, tables: dict[str, Tensor]) -> Self:
        """Tables of `state()`; others beside them are left alone. Raises `CodecError` if one is missing."""
        missing = [name for name in self.table_names if name not in tables]
        if missing:
            raise CodecError(
                f"These are not the tables of codec {self.name}.",
                got=f"{', '.join(sorted(tables)) or 'no table'}",
                expected=f"{', '.join(self.table_names)}",
                do="load the statistics that were saved for this codec, or calibrate it again",
            )
        self._tables = {name: tables[name].detach().cpu() for name in self.table_names}
        self._coders = {}
        return self

    @torch.no_grad()
    def encode_unchecked(self, features_RSHWC: Tensor) -> Encoded:
        coder = self._on(features_RSHWC.device)
        coder.require_shape(features_RSHWC)
        with torch.autocast(features_RSHWC.device.type, enabled=False):
            blocks = row_blocks(features_RSHWC, QUANTISED_VALUES)
            parts = [coder.encode(features_RSHWC[rows]) for rows in blocks]
            arrays = {name: join([part[name] for part in parts]) for name in parts[0]}
        # What is not finite has left its trace in a scale or in an outlier.
        halves = [tensor for tensor in arrays.values() if tensor.is_floating_point()]
        return Encoded(self, arrays, torch.stack([torch.isfinite(half).all() for half in halves]).all())

    @torch.no_grad()
    def decode_tensors(
        self, tensors: dict[str, Tensor], device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        device = torch.device(device)
        coder = self._on(device)
        num_levels, width = coder.normalisation.levels, coder.normalisation.width
        all_arrays = self._arrays_on(device, tensors, num_levels, width)
        if (whole := coder.decode_at_once(*all_arrays, dtype=dtype)) is not None:
            return whole
        *arrays, places, values = all_arrays
        features_RSHWC = torch.empty(*tensors["scales"].shape, width, dtype=dtype, device=device)
        with torch.autocast(device.type, enabled=False):
            for rows in row_blocks(features_RSHWC):
                coder.decode(*(array[rows] for array in arrays), out=features_RSHWC[rows])
            coder.normalisation.restore(features_RSHWC, places, values)
        return features_RSHWC

    def _on(self, device: torch.device) -> Coder:
        self._require_tables()
        if device not in self._coders:
            self._coders[device] = self._coder({name: t.to(device) for name, t in self._tables.items()})
        return self._coders[device]

    @staticmethod
    def _outlier_layout(levels: int, grid: tuple[int, int]) -> dict[str, ArrayLayout]:
        shape, axes = (levels, num_slots(math.prod(grid))), ("level", "slot")
        return {
            name: ArrayLayout(shape, np.dtype(dtype), axes, {})
            for name, dtype in zip(OUTLIER_ARRAYS, ("int32", "float16"), strict=True)
        }

    def _arrays_on(
        self, device: torch.device, tensors: dict[str, Tensor], levels: int, width: int
    ) -> list[Tensor]:
        """The arrays in the order of the layout, on `device`. Raises `CodecError` if they are not its own."""
        scales = tensors.get("scales")
        grid = (scales.shape[2], scales.shape[3]) if scales is not None and scales.ndim == 4 else (0, 0)
        layout = self.layout(levels, grid, width)
        expected = {name: ((*array.shape,), torch_dtype(array.dtype)) for name, array in layout.items()}
        got = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in tensors.items()}
        if any(got.get(name) != array for name, array in expected.items()):
            raise CodecError(
                f"Codec {self.name} cannot decode these arrays.",
                got=got,
                expected=f"{expected} behind the rows",
                do="decode with the codec and the tables that the features were encoded with",
            )
        return [tensors[name].to(device, non_blocking=may_arrive_late(device)) for name in layout]

    def _require_tables(self) -> None:
        if not self._tables:
            raise CodecError(
                f"Codec {self.name} is not calibrated.",
                expected="tables learnt from a sample of rows",
                do=f'call get_codec("{self.name}").calibrate(features), or load_state() with saved tables',
            )


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; those of a single one as they are, since a copy costs a GPU time."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def row_blocks(features_RSHWC: Tensor, least_values: int = 1) -> list[slice]:
    """The rows to work on at a time: all, but on a CPU, whose caches are small, as few as hold these values.

    There is one block, an empty one, where there is no row.
    """
    num_rows = len(features_RSHWC)
    if num_rows and features_RSHWC.device.type == "cpu" and not torch.compiler.is_compiling():
        step = -(-least_values // max(features_RSHWC[0].numel(), 1))
        return [slice(row, row + step) for row in range(0, num_rows, step)]
    return [slice(None)]
