"""A transform codec: what neighbouring tokens and levels share is stored once.

    y = H D (x − mean) / std         as in the hadamard codecs
    u = y / token_scale              so that every token of a row ends with the same relative error
    k = (E ⊗ D_H ⊗ D_W) u            KLT over the levels, DCT-II over the grid: orthonormal

A coefficient is one (level, row frequency, column frequency) with its C channels. Its channels share a
float16 scale and a number of bits, 0 to 8, that the calibration sample sets: each bit goes where it lowers
the error most (reverse water-filling). The bytes a row takes are those of the hadamard codec at most.

    int4-dct          Lloyd-Max levels; up to 8 bits
    int4-dct-rings    the quantiser of int4-rings; up to 6 bits, since more gain nothing with so many levels

Shapes: R rows, S levels, H×W grid, C channels, N = S·H·W coefficients.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from torch import Tensor

from teachercache.pipeline.codecs.calibrated import OUTLIER_ARRAYS, CalibratedCodec, Coder, join, row_blocks
from teachercache.pipeline.codecs.normalisation import Hadamard
from teachercache.pipeline.codecs.quantizer import (
    ScalarQuantizer,
    TokenQuantizer,
    divide_by_scales,
    gaussian_distortion,
    gaussian_levels,
    root_mean_square,
)
from teachercache.pipeline.codecs.rings import RingQuantizer, ring_distortion, ring_levels
from teachercache.pipeline.records.array_layout import ArrayLayout


@dataclass(frozen=True)
class Quantisation:
    """Of coefficients of 1 to `most_bits` bits. `distortion`: that of unit Gaussian values, from 0 bits on.

    `levels` by bits, `size` many; where they are `nested`, those of fewer bits begin those of more.
    """

    most_bits: int
    distortion: Callable[[int], float]
    levels: Callable[[int], NDArray[np.floating]]
    size: Callable[[int], int]
    quantizer: Callable[[Tensor], TokenQuantizer]
    nested: bool = False

    def table(self) -> NDArray[np.floating]:
        """The levels of all bits."""
        parts = [self.levels(bits) for bits in range(1, self.most_bits + 1)]
        return parts[-1] if self.nested else np.concatenate(parts)

    def parts(self, table: Tensor) -> list[Tensor]:
        """Those of 1 bit, of 2, …"""
        sizes = [self.size(bits) for bits in range(1, self.most_bits + 1)]
        return [table[:size] for size in sizes] if self.nested else list(table.split(sizes))


_BASES = ("level_basis", "row_basis", "column_basis")


def _num_ring_levels(bits: int) -> int:
    return len(ring_levels(bits))


SCALAR = Quantisation(8, gaussian_distortion, gaussian_levels, partial(pow, 2), ScalarQuantizer)
RINGS = Quantisation(6, ring_distortion, ring_levels, _num_ring_levels, RingQuantizer, nested=True)


@dataclass(frozen=True)
class _Group:
    """The coefficients of one number of bits, and their place in the bytes of a row."""

    quantizer: TokenQuantizer
    positions: Tensor
    code_bytes: slice


class _Coder(Coder):
    def __init__(
        self, tables: dict[str, Tensor], bits_SHW: NDArray[np.uint8], quantisation: Quantisation
    ) -> None:
        super().__init__(Hadamard(tables), bits_SHW.shape[1:])
        self.bases = [tables[name] for name in _BASES]
        self.shape_SHW = bits_SHW.shape
        self.groups, start = list[_Group](), 0
        parts, bits_N = quantisation.parts(tables["levels"]), bits_SHW.ravel()
        for bits in range(quantisation.most_bits, 0, -1):
            positions = torch.from_numpy(np.flatnonzero(bits_N == bits)).to(tables["levels"].device)
            end = start + len(positions) * self.normalisation.width * bits // 8
            if len(positions):
                group = _Group(quantisation.quantizer(parts[bits - 1]), positions, slice(start, end))
                self.groups.append(group)
            start = end

    def encode(self, features_RSHWC: Tensor) -> dict[str, Tensor]:
        transformed = [self._transformed(features_RSHWC[rows]) for rows in row_blocks(features_RSHWC)]
        spectrum_RNC, token_scales, *outliers = map(join, zip(*transformed, strict=True))
        scales_RN = spectrum_RNC.new_zeros(spectrum_RNC.shape[:2], dtype=torch.float16)
        codes = []
        for group in self.groups:
            packed, scales = group.quantizer.quantise(spectrum_RNC[:, group.positions])
            scales_RN[:, group.positions] = scales
            codes.append(packed.flatten(1))
        return {
            "codes": torch.cat(codes, 1),
            "scales": scales_RN.unflatten(1, self.shape_SHW),
            "token_scales": token_scales.squeeze(-1),
            **dict(zip(OUTLIER_ARRAYS, outliers, strict=True)),
        }

    def _transformed(self, features_RSHWC: Tensor) -> tuple[Tensor, ...]:
        """Coefficients (R, N, C), the tokens' scales, and the outliers: their places and values."""
        tokens, *outliers = self.normalisation.split(features_RSHWC)
        token_scales = root_mean_square(tokens).half()
        spectrum = _transform(divide_by_scales(tokens, token_scales), self.bases)
        return spectrum.flatten(1, 3), token_scales, *outliers

    def decode(self, *arrays: Tensor, out: Tensor) -> None:
        (codes, scales_RSHW, token_scales_RSHW), width = arrays, self.normalisation.width
        scales_RN1 = scales_RSHW.flatten(1).float()[..., None]
        spectrum_RNC = scales_RN1.new_zeros(*scales_RN1.shape[:2], width)
        for group in self.groups:
            packed = codes[:, group.code_bytes].unflatten(1, (len(group.positions), -1))
            values = group.quantizer.dequantise(packed, width)
            spectrum_RNC[:, group.positions] = values * scales_RN1[:, group.positions]
        tokens = _transform(spectrum_RNC.unflatten(1, self.shape_SHW), [basis.mT for basis in self.bases])
        for level in range(self.normalisation.levels):
            scales = token_scales_RSHW[:, level, ..., None].float()
            out[:, level] = self.normalisation.inverse(tokens[:, level], scales, level)


class GridDctCodec(CalibratedCodec):
    table_names = (*Hadamard.table_names, *_BASES, "bits", "levels")
    least_rows = 8  # fewer say too little about the mean squares by which it divides its bits
    trial_rows = 4, 6  # a table has an entry for every place of a map
    whole_bytes = True

    def __init__(self, name: str, bits: int, quantisation: Quantisation) -> None:
        is_fast = quantisation is SCALAR
        super().__init__(name, bits, advised=(4,) if is_fast else (4, 3), reported=(4,) if is_fast else ())
        self.quantisation = quantisation

    def layout(self, levels: int, grid: tuple[int, int], width: int) -> dict[str, ArrayLayout]:
        self._require_fit(width)
        num_bytes = _bit_budget(self.bits, levels * math.prod(grid), width) * width // 8
        attributes = {"codec": self.name, "bits": self.bits, "channels": width}
        frequencies = ("level_component", "row_frequency", "column_frequency")
        half = np.dtype("float16")
        return {
            "codes": ArrayLayout((num_bytes,), np.dtype("uint8"), ("byte",), attributes),
            "scales": ArrayLayout((levels, *grid), half, frequencies, {}),
            "token_scales": ArrayLayout((levels, *grid), half, ("level", "height", "width"), {}),
            **self._outlier_layout(levels, grid),
        }

    def _learn(self, features_RSHWC: Tensor) -> dict[str, Tensor]:
        _, levels, height, width, channels = features_RSHWC.shape
        normalisation = Hadamard.calibrate(features_RSHWC)

        products_SS = features_RSHWC.new_zeros(levels, levels, dtype=torch.float64)
        for unit_RSHWC in _unit_rows(normalisation, features_RSHWC):
            flat_SN = unit_RSHWC.transpose(0, 1).flatten(1)
            products_SS += flat_SN @ flat_SN.T
        level_basis = torch.linalg.eigh(products_SS).eigenvectors.mT.flip(0).float()
        bases = level_basis, _dct_basis(height).to(level_basis), _dct_basis(width).to(level_basis)
        power_SHW = features_RSHWC.new_zeros(levels, height, width, dtype=torch.float64)
        for unit_RSHWC in _unit_rows(normalisation, features_RSHWC):
            power_SHW += _transform(unit_RSHWC, bases).square().mean(-1).sum(0)
        budget = _bit_budget(self.bits, power_SHW.numel(), channels)
        power_N = power_SHW.flatten().cpu().numpy()
        bits_SHW = allocate_bits(power_N, budget, self.quantisation).reshape(power_SHW.shape)
        return {
            **normalisation.tables,
            **dict(zip(_BASES, bases, strict=True)),
            "bits": torch.from_numpy(bits_SHW.astype(np.uint8)),
            "levels": torch.from_numpy(self.quantisation.table()).float(),
        }

    def _coder(self, tables: dict[str, Tensor]) -> Coder:
        bits_SHW = self._tables["bits"].numpy()  # known without a wait for the device
        return _Coder(tables, bits_SHW, self.quantisation)


def allocate_bits(
    power_N: NDArray[np.float64], budget: int, quantisation: Quantisation = SCALAR
) -> NDArray[np.int64]:
    """Bits (N,) of each coefficient and `budget` in all, for the least error by its power.

    The distortion of a quantiser is convex in its bits, so taking the largest gains is optimal.
    """
    most_bits = quantisation.most_bits
    distortion = np.array([quantisation.distortion(bits) for bits in range(most_bits + 1)])
    gains = np.multiply.outer(power_N, -np.diff(distortion))
    best = np.argsort(-gains, axis=None, kind="stable")[:budget]
    return np.bincount(best // most_bits, minlength=len(power_N))


def _bit_budget(bits: int, num_coefficients: int, width: int) -> int:
    """Bits a channel, summed over the coefficients, that leave room for the second scale."""
    return bits * num_coefficients - -(-16 * num_coefficients // width)


def _unit_rows(normalisation: Hadamard, features_RSHWC: Tensor) -> Iterator[Tensor]:
    for rows in row_blocks(features_RSHWC):
        tokens, *_ = normalisation.split(features_RSHWC[rows])
        yield divide_by_scales(tokens, root_mean_square(tokens).half())


def _dct_basis(size: int) -> Tensor:
    """DCT-II as an orthonormal matrix: a row for each frequency, lowest first."""
    return torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho"))


def _transform(tokens_RSHWC: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """(level ⊗ row ⊗ column) applied to the levels and the grid; with transposed bases, the way back."""
    level_basis, row_basis, column_basis = bases
    shape = tokens_RSHWC.shape
    columns = column_basis @ tokens_RSHWC
    rows = row_basis @ columns.flatten(-2)
    return (level_basis @ rows.flatten(2)).view(shape)
